"""Paths on disk and in a bucket: parse the user's text, list folders, compare names.

A path is a pathlib.Path on disk and an ObjectPath for `gs://BUCKET/NAME`. The latter implements the
part of pathlib that this program uses, so that few callers need to know which one they have.
Failures are OSErrors, or UserErrors where a user's text is at fault.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from vit_scale.errors import UserError
from vit_scale.storage.bucket import SCHEME, ObjectPath, check_bucket, file_system, listing
from vit_scale.storage.errors import os_errors

HUB = "hf://"  # models on the Hugging Face Hub, which are no paths: pretrained/hub.py
READ_AHEAD = 2**23  # bytes of a request for the next part of an object that is read as a stream


def parse(text: str | os.PathLike) -> pathlib.Path:
    """Return the path, on disk or in a bucket, that a user's text names.

    A bucket is checked once per process. Raises UserError if it does not exist or this user cannot
    list it, without credentials, without gcsfs, and for a scheme other than gs://.
    """
    name = os.fspath(text)
    scheme, separator, rest = name.partition("://")
    if not separator:
        return pathlib.Path(name).expanduser()  # a shell leaves ~ in --config.data.path=~/data
    if scheme + separator == HUB:
        raise UserError(
            f"{name}: a run is needed here, and on the Hugging Face Hub are only weights; make it "
            f"one: vit-scale convert {name} RUN"
        )
    if scheme + separator != SCHEME:
        raise UserError(
            f"{name}: {scheme}:// is not supported; give a path, or {SCHEME}BUCKET/NAME"
        )
    bucket = rest.partition("/")[0]
    if not bucket:
        raise UserError(f"{name} has no bucket name: use {SCHEME}BUCKET/NAME")
    check_bucket(bucket)
    return cast(pathlib.Path, ObjectPath(name))


def in_bucket(path: pathlib.Path) -> bool:
    return isinstance(path, ObjectPath)


def resolve(name: str, run: pathlib.Path, cwd: str = "") -> str:
    """Resolve a relative path that the user gave when the run in the folder `run` began.

    Tried are `cwd`, the working directory at that time (runs of older versions do not record it),
    then the run's parent folders from the innermost out. A name that is in none of them, is
    absolute, or has a scheme is returned unchanged.
    """
    if not name or "://" in name or os.path.isabs(name):
        return name
    parents = [] if in_bucket(run) else [*run.absolute().parents]
    for folder in (*([pathlib.Path(cwd)] if cwd else []), *parents):
        if os.path.exists(folder / name):
            return name if _same_file(name, folder / name) else str(folder / name)
    return name


def is_same(one: str, other: str) -> bool:
    """Return whether two names denote one existing file or folder; URLs are compared as text."""
    if "://" in one or "://" in other:
        return one == other
    return os.path.exists(one) and _same_file(one, other)


def _same_file(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def entries(folder: pathlib.Path) -> list[tuple[str, bool]]:
    """List `folder` as (name, is a folder), sorted by name; one request in a bucket.

    Raises FileNotFoundError if `folder` does not exist.
    """
    if in_bucket(folder):
        return [(name, entry["type"] == "directory") for name, entry in listing(folder).items()]
    with os.scandir(folder) as scanned:
        return sorted((entry.name, entry.is_dir()) for entry in scanned)


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """Return {name: bytes} of the files in `folder`; one request in a bucket."""
    if in_bucket(folder):
        objects = listing(folder).items()
        return {name: entry["size"] for name, entry in objects if entry["type"] == "file"}
    with os.scandir(folder) as scanned:
        return {entry.name: entry.stat().st_size for entry in scanned if entry.is_file()}


def versions(folder: pathlib.Path) -> dict[str, Any]:
    """Return {name: a value that changes with every write} of the files in `folder`."""
    if in_bucket(folder):
        return {name: entry.get("generation") for name, entry in listing(folder).items()}
    with os.scandir(folder) as scanned:
        return {e.name: (e.stat().st_mtime_ns, e.inode()) for e in scanned if e.is_file()}


def read_range(
    path: pathlib.Path, offset: int, length: int, generation: str | None = None
) -> bytes:
    """Return `length` bytes from `offset`, fewer at the file's end; one request in a bucket.

    Raises FileNotFoundError if an object does not have that `generation` any more.
    """
    if in_bucket(path):
        with os_errors(path):
            return file_system().cat_file(
                str(path), start=offset, end=offset + length, generation=generation
            )
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


@contextlib.contextmanager
def stream(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Open a file for reading from start to end; an object is read ahead in large parts."""
    if not in_bucket(path):
        with open(path, "rb") as file:
            yield file
    else:
        with os_errors(path), file_system().open(str(path), "rb", block_size=READ_AHEAD) as file:
            yield file

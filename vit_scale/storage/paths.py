"""The one way from a name to files: on this machine's disk, or `gs://BUCKET/...` in a bucket.

`path` gives a pathlib.Path for the first and an ObjectPath for the second, which does the part of
pathlib's interface that this program uses, so that few modules ask which it is. A bucket has whole
objects: no folders, no append, no rename, no lock. Hence `write`, which leaves a whole file or the
old one in both; `Appended`, a growing file that is uploaded whole from time to time; `stage`, for
what only reads local files; and `local`, the folder of this machine that stands for one in a
bucket.

What the storage refuses is an OSError with its reason in one line, like a disk's.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, cast

import fsspec
from etils.epath.gpath import PosixGPath
from tqdm import tqdm

from vit_scale.errors import UserError

SCHEME = "gs://"
INSTALL = "launch/environment.sh gs in a clone, or pip install gcsfs"
LOGIN = "no credentials: run `gcloud auth application-default login`, or use a service account"
# Where gcsfs's exceptions come from. Some are no OSError; those that are have no `strerror`.
FOREIGN = ("gcsfs", "google", "aiohttp", "requests", "fsspec")
STREAMS = 8  # files that `stage` copies at the same time


class ObjectPath(PosixGPath):
    """`gs://BUCKET/NAME`: etils.epath's path, with one request a question and an OSError's reasons.

    epath takes the storage's refusal of a listing for an empty folder, and puts the working folder
    before a path that is to be absolute.
    """

    def resolve(self, strict: bool = False) -> "ObjectPath":
        return self

    def _kind(self) -> str | None:
        with reasons(self):
            try:
                return store().info(str(self))["type"]
            except FileNotFoundError:
                return None

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Iterator["ObjectPath"]:
        return (self / name for name, _ in entries(cast(pathlib.Path, self)))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object needs no folder."""

    def read_bytes(self) -> bytes:
        with reasons(self):
            return store().cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> int:
        with reasons(self):
            store().pipe_file(str(self), bytes(data))
        return len(data)


def path(name: str | os.PathLike) -> pathlib.Path:
    """The path that a user's value names, on disk or in a bucket.

    A process asks once for each bucket, before anything else is done with it. Raises UserError for
    a bucket that doesn't exist or doesn't let this user list it, without credentials, without the
    package that reads gs://, and for another scheme.
    """
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return pathlib.Path(text)
    if scheme + separator != SCHEME:
        raise UserError(f"{text}: {scheme}:// can't be used; give a path, or {SCHEME}BUCKET/NAME")
    bucket = rest.partition("/")[0]
    if not bucket:
        raise UserError(f"{text} names no bucket: {SCHEME}BUCKET/NAME")
    _check_bucket(bucket)
    return cast(pathlib.Path, ObjectPath(text))


def recorded(name: str, run: pathlib.Path, cwd: str = "") -> str:
    """The path that a user gave when the run in the folder `run` began, to be used from any folder.

    A relative one is looked for where the run began (`cwd`, which older runs don't say), then in
    the folders around the run, the nearest first, then here; it stays as it is where it is nowhere.
    """
    if not name or "://" in name or os.path.isabs(name):
        return name
    around = [] if in_bucket(run) else [*run.absolute().parents]
    for folder in (*([pathlib.Path(cwd)] if cwd else []), *around):
        if os.path.exists(folder / name):
            return name if _is_same(name, folder / name) else str(folder / name)
    return name


def _is_same(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def is_same(one: str, other: str) -> bool:
    """Whether two names are of the same file or folder, which is there."""
    if "://" in one or "://" in other:
        return one == other
    return os.path.exists(one) and _is_same(one, other)


def in_bucket(place: pathlib.Path) -> bool:
    """Whether a path is of object storage."""
    return isinstance(place, ObjectPath)


@functools.cache
def _check_bucket(bucket: str) -> None:
    try:
        with reasons(ObjectPath(SCHEME + bucket)):
            store().ls(bucket, detail=False, max_results=1)
    except ImportError as error:
        raise UserError(f"{SCHEME}{bucket} needs the package gcsfs: {INSTALL}") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no bucket {SCHEME}{bucket}; create it, or correct it") from error
    except OSError as error:
        raise UserError(f"{SCHEME}{bucket} can't be read: {error.strerror}") from error


@functools.cache
def store() -> Any:
    """The file system of gs://, for this process. Raises ImportError without gcsfs.

    Its settings are of this process too, so that Orbax has them for what it opens by itself. No
    cache of listings: another process may have written since. No hierarchical namespaces: they
    cost a request for each of their questions, and nothing here renames a folder.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow, where installed, would take over
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def reasons(place: pathlib.PurePath) -> Iterator[None]:
    """Turns what gcsfs raises about `place` into an OSError with a `strerror` and a `filename`."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(place)) from error
    except Exception as error:
        text = reason(error)
        if text is None:
            raise
        raise OSError(errno.EIO, text, str(place)) from error


def reason(error: BaseException) -> str | None:
    """One line for what object storage refused; None for an exception that is none of its."""
    module = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and module not in FOREIGN:
        return None
    if getattr(error, "code", None) == 401 or "Anonymous caller" in str(error):
        return LOGIN
    return " ".join(str(error).split())[:300] or type(error).__name__


def entries(folder: pathlib.Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what is in `folder`, by name. In a bucket, one listing.

    Raises FileNotFoundError where `folder` doesn't exist.
    """
    if not in_bucket(folder):
        with os.scandir(folder) as found:
            return sorted((entry.name, entry.is_dir()) for entry in found)
    return [(name, entry["type"] == "directory") for name, entry in _listed(folder).items()]


def _listed(folder: pathlib.Path) -> dict[str, dict]:
    """What a bucket says of each object and folder in `folder`, by name, sorted."""
    with reasons(folder):
        found = store().ls(str(folder), detail=True)
    # An empty object "FOLDER/", which the cloud's console makes, is listed as the folder itself.
    itself = str(folder).removeprefix(SCHEME).rstrip("/")
    named = [(entry["name"].rstrip("/"), entry) for entry in found]
    return {
        name.rpartition("/")[2]: entry
        for name, entry in sorted(named, key=lambda pair: pair[0])
        if name != itself
    }


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """The bytes of each file in `folder`. In a bucket, one listing."""
    if in_bucket(folder):
        found = _listed(folder).items()
        return {name: entry["size"] for name, entry in found if entry["type"] == "file"}
    with os.scandir(folder) as scanned:
        return {entry.name: entry.stat().st_size for entry in scanned if entry.is_file()}


def versions(folder: pathlib.Path) -> dict[str, Any]:
    """Of each file in `folder`, what changes whenever it is written. In a bucket, one listing."""
    if in_bucket(folder):
        return {name: entry.get("generation") for name, entry in _listed(folder).items()}
    with os.scandir(folder) as scanned:
        return {e.name: (e.stat().st_mtime_ns, e.inode()) for e in scanned if e.is_file()}


def move_folder(folder: pathlib.Path, place: pathlib.Path) -> None:
    """Give a folder another name on the same disk or in the same bucket. Raises OSError.

    In a bucket each object is copied before any is deleted: what interrupts it loses nothing.
    """
    if not in_bucket(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, place)
        return
    with reasons(folder):
        store().copy(str(folder), str(place), recursive=True)
        store().rm(str(folder), recursive=True)


def write(place: pathlib.Path, data: bytes, ending: str = ".partial") -> None:
    """Write a whole file, or leave the old one. Raises OSError.

    On disk it has another name, with `ending`, until it is whole; an object appears when it is.
    """
    if in_bucket(place):
        place.write_bytes(data)
        return
    with whole(place, ending) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def whole(place: pathlib.Path, ending: str = ".partial") -> Iterator[pathlib.Path]:
    """A path on disk to write to, which gets the name `place` if nothing is raised."""
    temporary = place.with_name(place.name + ending)
    try:
        yield temporary
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def local(place: pathlib.Path) -> pathlib.Path:
    """`place`, or where this machine keeps what belongs to it but can't be in a bucket.

    That is below XDG_CACHE_HOME, or ~/.cache: Weights & Biases' files until they are synced, what
    has been logged but not uploaded, and copies of ArrayRecord files.
    """
    if not in_bucket(place):
        return place
    return cache("gs", *str(place).removeprefix(SCHEME).split("/"))


def cache(*parts: str) -> pathlib.Path:
    """A place below XDG_CACHE_HOME/vit_scale, or ~/.cache/vit_scale."""
    top = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return top.joinpath("vit_scale", *parts)


class Appended:
    """A file that grows: append to `file`, then `save` it to `place`.

    On disk they are the same. Of an object, what was appended since the last `save` is lost with
    the machine; a `save` that changes nothing costs nothing.
    """

    def __init__(self, place: pathlib.Path):
        self.place, self.file = place, local(place)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._saved = -1  # bytes

    def save(self) -> None:
        """Upload the whole file, if it has grown. Raises OSError."""
        if not in_bucket(self.place) or (size := self.file.stat().st_size) == self._saved:
            return
        _upload(self.file, self.place)
        self._saved = size

    def finish(self) -> None:
        """Save it for the last time. Raises OSError."""
        self.save()
        if in_bucket(self.place):
            self.file.unlink()


def move(file: pathlib.Path, place: pathlib.Path) -> None:
    """Give a local file, whole, its name on the same disk or in a bucket. Raises OSError."""
    if in_bucket(place):
        _upload(file, place)
        file.unlink()
    else:
        os.replace(file, place)


def _upload(file: pathlib.Path, place: pathlib.Path) -> None:
    """Copy to a bucket, in parts where the file is large; the object appears when it is whole."""
    with reasons(place):
        store().put_file(str(file), str(place))


def stage(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Files on disk with the content of `files`, all of one folder: themselves, or local copies.

    An object is copied once for each of its generations, so a copy is never of an older content.
    Raises UserError where the disk hasn't the room for them.
    """
    if not files or not in_bucket(files[0]):
        return list(files)
    folder = local(files[0].parent)
    listed = _listed(files[0].parent)
    copies = {file: folder / f"{file.name}.{listed[file.name]['generation']}" for file in files}
    missing = [file for file, copy in copies.items() if not copy.is_file()]
    needed = sum(listed[file.name]["size"] for file in missing)
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise UserError(
                f"{files[0].parent}: {needed / 2**30:.1f} GiB have to be copied to {folder}, where "
                f"{free / 2**30:.1f} GiB are free; make room, or set XDG_CACHE_HOME to another disk"
            )
        logging.getLogger(__name__).warning(
            "copying %d files, %.1f GiB, of %s to %s, to be read there from now on",
            *(len(missing), needed / 2**30, files[0].parent, folder),
        )
        _copy({file: copies[file] for file in missing}, needed)
    return list(copies.values())


def _copy(copies: dict[pathlib.Path, pathlib.Path], total: int) -> None:
    def fetch(pair: tuple[pathlib.Path, pathlib.Path]) -> int:
        file, copy = pair
        # A name of its own: another process of this machine may be copying the same file.
        temporary = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}.partial")
        try:
            with reasons(file):
                store().get_file(str(file), str(temporary))
            os.replace(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
        return copy.stat().st_size

    with (
        tqdm(total=total, desc="copy", unit="B", unit_scale=True, disable=None) as bar,
        concurrent.futures.ThreadPoolExecutor(STREAMS) as pool,
    ):
        for size in pool.map(fetch, copies.items()):
            bar.update(size)

"""Write, append to and move files so that a reader sees a whole file or the previous one.

On disk a file is written under a temporary name and renamed; an object appears in its bucket when
its upload is complete. All functions raise OSError.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from vit_scale.storage.bucket import file_system
from vit_scale.storage.cache import local
from vit_scale.storage.errors import os_errors
from vit_scale.storage.paths import in_bucket


def write(path: pathlib.Path, data: bytes, suffix: str = ".partial") -> None:
    """Write a whole file or leave the previous one; `suffix` is the temporary name's, on disk."""
    if in_bucket(path):
        path.write_bytes(data)
        return
    with atomic(path, suffix) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic(path: pathlib.Path, suffix: str = ".partial") -> Iterator[pathlib.Path]:
    """Yield a temporary path on disk that is renamed to `path`, or removed if the body raises."""
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class AppendedFile:
    """A growing file: append to `local`, then `save` it to `path`.

    On disk the two are one file. An object is uploaded whole at each `save`, so what was appended
    after the last one is lost with the machine; a `save` without changes sends nothing.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.local = path, local(path)
        self.local.parent.mkdir(parents=True, exist_ok=True)
        self._saved = -1  # bytes

    def save(self) -> None:
        if not in_bucket(self.path) or (size := self.local.stat().st_size) == self._saved:
            return
        _upload(self.local, self.path)
        self._saved = size

    def finish(self) -> None:
        """Save for the last time, and remove the local copy of an object."""
        self.save()
        if in_bucket(self.path):
            self.local.unlink()


def move(file: pathlib.Path, path: pathlib.Path) -> None:
    """Move a complete local file to `path`, on the same disk or in a bucket."""
    if in_bucket(path):
        _upload(file, path)
        file.unlink()
    else:
        os.replace(file, path)


def move_folder(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Move a folder to `path`, on the same disk or in the same bucket.

    In a bucket all objects are copied before any is deleted, so an interruption loses nothing.
    """
    if not in_bucket(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, path)
        return
    with os_errors(folder):
        file_system().copy(str(folder), str(path), recursive=True)
        file_system().rm(str(folder), recursive=True)


def remove_folder(folder: pathlib.Path) -> None:
    """Remove a folder, on disk or in a bucket, and what is in it; do nothing if there is none."""
    if not in_bucket(folder):
        shutil.rmtree(folder, ignore_errors=not folder.exists())
        return
    if folder.exists():
        with os_errors(folder):
            file_system().rm(str(folder), recursive=True)


def _upload(file: pathlib.Path, path: pathlib.Path) -> None:
    """Upload a file, in parts if it is large; the object appears when the last one has arrived."""
    with os_errors(path):
        file_system().put_file(str(file), str(path))

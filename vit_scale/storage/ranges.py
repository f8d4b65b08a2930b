"""Read ranges of files in any order, on disk or in a bucket through the cache."""

import pathlib
from collections.abc import Sequence

from vit_scale.errors import RESUMABLE, UserError
from vit_scale.storage import paths
from vit_scale.storage.range_cache import RangeCache

CHANGED = (
    "it was replaced or removed after this command opened it: run it again to read the new one"
)
UNREACHABLE = "check the network, and rerun the same command to resume"


class RangeReader:
    """The ranges of `files`, which are all in one folder.

    An object is read in the generation that it has now, so that all parts are of one version. What
    was read of it is kept in up to `gib` GiB of this machine's disk, shared by all processes; with
    0, each range is one request each time.
    """

    def __init__(self, files: Sequence[pathlib.Path], gib: float):
        self.files = list(files)
        self._remote = bool(files) and paths.in_bucket(files[0])
        self._versions = paths.versions(files[0].parent) if self._remote else {}
        self._cache = RangeCache(gib) if self._remote and gib > 0 else None

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` of file `number`, fewer at its end.

        Raises OSError for a file on disk. For an object, whose storage has checked it, raises
        UserError: it is the network that failed, or another object.
        """
        file = self.files[number]
        if not self._remote:
            return paths.read_range(file, offset, length)
        generation = self._versions.get(file.name)
        key = f"{file}#{generation}"
        if self._cache and (cached := self._cache.get(key, offset, length)) is not None:
            return cached
        try:
            data = paths.read_range(file, offset, length, generation)
        except FileNotFoundError as error:
            raise UserError(f"cannot read {file}: {CHANGED}") from error
        except OSError as error:
            raise UserError(
                f"cannot read {file}: {error.strerror}; {UNREACHABLE}", RESUMABLE
            ) from error
        if self._cache and len(data) == length:
            self._cache.put(key, offset, data)
        return data

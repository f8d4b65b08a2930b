"""A cache, on this machine's disk, of the parts of objects that were read.

An object has one sparse file: a range is stored at its own offset, and then described, with a
checksum, in a second region of that file. So there is no index to keep in memory or to agree on:
processes write without locks, the same bytes to the same place, and a range that is incomplete,
because its process was killed or the machine failed, has no description or another checksum, and
is fetched and stored again.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterator

from vit_scale.storage import cache

GIB = 2**30
RANGE = struct.Struct("<QQI4x")  # offset in the object, length, CRC-32 of the bytes
RANGES = 2**40  # position of the descriptions: objects are smaller than 1 TiB
SPACING = 64  # bytes of an object that share a description: ranges start farther apart
BLOCKS = 8192  # bytes of the disk's blocks that a range takes beside its own
SPARE = 2 * GIB  # bytes of the disk that are left free, for checkpoints and logs
IN_USE = 3600.0  # seconds after its last use for which a file is not removed
NOTED = 600.0  # seconds between notes of a file's use
PAUSE = 60.0  # seconds without writing after the cache was full or failed
SHARE, LARGEST = 256, 2**26  # a process measures the cache after writing this fraction of its
# size, or so many bytes if they are fewer


class RangeCache:
    """Ranges of objects, in up to `gib` GiB below the cache's folder. Safe for threads.

    The size is kept to within 1/256, at most 64 MiB, for each process that writes. When it is
    reached, objects that nobody read for an hour are removed, the oldest first. Those in use stay,
    and what does not fit is not cached: in an order that is shuffled anew each epoch, removing one
    range for another gains nothing. A disk that fails or is full ends the caching for a minute,
    never the reading.
    """

    def __init__(self, gib: float):
        self._gib, self._size = gib, gib * GIB
        self._folder = cache.folder("ranges")
        self._lock = threading.Lock()
        self._room = 0.0  # bytes to write before the cache is measured again
        self._resumes = 0.0  # when writing is tried again, on the monotonic clock
        self._noted: dict[str, float] = {}  # when the use of an object was last noted
        self._warned = False

    def __reduce__(self) -> tuple:
        """Send another process the size alone: it measures the cache for itself."""
        return RangeCache, (self._gib,)

    def get(self, key: str, offset: int, length: int) -> bytes | None:
        """Return a range of the object `key`, or None if it is not cached."""
        try:
            with open(self._file(key), "rb", buffering=0) as file:
                stored = os.pread(file.fileno(), RANGE.size, _description(offset))
                if len(stored) < RANGE.size or RANGE.unpack(stored)[:2] != (offset, length):
                    return None
                data = os.pread(file.fileno(), length, offset)
                self._note_use(key, file.fileno())
        except OSError:
            return None
        return data if stored == _describe(offset, data) else None

    def put(self, key: str, offset: int, data: bytes) -> None:
        """Store a range of the object `key`, if there is room."""
        try:
            if self._take_room(len(data) + BLOCKS):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._write(self._file(key), offset, data)
        except OSError as error:
            self._pause(error)

    def _file(self, key: str) -> pathlib.Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def _note_use(self, key: str, file: int) -> None:
        now = time.time()
        if now - self._noted.get(key, 0) > NOTED:
            self._noted[key] = now
            with contextlib.suppress(OSError):  # another user's
                os.utime(file)

    @staticmethod
    def _write(path: pathlib.Path, offset: int, data: bytes) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            description = _describe(offset, data)
            for position, content in ((offset, data), (_description(offset), description)):
                if (written := os.pwrite(file, content, position)) != len(content):
                    raise OSError(f"{written} of {len(content)} bytes were written to {path}")
        finally:
            os.close(file)

    def _take_room(self, needed: int) -> bool:
        """Return whether `needed` bytes may be written, after removing old objects if necessary."""
        with self._lock:
            if time.monotonic() < self._resumes:
                return False
            if self._room < needed:
                room = self._make_room(needed)
                self._room = min(room, max(min(self._size / SHARE, LARGEST), needed))
            if self._room < needed:
                self._resumes = time.monotonic() + PAUSE
                return False
            self._room -= needed
            return True

    def _make_room(self, needed: int) -> float:
        """Return the bytes that the cache and the disk have left, at least `needed` if possible."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files = sorted(_files(self._folder), key=lambda file: file[1])
        free = shutil.disk_usage(self._folder).free - SPARE
        room = min(self._size - sum(size for _, _, size in files), free)
        for path, used, size in files:
            if room >= needed or time.time() - used < IN_USE:
                break
            path.unlink(missing_ok=True)
            room += size
        return room

    def _pause(self, error: OSError) -> None:
        with self._lock:
            self._resumes, known = time.monotonic() + PAUSE, self._warned
            self._warned = True
        if not known:
            logging.getLogger(__name__).warning(
                "cannot cache in %s what is read from the bucket: %s; the run continues without: "
                "free space, or set XDG_CACHE_HOME to another disk",
                *(self._folder, error.strerror or error),
            )


def _description(offset: int) -> int:
    """Return the position of the description of the range that starts at `offset`."""
    return RANGES + offset // SPACING * RANGE.size


def _describe(offset: int, data: bytes) -> bytes:
    return RANGE.pack(offset, len(data), zlib.crc32(data))


def _files(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, float, int]]:
    """Yield (path, time of its last use, bytes on the disk) of each cached object."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                status = entry.stat()
                yield pathlib.Path(entry.path), status.st_mtime, status.st_blocks * 512

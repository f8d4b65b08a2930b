"""Read single records of ArrayRecord shards in a bucket, each as one range of bytes.

ArrayRecord's own reader needs local files. Its format is Riegeli's: a file is a sequence of chunks,
interrupted by a header of 24 bytes at each multiple of 64 KiB. `vit-scale data pack` writes a chunk
per record, uncompressed. After the last record follow a footer, the chunk that has their offsets,
and in the last 64 KiB the footer's own offset. So the end of a shard is read once, and after that a
record is the bytes from its offset to the next one. See doc/riegeli_records_file_format.md in
google/riegeli and cpp/layout.proto in google/array_record.

What is checked is that offsets and sizes agree. The checksums of the chunks are not: HighwayHash
takes longer in Python than decoding the image does, the storage and the connection to it have
checksums of their own, and the cache on this machine adds another.
"""

import concurrent.futures
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vit_scale.data.decode import Corrupt
from vit_scale.errors import UserError
from vit_scale.storage import paths
from vit_scale.storage.ranges import RangeReader

BLOCK, BLOCK_HEADER = 2**16, 24
CHUNK = struct.Struct("<8xQ8xQQ")  # size of the data, type and number of records, decoded size
SIGNATURE = 64  # bytes of the block header and the chunk with which every file begins
RECORDS = ord("r")  # type of a chunk of records
MAGIC = 0x71930E704FDAE05E  # of the last chunk
ENTRY = (8, 0, 16, 0, 24, 1)  # a record in the footer: keys of Protocol Buffers, each with a value
ENTRY_FIXED = [0, 2, 4, 5]  # all but the chunk's offset and size: keys, and one record in it
LONGEST = 9  # bytes of an integer of 63 bits
TAIL = 3 * BLOCK  # bytes from the end that hold the offsets of some 5,000 records
REQUESTS = 32  # shards whose end is read at the same time
AGAIN = "copy it again, or pack the set again with `vit-scale data pack`"


class RecordRanges:
    """The records of shards, which are all in one folder."""

    def __init__(self, shards: list[Path], gib: float):
        """Read where the records are; `gib` is the size of the cache. Raises UserError."""
        sizes = paths.sizes(shards[0].parent)
        self._reader = RangeReader(shards, gib)
        with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
            offsets = pool.map(self._offsets, range(len(shards)), [sizes[s.name] for s in shards])
            self._shards = list(offsets)

    def count(self, shard: int) -> int:
        return len(self._shards[shard]) - 1

    def read(self, shard: int, position: int) -> bytes:
        """Return one record. Raises Corrupt, and UserError if storage fails."""
        if not 0 <= position < self.count(shard):
            raise Corrupt(f"the shard has {self.count(shard)} records")
        start, end = self._shards[shard][position : position + 2].tolist()
        try:
            sizes, values = _chunk(self._reader.read(shard, start, end - start), start)
        except ValueError as error:
            raise Corrupt(f"no record at bytes {start} to {end}: {error}") from error
        if len(sizes) != 1:
            raise Corrupt(f"{len(sizes)} records at bytes {start} to {end}")
        return bytes(values)

    def _offsets(self, shard: int, size: int) -> Int[np.ndarray, "n+1"]:
        """Return the offset of each record of a shard, and of the end of the last one."""
        try:
            return _read_offsets(lambda at, n: self._reader.read(shard, at, n), size)
        except ValueError as error:
            raise UserError(
                f"{self._reader.files[shard]} ({size} bytes): {error}; {AGAIN}"
            ) from error


def _read_offsets(read: Callable[[int, int], bytes], size: int) -> Int[np.ndarray, "n+1"]:
    """Return the offset of each record, and of the footer. Raises ValueError."""
    if size < 2 * BLOCK or size % BLOCK:
        raise ValueError(f"not a complete ArrayRecord file, which has a multiple of {BLOCK} bytes")
    start = max(0, size - TAIL)
    tail = read(start, size - start)
    footer = _footer_offset(tail[-BLOCK:], size)
    if footer < start:
        start, tail = footer, read(footer, size - BLOCK - footer)
    (metadata, *sizes), values = _chunk(tail[footer - start : size - BLOCK - start], footer)
    entries = _varints(values[metadata:])
    if len(entries) != len(sizes) * len(ENTRY) or (entries[:: len(ENTRY)] != ENTRY[0]).any():
        raise ValueError("its footer is damaged")
    entries = entries.reshape(len(sizes), len(ENTRY))
    if (entries[:, ENTRY_FIXED] != np.array(ENTRY)[ENTRY_FIXED]).any():
        raise ValueError("it has several records in a chunk, unlike those that are packed here")
    offsets = np.append(entries[:, 1], footer)
    if (offsets[:1] < SIGNATURE).any() or (np.diff(offsets) < CHUNK.size).any():
        raise ValueError("its footer is damaged: the records' offsets do not increase")
    return offsets


def _footer_offset(block: bytes, size: int) -> int:
    """Return what the last block says of the footer's offset. Raises ValueError."""
    try:
        sizes, values = _chunk(block, size - BLOCK)  # the same three times
        key, offset, other, magic = _varints(values[: sizes[0]])
        known = (key, other, magic) == (8, 16, MAGIC) and SIGNATURE <= offset < size - BLOCK
    except (ValueError, IndexError):
        known = False
    if not known:
        raise ValueError("not an ArrayRecord file, or truncated")
    return int(offset)


def _chunk(data: bytes, offset: int) -> tuple[np.ndarray, memoryview]:
    """Return the records in a chunk, which is at `offset` in its file: their sizes, and the bytes.

    Raises ValueError.
    """
    chunk = memoryview(_without_block_headers(data, offset))
    if len(chunk) < CHUNK.size:
        raise ValueError(f"{len(data)} bytes, fewer than a chunk's header")
    size, kind, decoded = CHUNK.unpack_from(chunk)
    kind, count = kind % 256, kind // 256
    content = chunk[CHUNK.size : CHUNK.size + size]
    if kind != RECORDS or len(content) != size or size < 2:
        raise ValueError(f"a chunk of type {kind} with {len(content)} of {size} bytes")
    if content[0]:
        raise ValueError("it is compressed, unlike those that are packed here")
    end = next((at for at, byte in enumerate(content[1:11], 2) if byte < 128), 0)
    (n,) = _varints(content[1:end])
    sizes, values = _varints(content[end : end + n]), content[end + n :]
    if len(sizes) != count or not sizes.sum() == decoded == len(values):
        raise ValueError(f"{count} records of {decoded} bytes do not fit in {size}")
    return sizes, values


def _without_block_headers(data: bytes, offset: int) -> bytes:
    """Return the bytes from `offset` of a file without the headers that interrupt them."""
    first = -offset % BLOCK
    starts = range(first, len(data), BLOCK)
    return data[:first] + b"".join(data[at + BLOCK_HEADER : at + BLOCK] for at in starts)


def _varints(data: bytes | memoryview) -> Int[np.ndarray, "n"]:
    """Decode integers of 7 bits a byte, low bits first, whose last byte is below 128.

    Raises ValueError.
    """
    parts = np.frombuffer(data, np.uint8).astype(np.int64)
    lasts = np.flatnonzero(parts < 128)
    starts = np.append(0, lasts[:-1] + 1)
    lengths = lasts + 1 - starts[: len(lasts)]
    if not len(parts):
        return parts
    if not len(lasts) or lasts[-1] != len(parts) - 1 or lengths.max() > LONGEST:
        raise ValueError("its integers are damaged")
    shifts = 7 * (np.arange(len(parts)) - np.repeat(starts, lengths))
    return np.add.reduceat((parts & 127) << shifts, starts)

"""Write the shards of a packed set in several processes, each shard completely or not at all."""

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int
from tqdm import tqdm

from vit_scale.data.decode import Corrupt, shrink, verify
from vit_scale.data.encoded_images import EncodedImages, Part
from vit_scale.data.record_ranges import RecordRanges
from vit_scale.data.workers import parallel_map
from vit_scale.errors import UserError
from vit_scale.storage import cache, files, paths
from vit_scale.storage.errors import one_line, user_errors

LABEL = struct.Struct("<I")
WRITE = "group_size:1,uncompressed"  # random access to images, which are compressed already
READ = "readahead_buffer_size:0,max_parallelism:0"  # as ArrayRecord advises for random access


@dataclass(frozen=True)
class Shard:
    """A shard to write: its file, and its images."""

    file: Path
    images: EncodedImages | Part
    positions: Int[np.ndarray, "images"]  # of these images in their split
    skip: bool  # leave out unreadable images
    shorter_side: int = 0  # shrink larger images to this; 0: store all as they are
    quality: int = 95  # of the JPEGs that shrunk images become


def _count(shard: Shard) -> int:
    """Count the images in a finished shard; in a bucket, where no part of it can be missing."""
    if not paths.in_bucket(shard.file):
        return ArrayRecordReader(str(shard.file), READ).num_records()
    return RecordRanges([shard.file], 0).count(0) if shard.skip else len(shard.images)


def write_shards(shards: list[Shard], workers: int | None) -> dict[Path, np.ndarray]:
    """Write the shards that do not exist; return which of its images each holds.

    A shard that lacks images is written again, as it does not record which. The first failure
    cancels the rest.
    """
    existing, packed, missing = paths.sizes(shards[0].file.parent), {}, []
    for shard in shards:
        n = len(shard.images)
        if shard.file.name in existing and _count(shard) == n:
            packed[shard.file] = np.arange(n)
        else:
            missing.append(shard)
    total = sum(len(shard.images) for shard in shards)
    done = total - sum(len(shard.images) for shard in missing)
    with tqdm(total=total, initial=done, desc="pack", unit="image", disable=None) as bar:
        for shard, positions in parallel_map(write_shard, missing, workers):
            packed[shard.file] = positions
            bar.update(len(shard.images))
    return packed


def write_shard(shard: Shard) -> Int[np.ndarray, "images"]:
    """Write one shard; return which of its images it holds. Raises UserError."""
    local, packed = cache.local(shard.file), []
    temporary = local.with_name(f".{shard.file.name}.partial")
    try:
        with write_errors(shard.file):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            writer = ArrayRecordWriter(str(temporary), WRITE)
            for index in range(len(shard.images)):
                if record := _record(shard, index):
                    writer.write(record)
                    packed.append(index)
            writer.close()
            files.move(temporary, shard.file)
    finally:
        temporary.unlink(missing_ok=True)
    return np.array(packed, np.int64)


def write_errors(file: Path) -> contextlib.AbstractContextManager[None]:
    return user_errors(
        f"cannot write {file}",
        "free space or choose another folder, and rerun the same command to resume",
        also=(RuntimeError,),  # ArrayRecord's
    )


def _record(shard: Shard, index: int) -> bytes | None:
    """Return the record of one image, or None for an unreadable one that is to be skipped."""
    advice = "replace it, or skip such images with --on-corrupt skip"
    try:
        data, label = shard.images.encoded(index)
        if shard.shorter_side:
            data = shrink(data, shard.shorter_side, shard.quality)
        else:
            verify(data)
    except Corrupt as error:
        if shard.skip:
            return None
        file = shard.images.location(index)
        raise UserError(f"cannot read {file}: {one_line(error)}; {advice}") from error
    if shard.images.targets:
        return LABEL.pack(0) + np.asarray(label, "<f4").tobytes() + data
    return LABEL.pack(int(label)) + data

"""The shards of a packed set: each is written whole, by one of several processes, or not at all."""

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int
from tqdm import tqdm

from vit_scale.data.decode import Corrupt, verify
from vit_scale.data.image_folder import Listing
from vit_scale.data.workers import run_all
from vit_scale.errors import UserError
from vit_scale.storage import cache, files, paths
from vit_scale.storage.errors import user_errors

LABEL = struct.Struct("<I")
WRITE = "group_size:1,uncompressed"  # each image can be read alone; JPEG is compressed already
READ = "readahead_buffer_size:0,max_parallelism:0"  # the reader's own advice for random access


@dataclass(frozen=True)
class Shard:
    """What one process packs: these images of a listing, into this file."""

    file: Path
    listing: Listing
    skip: bool


def _count(shard: Shard) -> int:
    """The images in a finished shard. One in a bucket is only read where it may lack some."""
    if paths.in_bucket(shard.file) and not shard.skip:
        return len(shard.listing.labels)
    (file,) = cache.stage([shard.file])
    return ArrayRecordReader(str(file), READ).num_records()


def write_shards(shards: list[Shard], workers: int | None) -> dict[Path, np.ndarray]:
    """Write those that aren't there yet; what of its listing each holds.

    One that lacks images is written again: which they are is not in it. The first failure stops the
    rest.
    """
    there, kept, missing = paths.sizes(shards[0].file.parent), {}, []
    for shard in shards:
        n = len(shard.listing.labels)
        if shard.file.name in there and _count(shard) == n:
            kept[shard.file] = np.arange(n)
        else:
            missing.append(shard)
    total = sum(len(shard.listing.labels) for shard in shards)
    done = total - sum(len(shard.listing.labels) for shard in missing)
    with tqdm(total=total, initial=done, desc="pack", unit="image", disable=None) as bar:
        for shard, positions in run_all(write_shard, missing, workers):
            kept[shard.file] = positions
            bar.update(len(shard.listing.labels))
    return kept


def write_shard(shard: Shard) -> Int[np.ndarray, "images"]:
    """Write one shard, whole or, with a UserError, not; the positions in its listing it holds."""
    local, kept = cache.local(shard.file), []
    temporary = local.with_name(f".{shard.file.name}.partial")
    try:
        with write_errors(shard.file):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            writer = ArrayRecordWriter(str(temporary), WRITE)
            for index, label in enumerate(shard.listing.labels.tolist()):
                data = _verified(shard, index)
                if data is not None:
                    writer.write(LABEL.pack(label) + data)
                    kept.append(index)
            writer.close()
            files.move(temporary, shard.file)
    finally:
        temporary.unlink(missing_ok=True)
    return np.array(kept, np.int64)


def write_errors(file: Path) -> contextlib.AbstractContextManager[None]:
    return user_errors(
        f"cannot write {file}",
        "free space or choose another folder, and rerun the same command to resume",
        also=(RuntimeError,),  # ArrayRecord's
    )


def _verified(shard: Shard, index: int) -> bytes | None:
    """The bytes of one image, or none for an unreadable one that is to be skipped."""
    file = shard.listing.path(index)
    advice = "replace it, or skip such images with --on-corrupt skip"
    try:
        with user_errors(f"cannot read {file}", advice, also=(Corrupt,)):
            data = file.read_bytes()
            verify(data)
            return data
    except UserError:
        if shard.skip:
            return None
        raise

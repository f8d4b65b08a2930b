"""Local files that stand for objects: copies of them, and files that are still being written.

They are below XDG_CACHE_HOME/vit_scale, or ~/.cache/vit_scale, and so is the range_cache.
"""

import concurrent.futures
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Sequence

from tqdm import tqdm

from vit_scale.errors import UserError
from vit_scale.storage.bucket import SCHEME, file_system, listing
from vit_scale.storage.errors import os_errors
from vit_scale.storage.paths import in_bucket

STREAMS = 8  # files that `stage` copies at the same time


def folder(*parts: str) -> pathlib.Path:
    """Return a path in the cache. Nothing is created.

    Raises UserError where a part, such as one of an address, would lead out of it.
    """
    if outside := [part for part in parts if part in (".", "..") or "/" in part]:
        raise UserError(f"{'/'.join(parts)} can't be cached: {outside[0]} leads to another folder")
    top = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return top.joinpath("vit_scale", *parts)


def local(path: pathlib.Path) -> pathlib.Path:
    """Return `path`, or the path in the cache that stands for an object.

    There are Weights & Biases' files until they are synced, logs until they are uploaded, and
    copies of whole files, such as Parquet.
    """
    if not in_bucket(path):
        return path
    return folder("gs", *str(path).removeprefix(SCHEME).split("/"))


def stage(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Return local paths with the content of `files`, which are all in one folder.

    Files on disk are returned as they are; an object is copied once per generation, so a copy is
    never out of date. Raises UserError if the disk has too little space.
    """
    if not files or not in_bucket(files[0]):
        return list(files)
    parent = files[0].parent
    target, objects = local(parent), listing(parent)
    copies = {file: target / f"{file.name}.{objects[file.name]['generation']}" for file in files}
    missing = [file for file, copy in copies.items() if not copy.is_file()]
    needed = sum(objects[file.name]["size"] for file in missing)
    if missing:
        target.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target).free) < needed:
            raise UserError(
                f"not enough disk space to copy {parent} to {target}: {needed / 2**30:.1f} GiB "
                f"needed, {free / 2**30:.1f} GiB free; free some, or set XDG_CACHE_HOME to another "
                "disk"
            )
        logging.getLogger(__name__).warning(
            "copying %d files (%.1f GiB) from %s to %s, where they are read from now on",
            *(len(missing), needed / 2**30, parent, target),
        )
        _copy({file: copies[file] for file in missing}, needed)
    return list(copies.values())


def _copy(copies: dict[pathlib.Path, pathlib.Path], total: int) -> None:
    def fetch(pair: tuple[pathlib.Path, pathlib.Path]) -> int:
        file, copy = pair
        # A unique name: another process of this machine may be copying the same file.
        temporary = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}.partial")
        try:
            with os_errors(file):
                file_system().get_file(str(file), str(temporary))
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

"""Where weights are, and how they come here: on disk, from a bucket, or from an https:// server.

A download is resumed where it broke off, compared with the checksum that the server or the address
gives (https://.../B_16.npz#sha256=HEX), and kept in the cache under its address.
"""

import os
import pathlib
import urllib.parse
import uuid

from vit_scale.errors import UserError
from vit_scale.pretrained import weight_files
from vit_scale.storage import cache, download, files, paths

BESIDE = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
)  # may tell what the arrays don't
WEB = ("https://", "http://")


def weights(source: str | os.PathLike) -> pathlib.Path | None:
    """The local file or folder of weights that `source` names; None where it names none.

    Raises UserError for what can't be fetched.
    """
    if str(source).startswith(WEB):
        return _from_web(str(source))
    place = paths.parse(source)
    if place.is_file():
        return _from_bucket(place) if paths.in_bucket(place) else place
    held = [place / name for name in weight_files.NAMES if (place / name).is_file()]
    if not held or (place / "run.json").is_file():
        return None
    return _from_bucket(held[0]) if paths.in_bucket(place) else place


def _from_bucket(place: pathlib.Path) -> pathlib.Path:
    """A folder with copies of an object and of what stands beside it, under their own names."""
    beside = [place.with_name(n) for n in (*BESIDE, f"{place.stem}.json")]
    if place.name.endswith(weight_files.INDEX):
        beside += [place.with_name(name) for name in weight_files.shards(place)]
    there = [place, *(file for file in beside if file.is_file())]
    copies = cache.stage(there)
    folder = copies[0].with_name(f"{copies[0].name}.model")
    folder.mkdir(exist_ok=True)
    for file, copy in zip(there, copies, strict=True):
        with files.atomic(folder / file.name, f".{uuid.uuid4().hex}") as link:
            link.symlink_to(copy)
    return folder / place.name


def _from_web(address: str) -> pathlib.Path:
    """The file at an address, in the cache; beside it, what stands beside it on the server."""
    url, _, checksum = address.partition("#")
    parts = urllib.parse.urlsplit(url)
    name = pathlib.PurePosixPath(parts.path).name
    if not name.endswith((*weight_files.ENDINGS, weight_files.INDEX)):
        raise UserError(
            f"{url} names no file of weights ({', '.join(weight_files.ENDINGS)}); of a folder, "
            f"give its {weight_files.MODEL}"
        )
    place = cache.folder("weights", parts.netloc, *parts.path.strip("/").split("/"))
    download.fetch(url, place, checksum)
    if name.endswith(weight_files.INDEX):
        for shard in weight_files.shards(place):
            download.fetch(url.removesuffix(name) + shard, place.with_name(shard), "")
    if name.endswith((".safetensors", ".bin", weight_files.INDEX)):
        for beside in BESIDE:
            download.fetch_optional(url.removesuffix(name) + beside, place.with_name(beside))
    return place

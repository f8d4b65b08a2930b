"""Fetch weights to the local disk: from a bucket, an HTTP server, or the Hugging Face Hub.

An interrupted download resumes. It is verified against the checksum in the address
(https://.../B_16.npz#sha256=HEX), which http:// must have, or from the server, and cached by its
address.
"""

import hashlib
import os
import pathlib
import urllib.parse
import uuid

from vit_scale.errors import UserError
from vit_scale.pretrained import hub, weight_files
from vit_scale.storage import cache, download, files, paths
from vit_scale.storage.download import Unreachable

WEB = ("https://", "http://")


def fetch_weights(source: str | os.PathLike) -> pathlib.Path | None:
    """The local weight file or model folder of `source`; None if `source` is a run or nothing.

    Files in a bucket, on a server or on the Hub are copied here first, with the metadata beside
    them. Raises UserError if that fails.
    """
    if hub.is_address(source):
        return hub.fetch(str(source))
    if str(source).startswith(WEB):
        return _download(str(source))
    path = paths.parse(source)
    if path.is_file():
        return _copy_from_bucket(path) if paths.in_bucket(path) else path
    candidates = [path / name for name in weight_files.FILE_NAMES if (path / name).is_file()]
    if not candidates or (path / "run.json").is_file():
        return None
    return _copy_from_bucket(candidates[0]) if paths.in_bucket(path) else path


def _copy_from_bucket(file: pathlib.Path) -> pathlib.Path:
    """Copy an object and those beside it to one local folder, under their own names."""
    beside = [file.with_name(name) for name in (*weight_files.METADATA_FILES, f"{file.stem}.json")]
    if file.name.endswith(weight_files.INDEX_SUFFIX):
        beside += [file.with_name(name) for name in weight_files.shard_names(file)]
    objects = [file, *(other for other in beside if other.is_file())]
    copies = cache.stage(objects)
    folder = copies[0].with_name(f"{copies[0].name}.model")
    folder.mkdir(exist_ok=True)
    for source, copy in zip(objects, copies, strict=True):
        with files.atomic(folder / source.name, f".{uuid.uuid4().hex}") as link:
            link.symlink_to(copy)
    return folder / file.name


def _download(address: str) -> pathlib.Path:
    """Download a file and the metadata beside it to the cache."""
    url, _, checksum = address.partition("#")
    parts = urllib.parse.urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if {".", ".."} & set(urllib.parse.unquote(parts.path).replace("\\", "/").split("/")):
        raise UserError(f"{url} has a . or .. in its path: give the address that it stands for")
    if not name.endswith((*weight_files.SUFFIXES, weight_files.INDEX_SUFFIX)):
        raise UserError(
            f"{url} is not a weight file ({', '.join(weight_files.SUFFIXES)}); for a folder, give "
            f"the address of its {weight_files.SAFETENSORS}"
        )
    host = parts.netloc.rpartition("@")[2]  # without a password
    query = [hashlib.sha256(parts.query.encode()).hexdigest()[:16]] if parts.query else []
    file = cache.folder("weights", host, *parts.path.strip("/").split("/")[:-1], *query, name)

    def beside(other: str) -> str:
        return parts._replace(path=f"{folder}/{other}").geturl()

    cached = file.exists()
    download.fetch(url, file, checksum)
    if name.endswith(weight_files.INDEX_SUFFIX):
        for shard in weight_files.shard_names(file):
            download.fetch(beside(shard), file.with_name(shard))
    # A checksum covers one file: by http:// nothing else is taken.
    for other in () if url.startswith(download.UNENCRYPTED) else _metadata_names(name):
        try:
            download.fetch_optional(beside(other), file.with_name(other))
        except Unreachable:  # what is cached needs no network
            if not cached:
                raise
    return file


def _metadata_names(name: str) -> tuple[str, ...]:
    """Return the names of the files that may be beside a file of weights."""
    if name.endswith(".npz"):  # an export of this project
        return (name.removesuffix(".npz") + ".json",)
    if name.endswith((".safetensors", ".bin", weight_files.INDEX_SUFFIX)):
        return weight_files.METADATA_FILES
    return ()

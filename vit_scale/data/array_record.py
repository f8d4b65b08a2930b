"""Packed image sets: ArrayRecord shards of the original files' bytes, and `pack`, which makes them.

A folder of a million files is slow to list, to copy and to read from a network disk; a few hundred
shards are not. `pack` shuffles once, so that a shard is a fair sample, and writes a shard under a
temporary name until it is whole: interrupted, the same command resumes. A record is its label,
4 bytes little-endian, and the bytes of the file. SPLIT-examples.npz says which file each record
was, and `index.json` what a finished set holds.

ArrayRecord reads and writes local files only. Shards in a bucket are copied to this machine once
(`cache.stage`), and `pack` uploads each shard when it is whole.
"""

import functools
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict

from vit_scale.data.class_names import readable
from vit_scale.data.decode import CHOICES, Corrupt, EncodedImages
from vit_scale.data.example_ids import Examples
from vit_scale.data.image_folder import FOLDERS, Listing, list_images
from vit_scale.data.shards import LABEL, READ, Shard, write_errors, write_shards
from vit_scale.errors import UserError, nearest
from vit_scale.storage import cache, files, paths
from vit_scale.storage.errors import DAMAGED, one_line, user_errors

VERSION = 2  # of the layout of a packed set; 1 had no names of images
INDEX = "index.json"
SHARD = 2048  # images in each, 230 MB of ImageNet
ORDER = 20201022  # decides the shuffled order, so that every pack of a folder is the same


class Records(EncodedImages):
    """The images of one split of a packed set."""

    def __init__(self, name: str, folder: Path, index: dict, cfg: ConfigDict):
        super().__init__(f"{folder.name} {name}", index["classes"], cfg)
        shards = index["splits"][name]
        self._shards = [folder / shard["file"] for shard in shards]
        self._first = np.cumsum([0] + [shard["images"] for shard in shards])
        self._readers: dict[int, ArrayRecordReader] = {}
        found = paths.sizes(folder)
        for file, shard in zip(self._shards, shards, strict=True):
            _check_size(file, found.get(file.name), shard["bytes"])
        self._files = cache.stage(self._shards)
        self._names: Path | None = None
        if listed := index.get("examples", {}).get(name):
            self._names = folder / listed["file"]
            _check_size(self._names, found.get(self._names.name), listed["bytes"])

    def __len__(self) -> int:
        return int(self._first[-1])

    @functools.cached_property
    def examples(self) -> Examples | None:  # type: ignore[override]
        return _read_examples(self._names, len(self)) if self._names else None

    def __getstate__(self) -> dict:
        """An open file does not travel to a worker, and names need not."""
        return {k: v for k, v in self.__dict__.items() if k != "examples"} | {"_readers": {}}

    def encoded(self, index: int) -> tuple[bytes, int]:
        shard, position = self._locate(index)
        try:
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(str(self._files[shard]), READ)
            (record,) = self._readers[shard].read([position])
            (label,) = LABEL.unpack_from(record)
        except Exception as error:  # Riegeli's status codes arrive as several exceptions
            raise Corrupt(one_line(error)) from error
        if label >= len(self.classes):
            raise UserError(
                f"{self.place(index)}: label {label} is outside the {len(self.classes)} classes "
                f"0..{len(self.classes) - 1} of its {INDEX}; pack the set again"
            )
        return record[LABEL.size :], label

    def place(self, index: int) -> str:
        shard, position = self._locate(index)
        return f"{self._shards[shard]} (record {position})"

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])


def source(cfg: ConfigDict, name: str) -> Records:
    """The split `name` (train, val, validation, test) of the packed set at cfg.path.

    Without a labelled test set `test` is the validation set. Raises UserError for a set that is
    missing or unfinished, and for a shard that is missing or truncated.
    """
    folder = paths.parse(cfg.path)
    index = _read_index(folder)
    if index is None or not index["finished"]:
        state = "is no packed set" if index is None else "is not packed to its end"
        raise UserError(f"{folder} {state}; run `vit-scale data pack FOLDER {folder}`")
    for candidate in FOLDERS[name]:
        if candidate in index["splits"]:
            return Records(candidate, folder, index, cfg)
    raise UserError(f"{folder} has no split {name!r}; it has {', '.join(index['splits'])}")


def _read_index(folder: Path) -> dict | None:
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_text())
        version = index["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no index of a packed set ({error!r}); pack it again") from error
    if version not in (1, VERSION):
        raise UserError(
            f"{file} is version {version}, this program reads 1 and {VERSION}; pack it again"
        )
    return index


def _read_examples(file: Path, n: int) -> Examples:
    with (
        user_errors(f"cannot read {file}", "pack the set again", also=DAMAGED),
        np.load(io.BytesIO(file.read_bytes())) as stored,
    ):
        examples = Examples(stored["files"], stored["labels"])
    if not len(examples.files) == len(examples.labels) == n:
        raise UserError(f"{file} names {len(examples.files)} of {n} images; pack the set again")
    return examples


def _check_size(file: Path, found: int | None, size: int) -> None:
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes of {size}"
        raise UserError(f"{file} {state}; copy it again, or pack the set again into a new folder")


def pack(
    folder: str | Path,
    out: str | Path,
    workers: int | None = None,
    on_corrupt: str = "fail",
    shard: int = SHARD,
) -> dict[str, int]:
    """Pack an image folder (see `folder.py`) into ArrayRecord shards of `shard` images in `out`.

    Every image is decoded once: an unreadable one raises UserError with its name, or, with
    on_corrupt="skip", is left out. Finished shards are kept, so an interrupted pack goes on.
    `workers`: processes; none: one a core. Returns the number of images packed of each split, and
    of those left out as `skipped`. Raises UserError if `out` holds another set.
    """
    if on_corrupt not in CHOICES:
        raise UserError(f"on_corrupt={on_corrupt!r} is unknown; {nearest(on_corrupt, CHOICES)}")
    folder, out = paths.parse(folder), paths.parse(out)
    listings = _listings(folder)
    index = {
        "version": VERSION,
        "of": _fingerprint(listings, shard, on_corrupt),
        "classes": readable(folder, listings["train"].classes),
    }
    _claim(out, index)
    plan = {
        name: _shards(out, name, listing, shard, on_corrupt == "skip")
        for name, listing in listings.items()
    }
    kept = write_shards([s for shards in plan.values() for s in shards], workers)
    names = {name: _write_examples(out, name, shards, kept) for name, shards in plan.items()}
    stored = paths.sizes(out)
    splits = {
        name: [
            {"file": s.file.name, "images": len(kept[s.file]), "bytes": stored[s.file.name]}
            for s in shards
        ]
        for name, shards in plan.items()
    }
    examples = {name: {"file": file, "bytes": stored[file]} for name, file in names.items()}
    _write_index(out, index | {"finished": True, "splits": splits, "examples": examples})
    counts = {name: sum(len(kept[s.file]) for s in shards) for name, shards in plan.items()}
    found = sum(len(listing.labels) for listing in listings.values())
    return counts | {"skipped": found - sum(counts.values())}


def _listings(folder: Path) -> dict[str, Listing]:
    """The labelled splits there are; `train` has to be one."""
    listings = {"train": list_images(folder, "train")}
    for name in ("val", "test"):
        if not any((folder / candidate).is_dir() for candidate in FOLDERS[name]):
            continue
        listing = list_images(folder, name)
        if all(listing.root != other.root for other in listings.values()):
            listings[name] = listing
    return listings


def _shards(out: Path, name: str, listing: Listing, images: int, skip: bool) -> list[Shard]:
    order = np.random.RandomState(ORDER).permutation(len(listing.labels))
    parts = np.split(order, range(images, len(order), images))
    return [
        Shard(
            out / f"{name}-{number:05d}-of-{len(parts):05d}.array_record",
            Listing(listing.root, listing.files[part], listing.labels[part], listing.classes),
            skip,
        )
        for number, part in enumerate(parts)
    ]


def _fingerprint(listings: dict[str, Listing], shard: int, on_corrupt: str) -> str:
    digest = hashlib.sha256(repr((shard, on_corrupt, listings["train"].classes)).encode())
    for name, listing in listings.items():
        digest.update(name.encode() + b"\n".join(listing.files.tolist()) + listing.labels.tobytes())
    return digest.hexdigest()


def _claim(out: Path, index: dict) -> None:
    """Mark `out` as the pack of this folder, or refuse: shards of two sets must never mix."""
    there = _read_index(out)
    if there is None and not any(out.glob("*.array_record")):
        out.mkdir(parents=True, exist_ok=True)
        _write_index(out, index | {"finished": False, "splits": {}})
        return
    earlier = there is not None and there["version"] < VERSION
    if there is None or there["of"] != index["of"]:
        why = ", or was begun by an earlier version, which listed other files" if earlier else ""
        raise UserError(
            f"{out} holds the shards of other images or options{why}; pack into a new folder"
        )
    if earlier and there["finished"]:  # with names, its slices would be others: of runs as well
        raise UserError(
            f"{out} was packed by an earlier version, without the names of its images, and is read "
            "as it is; to have them, pack into a new folder"
        )


def _write_index(out: Path, index: dict) -> None:
    files.write(out / INDEX, json.dumps(index, indent=1).encode())


def _write_examples(out: Path, name: str, shards: list[Shard], kept: dict[Path, np.ndarray]) -> str:
    """Write which image each record of a split is; the name of the file."""
    content, file = io.BytesIO(), out / f"{name}-examples.npz"
    names = np.concatenate([shard.listing.files[kept[shard.file]] for shard in shards])
    labels = np.concatenate([shard.listing.labels[kept[shard.file]] for shard in shards])
    np.savez_compressed(content, files=names, labels=labels)
    with write_errors(file):
        files.write(file, content.getvalue())
    return file.name

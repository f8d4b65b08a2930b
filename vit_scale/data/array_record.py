"""Packed image sets: ArrayRecord shards of the original files, read by `source`, made by `pack`.

A folder of a million files is slow to list, to copy, and to read from a network disk; a few hundred
shards are not. `pack` shuffles once, so that each shard is a random sample, and gives a shard its
name when it is complete, so that rerunning an interrupted command resumes. A record is the label,
4 bytes little-endian, then the file's bytes. SPLIT-examples.npz has the records' file names, and
`index.json` the contents of a finished set.

Shards in a bucket are read by ranges, a record each, through a cache (record_ranges.py); `pack`
uploads each when it is complete.
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
from vit_scale.data.decode import Corrupt
from vit_scale.data.encoded_images import CHOICES, EncodedImages
from vit_scale.data.example_ids import Examples
from vit_scale.data.image_folder import FOLDERS, Listing, list_images
from vit_scale.data.record_ranges import RecordRanges
from vit_scale.data.shards import LABEL, READ, Shard, write_errors, write_shards
from vit_scale.errors import UserError, nearest
from vit_scale.storage import files, paths
from vit_scale.storage.errors import DAMAGED, one_line, user_errors

VERSION = 2  # of a packed set's layout; 1 had no file names
INDEX = "index.json"
SHARD = 2048  # images per shard, 230 MB of ImageNet
QUALITY = 95  # of images that are reduced
ORDER = 20201022  # seed of the shuffled order: all packs of a folder are the same


class Records(EncodedImages):
    """The images of one split of a packed set."""

    def __init__(self, name: str, folder: Path, index: dict, cfg: ConfigDict):
        super().__init__(f"{folder.name} {name}", index["classes"], cfg)
        shards = index["splits"][name]
        self._shards = [folder / shard["file"] for shard in shards]
        self._first = np.cumsum([0] + [shard["images"] for shard in shards])
        self._readers: dict[int, ArrayRecordReader] = {}
        sizes = paths.sizes(folder)
        for file, shard in zip(self._shards, shards, strict=True):
            _check_size(file, sizes.get(file.name), shard["bytes"])
        self._ranges = RecordRanges(self._shards, cfg.cache) if paths.in_bucket(folder) else None
        for number, shard in enumerate(shards):
            if self._ranges and (n := self._ranges.count(number)) != shard["images"]:
                raise UserError(
                    f"{self._shards[number]} has {n} records, and {INDEX} says {shard['images']}; "
                    "copy it again, or pack the set again into a new folder"
                )
        self._names: Path | None = None
        if listed := index.get("examples", {}).get(name):
            self._names = folder / listed["file"]
            _check_size(self._names, sizes.get(self._names.name), listed["bytes"])

    def __len__(self) -> int:
        return int(self._first[-1])

    @functools.cached_property
    def examples(self) -> Examples | None:  # type: ignore[override]
        return _read_examples(self._names, len(self)) if self._names else None

    def __getstate__(self) -> dict:
        """Leave out what a worker cannot receive (open files) or does not need (names)."""
        return {k: v for k, v in self.__dict__.items() if k != "examples"} | {"_readers": {}}

    def encoded(self, index: int) -> tuple[bytes, int]:
        shard, position = self._locate(index)
        try:
            record = self._read(shard, position)
            (label,) = LABEL.unpack_from(record)
        except (Corrupt, UserError):
            raise
        except Exception as error:  # Riegeli raises several types
            raise Corrupt(one_line(error)) from error
        if label >= len(self.classes):
            raise UserError(
                f"{self.location(index)}: label {label} is outside the {len(self.classes)} classes "
                f"0..{len(self.classes) - 1} of its {INDEX}; pack the set again"
            )
        return record[LABEL.size :], label

    def _read(self, shard: int, position: int) -> bytes:
        if self._ranges:
            return self._ranges.read(shard, position)
        if shard not in self._readers:
            self._readers[shard] = ArrayRecordReader(str(self._shards[shard]), READ)
        (record,) = self._readers[shard].read([position])
        return record

    def location(self, index: int) -> str:
        shard, position = self._locate(index)
        return f"{self._shards[shard]} (record {position})"

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])


def source(cfg: ConfigDict, name: str) -> Records:
    """Open the split `name` (train, val, validation, test) of the packed set at cfg.path.

    Without a labelled test set, `test` is the validation set. Raises UserError for a set that is
    missing or unfinished, and for a shard that is missing or truncated.
    """
    folder = paths.parse(cfg.path)
    index = _read_index(folder)
    if index is None or not index["finished"]:
        state = "is not a packed set" if index is None else "is not packed completely"
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
        raise UserError(
            f"{file} is not the index of a packed set ({error!r}); pack the set again"
        ) from error
    if version not in (1, VERSION):
        raise UserError(
            f"{file} has version {version}, not 1 or {VERSION}; pack the set again, or upgrade"
        )
    return index


def _read_examples(file: Path, n: int) -> Examples:
    with (
        user_errors(f"cannot read {file}", "pack the set again", also=DAMAGED),
        np.load(io.BytesIO(file.read_bytes())) as stored,
    ):
        examples = Examples(stored["files"], stored["labels"])
    if not len(examples.files) == len(examples.labels) == n:
        raise UserError(
            f"{file} has {len(examples.files)} names for {n} images; pack the set again"
        )
    return examples


def _check_size(file: Path, actual: int | None, size: int) -> None:
    if actual != size:
        state = "is missing" if actual is None else f"has {actual} bytes of {size}"
        raise UserError(f"{file} {state}; copy it again, or pack the set again into a new folder")


def pack(
    folder: str | Path,
    out: str | Path,
    workers: int | None = None,
    on_corrupt: str = "fail",
    shard: int = SHARD,
    shorter_side: int = 0,
    quality: int = QUALITY,
) -> dict[str, int]:
    """Pack an image folder (image_folder.py) into ArrayRecord shards of `shard` images in `out`.

    Every image is decoded once, to find corrupt ones. Finished shards are not written again, so
    rerunning an interrupted pack resumes it.

    Args:
      folder: the image folder.
      out: the folder of the packed set.
      workers: number of processes; None: one per core.
      on_corrupt: "fail" raises UserError for an unreadable image, "skip" leaves it out.
      shard: images per shard.
      shorter_side: pixels to which the shorter side of larger images is reduced; 0: store the files
        byte for byte.
      quality: of the JPEGs that reduced images become, 1 to 100.

    Returns:
      The number of packed images of each split, and of skipped ones as "skipped".

    Raises:
      UserError: an unreadable image, a failed write, or another set in `out`.
    """
    if on_corrupt not in CHOICES:
        raise UserError(f"on_corrupt={on_corrupt!r} is unknown; {nearest(on_corrupt, CHOICES)}")
    if shorter_side < 0 or not 1 <= quality <= 100:
        raise UserError(
            f"--shorter-side {shorter_side} must be at least 0, and --quality {quality} 1 to 100"
        )
    folder, out = paths.parse(folder), paths.parse(out)
    listings = _listings(folder)
    reduced = (shorter_side, quality) if shorter_side else ()
    index = {
        "version": VERSION,
        "of": _fingerprint(listings, shard, on_corrupt, *reduced),
        "classes": readable(folder, listings["train"].classes),
    }
    _claim(out, index)
    plan = {
        name: _shards(out, name, listing, shard, on_corrupt == "skip", *reduced)
        for name, listing in listings.items()
    }
    packed = write_shards([s for shards in plan.values() for s in shards], workers)
    _finish(out, index, plan, packed)
    counts = {name: sum(len(packed[s.file]) for s in shards) for name, shards in plan.items()}
    total = sum(len(listing.labels) for listing in listings.values())
    return counts | {"skipped": total - sum(counts.values())}


def _finish(
    out: Path, index: dict, plan: dict[str, list[Shard]], packed: dict[Path, np.ndarray]
) -> None:
    """Write the names of the images, and the index of a complete set."""
    names = {name: _write_examples(out, name, shards, packed) for name, shards in plan.items()}
    stored = paths.sizes(out)
    splits = {
        name: [
            {"file": s.file.name, "images": len(packed[s.file]), "bytes": stored[s.file.name]}
            for s in shards
        ]
        for name, shards in plan.items()
    }
    examples = {name: {"file": file, "bytes": stored[file]} for name, file in names.items()}
    _write_index(out, index | {"finished": True, "splits": splits, "examples": examples})


def _listings(folder: Path) -> dict[str, Listing]:
    """List the labelled splits of an image folder, of which `train` must be one."""
    listings = {"train": list_images(folder, "train")}
    for name in ("val", "test"):
        if not any((folder / candidate).is_dir() for candidate in FOLDERS[name]):
            continue
        listing = list_images(folder, name)
        if all(listing.root != other.root for other in listings.values()):
            listings[name] = listing
    return listings


def _shards(
    out: Path, name: str, listing: Listing, images: int, skip: bool, *reduced: int
) -> list[Shard]:
    order = np.random.RandomState(ORDER).permutation(len(listing.labels))
    parts = np.split(order, range(images, len(order), images))
    return [
        Shard(
            out / f"{name}-{number:05d}-of-{len(parts):05d}.array_record",
            Listing(listing.root, listing.files[part], listing.labels[part], listing.classes),
            skip,
            *reduced,
        )
        for number, part in enumerate(parts)
    ]


def _fingerprint(listings: dict[str, Listing], shard: int, on_corrupt: str, *reduced: int) -> str:
    options = (shard, on_corrupt, listings["train"].classes, *reduced)
    digest = hashlib.sha256(repr(options).encode())
    for name, listing in listings.items():
        digest.update(name.encode() + b"\n".join(listing.files.tolist()) + listing.labels.tobytes())
    return digest.hexdigest()


def _claim(out: Path, index: dict) -> None:
    """Mark `out` as the pack of this folder, or raise UserError if it is another set's."""
    existing = _read_index(out)
    if existing is None and not any(out.glob("*.array_record")):
        out.mkdir(parents=True, exist_ok=True)
        _write_index(out, index | {"finished": False, "splits": {}})
        return
    earlier = existing is not None and existing["version"] < VERSION
    if existing is None or existing["of"] != index["of"]:
        why = ", or was begun by an earlier version, which listed other files" if earlier else ""
        raise UserError(f"{out} has shards of other images or options{why}; pack into a new folder")
    if earlier and existing["finished"]:  # names would change the slices of existing runs
        raise UserError(
            f"{out} was packed by an earlier version, without image names, and can be used as it "
            "is; to add the names, pack into a new folder"
        )


def _write_index(out: Path, index: dict) -> None:
    files.write(out / INDEX, json.dumps(index, indent=1).encode())


def _write_examples(
    out: Path, name: str, shards: list[Shard], packed: dict[Path, np.ndarray]
) -> str:
    """Write the file name and label of each record of a split; return the name of the file."""
    content, file = io.BytesIO(), out / f"{name}-examples.npz"
    names = np.concatenate([shard.listing.files[packed[shard.file]] for shard in shards])
    labels = np.concatenate([shard.listing.labels[packed[shard.file]] for shard in shards])
    np.savez_compressed(content, files=names, labels=labels)
    with write_errors(file):
        files.write(file, content.getvalue())
    return file.name

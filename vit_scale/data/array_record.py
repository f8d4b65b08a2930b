"""Packed image sets: ArrayRecord shards of the original files, made by packing.py.

A folder of a million files is slow to list, to copy, and to read from a network disk; a few hundred
shards are not. A record is the label, 4 bytes little-endian, then the file's bytes. Of a
set with targets (targets.py) the label is 0, and its float32 vector is before the file.
SPLIT-examples.npz has the records' file names, and `index.json` the contents of a finished set.
Shards in a bucket are read by ranges, a record each, through a cache (record_ranges.py).
"""

import functools
import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int
from ml_collections import ConfigDict

from vit_scale.data.decode import Corrupt
from vit_scale.data.encoded_images import EncodedImages, Label
from vit_scale.data.example_ids import Examples
from vit_scale.data.image_files import check_readable
from vit_scale.data.image_folder import FOLDERS
from vit_scale.data.record_ranges import RecordRanges
from vit_scale.data.shards import LABEL, READ
from vit_scale.data.sources import MissingSplit
from vit_scale.data.targets import CLASS, CLASSES, Rows, Targets
from vit_scale.errors import UserError
from vit_scale.storage import paths
from vit_scale.storage.errors import DAMAGED, one_line, user_errors

VERSION = 2  # of a packed set's layout; 1 had no file names
TARGETS = 3  # of one whose records have a target between the label and the file
INDEX = "index.json"


class Records(EncodedImages):
    """The images of one split of a packed set."""

    def __init__(self, name: str, folder: Path, index: dict, cfg: ConfigDict):
        super().__init__(f"{folder.name} {name}", index["classes"], cfg)
        if (target := index.get("target", CLASS)) != cfg.target:
            raise UserError(
                f"{folder} was packed with data.target={target}, not {cfg.target}: set "
                f"--config.data.target={target}, or pack the set again"
            )
        self.targets = len(self.classes) if target != CLASS else 0
        self._several = target == CLASSES
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

    @functools.cached_property
    def _targets(self) -> Targets | None:
        """The vectors in the list of names; None of a pack without one, or older than they are."""
        rows = _read_target_rows(self._names) if self.targets and self._names else None
        return Targets(rows, self.targets, self._several) if rows else None

    def labels(self, indices: Int[np.ndarray, "m"]) -> np.ndarray:
        return self._targets.vectors(indices) if self._targets else super().labels(indices)

    def __getstate__(self) -> dict:
        state = super().__getstate__() | {"_readers": {}}  # open files cannot be sent
        return {name: value for name, value in state.items() if name != "_targets"}

    def encoded(self, index: int) -> tuple[bytes, Label]:
        shard, position = self._locate(index)
        try:
            record = self._read(shard, position)
            (label,) = LABEL.unpack_from(record)
        except (Corrupt, UserError):
            raise
        except Exception as error:  # Riegeli raises several types
            check_readable(self._shards[shard])
            raise Corrupt(one_line(error)) from error
        if self.targets:
            end = LABEL.size + 4 * self.targets
            return record[end:], np.frombuffer(record[LABEL.size : end], "<f4")
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
    index = read_index(folder)
    if index is None or not index["finished"]:
        state = "is not a packed set" if index is None else "is not packed completely"
        raise UserError(f"{folder} {state}; run `vit-scale data pack FOLDER {folder}`")
    for candidate in FOLDERS[name]:
        if candidate in index["splits"]:
            return Records(candidate, folder, index, cfg)
    raise MissingSplit(f"{folder} has no split {name!r}; it has {', '.join(index['splits'])}")


def read_index(folder: Path) -> dict | None:
    """Return the index of a packed set, finished or not; None without one. Raises UserError."""
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
    if version not in (1, VERSION, TARGETS):
        raise UserError(
            f"{file} has version {version}, not 1 to {TARGETS}; pack the set again, or upgrade"
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


def _read_target_rows(file: Path) -> Rows | None:
    with (
        user_errors(f"cannot read {file}", "pack the set again", also=DAMAGED),
        np.load(io.BytesIO(file.read_bytes())) as stored,
    ):
        if "target_flat" not in stored:
            return None
        return Rows(stored["target_flat"], stored["target_ends"])


def _check_size(file: Path, actual: int | None, size: int) -> None:
    if actual != size:
        state = "is missing" if actual is None else f"has {actual} bytes of {size}"
        raise UserError(f"{file} {state}; copy it again, or pack the set again into a new folder")

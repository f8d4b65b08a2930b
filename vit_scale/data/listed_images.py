"""Image files whose labels are in a listing: DIR/train.csv or DIR/train.json, of each split.

A CSV file has a header, `file,NAME,NAME,...`, and a row for each image: the file, relative to DIR,
and a number in each column. With data.target=classes the columns are the classes and hold 1 where
the image has the class, else 0; with data.target=value they are what the model is to predict. The
same names, in any order, are the columns of every split.

A JSON file is one object. With data.target=classes it is {"FILE": ["cat", "dog"], ...}, where the
classes are the sorted names that the training listing has, and with data.target=value it is
{"FILE": 1.5, ...} or {"FILE": [1.5, 2], ...}.
"""

import collections
import copy
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from vit_scale.data.encoded_images import EncodedImages, Label
from vit_scale.data.image_files import read_image_file
from vit_scale.data.image_folder import FOLDERS
from vit_scale.data.sources import MissingSplit
from vit_scale.data.targets import CLASSES, Rows, Targets, class_names, make_targets, rows_of
from vit_scale.errors import UserError, printable
from vit_scale.storage import paths
from vit_scale.storage.errors import DAMAGED, user_errors

SUFFIXES = (".csv", ".json")
FILE = "file"  # the first column of a CSV file
MERGE = "remove one, or merge their labels"
CSV_FORM = f"a CSV listing begins with the header {FILE},NAME,NAME,..."


class Listing(NamedTuple):
    """The files of a split, as bytes relative to the listing's folder, and their labels."""

    path: Path
    files: np.ndarray
    rows: Rows
    names: tuple[str, ...] | None  # of a CSV file's columns

    def location(self, index: int) -> str:
        return f"{self.path} ({os.fsdecode(self.files[index])})"


class ListedImages(EncodedImages):
    """A source of the images of a listing."""

    def __init__(self, name: str, listing: Listing, classes: Sequence[str], cfg: ConfigDict):
        super().__init__(name, classes, cfg)
        self._folder, self._files = listing.path.parent, listing.files
        self._set_labels(make_targets(listing.rows, cfg.target, self.classes, listing.location))
        self.examples = self._identified(listing.files)

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> tuple[bytes, Label]:
        return read_image_file(self._path(index)), self._label_of(index)

    def part(self, positions: Int[np.ndarray, "n"]) -> "ListedImages":
        part, labels = copy.copy(self), self._labels
        assert isinstance(labels, Targets)
        part._files, part._labels = self._files[positions], labels.part(positions)
        return part

    def location(self, index: int) -> str:
        return str(self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / os.fsdecode(self._files[index])


def source(cfg: ConfigDict, name: str) -> ListedImages:
    """Open the split `name` (train, val, validation, test) that is listed in the folder cfg.path.

    Without a listing of the test set, `test` is the validation set. Raises UserError for a listing
    that is missing, damaged, or has a class or a column that the training set lacks.
    """
    folder = paths.parse(cfg.path)
    file = _find(folder, FOLDERS[name])
    if file is None:
        wanted = " or ".join(f"{split}{suffix}" for split in FOLDERS[name] for suffix in SUFFIXES)
        raise MissingSplit(
            f"{folder} has no listing of split {name!r}: data.target={cfg.target} needs {wanted}"
        )
    listing, train_file = _read(file, cfg.target), _find(folder, FOLDERS["train"])
    is_train = train_file in (None, file)
    train = listing if is_train or train_file is None else _read(train_file, cfg.target)
    names = class_names(train.rows, cfg.target) if train.names is None else train.names
    if listing.names is not None and listing.names != names:
        listing = listing._replace(rows=_reordered(listing, names, cfg.target))
    title = f"{folder.resolve().name} {file.stem}"
    return ListedImages(printable(title), listing, names, cfg)


def _find(folder: Path, splits: Sequence[str]) -> Path | None:
    """Return the listing of the first of `splits` that has one. Raises UserError for two of one."""
    for split in splits:
        files = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
        existing = [file for file in files if file.is_file()]
        if len(existing) > 1:
            raise UserError(f"{folder} has both {split}.csv and {split}.json; remove one")
        if existing:
            return existing[0]
    return None


def _read(path: Path, kind: str) -> Listing:
    with user_errors(f"cannot read {path}", "repair the file", also=DAMAGED):
        text = path.read_bytes().decode("utf-8-sig")
    listing = (_read_csv if path.suffix == ".csv" else _read_json)(path, text, kind)
    if not len(listing.files):
        raise UserError(f"{path} lists no image")
    if len(set(listing.files.tolist())) < len(listing.files):
        files, counts = np.unique(listing.files, return_counts=True)
        twice = os.fsdecode(files[counts > 1][0])
        raise UserError(f"{path} lists {twice} twice; {MERGE}")
    return listing


def _rows_of(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:  # such as a quote that nothing closes
        raise UserError(f"{path}: line {reader.line_num}: {error}; repair the file") from error


def _read_csv(path: Path, text: str, kind: str) -> Listing:
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip() for name in next(reader, [])]
    names = tuple(header[1:])
    if header[:1] != [FILE] or not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{path}: {CSV_FORM}, of different names, not {','.join(header)[:60]!r}")
    files, values = [], []
    for cells in _rows_of(reader, path):
        if not cells:
            continue
        where = f"{path}: line {reader.line_num}"
        if len(cells) != len(header):
            raise UserError(f"{where} has {len(cells)} cells, and the header {len(header)}")
        files.append(os.fsencode(cells[0].strip()))
        values.append([_number(cell, where) for cell in cells[1:]])
    table = np.array(values, np.float64).reshape(len(values), len(names))
    return Listing(path, np.array(files), _as_rows(path, table, kind), names)


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise UserError(f"{where}: {cell!r} is not a number; {CSV_FORM}") from None


def _as_rows(path: Path, table: np.ndarray, kind: str) -> Rows:
    """Return a table's numbers as rows, or with kind=classes the columns that hold a 1."""
    if kind != CLASSES:
        return Rows(table.ravel(), np.arange(1, len(table) + 1) * table.shape[1])
    if (wrong := np.argwhere((table != 0) & (table != 1))).size:
        row, column = wrong[0]
        raise UserError(
            f"{path}: image {row + 1} has {table[row, column]:g} in column {column + 2}; with "
            "data.target=classes every column of a class holds 0 or 1"
        )
    return Rows(np.nonzero(table)[1], np.cumsum(table.sum(1)).astype(np.int64))


def _read_json(path: Path, text: str, kind: str) -> Listing:
    form = '{"FILE": ["CLASS", ...], ...}' if kind == CLASSES else '{"FILE": NUMBER, ...}'
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); repair it") from error
    items = content if isinstance(content, dict) else {}
    if not items or (kind == CLASSES and not all(isinstance(v, list) for v in items.values())):
        raise UserError(f"{path} is not a listing for data.target={kind}: {form}")
    files = [*items]
    rows = rows_of([*items.values()], lambda index: f"{path} ({files[index]})")
    if kind == CLASSES and rows.flat.size and rows.flat.dtype.kind not in "US":
        raise UserError(f"{path} has numbers for classes; a listing has names: {form}")
    return Listing(path, np.array([os.fsencode(file) for file in files]), rows, None)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"{path} lists {twice} twice; {MERGE}")
    return content


def _reordered(listing: Listing, names: Sequence[str], kind: str) -> Rows:
    """Return the rows of a CSV listing by the training set's columns `names`. Raises UserError."""
    own = listing.names or ()
    if different := sorted(set(own) ^ set(names)):
        raise UserError(
            f"{listing.path} and the training listing have different columns ({different[0]!r}); "
            "give both the same"
        )
    if kind == CLASSES:
        numbers = np.array([names.index(name) for name in own])
        return listing.rows._replace(flat=numbers[listing.rows.flat])
    order = [own.index(name) for name in names]
    table = listing.rows.flat.reshape(-1, len(names))[:, order]
    return listing.rows._replace(flat=table.ravel())

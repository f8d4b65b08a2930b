"""Sets that Hugging Face's `datasets` reads: Parquet files, saved sets, names on its hub.

`datasets` converts Parquet files once to Arrow files in its cache, which are mapped into memory, so
that an example is read without its row group. The image column and the label column are found by
type, the classes' names in the file. Images stay encoded until they are cropped.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_scale.data.columns import choose_column, labelled_split
from vit_scale.data.decode import Corrupt
from vit_scale.data.encoded_images import EncodedImages, Label
from vit_scale.data.example_ids import Examples
from vit_scale.data.image_files import read_image_file
from vit_scale.data.image_folder import FOLDERS
from vit_scale.data.patterns import SPLIT, find_files
from vit_scale.data.targets import CLASS, CLASSES, VALUE, Rows, class_names, make_targets, rows_of
from vit_scale.errors import UserError
from vit_scale.storage import cache
from vit_scale.storage.errors import one_line

MOST_CLASSES = 100_000  # of numbered labels in fewer rows; more are taken for ids

INSTALL = "launch/environment.sh hf in a clone, or pip install datasets"
PARQUET = ".parquet"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SAVED = ("dataset_dict.json", "dataset_info.json")  # of Dataset.save_to_disk


class HuggingFace(EncodedImages):
    """The images of one split of a `datasets.Dataset`, which has an image and a label column."""

    def __init__(
        self,
        name: str,
        rows: Any,
        image: str,
        labels: np.ndarray | Rows,
        classes: Sequence[str],
        cfg: ConfigDict,
    ):
        super().__init__(name, classes, cfg)
        self._rows, self._image = rows, image
        self._set_labels(
            make_targets(labels, cfg.target, self.classes, self.location)
            if isinstance(labels, Rows)
            else labels
        )

    def __len__(self) -> int:
        return len(self._labels)

    @functools.cached_property
    def examples(self) -> Examples | None:  # type: ignore[override]
        """The examples' identity: the images' paths, if each has one of its own."""
        column = self._rows.data.column(self._image)
        if not hasattr(column.type, "get_field_index") or column.type.get_field_index("path") < 0:
            return None
        names: list = []  # chunk by chunk, as a whole column would hold all images
        for chunk in column.chunks:
            names += chunk.field("path").to_pylist()
        if None in names or len(set(names)) != len(names):
            return None
        return self._identified(np.array([os.fsencode(name) for name in names]))

    def encoded(self, index: int) -> tuple[bytes, Label]:
        value: Any = self._rows[index][self._image]
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
            if value is None and path:  # the table names a file
                try:
                    value = read_image_file(Path(path))
                except Corrupt as error:
                    raise Corrupt(f"{path}: {error}") from error
        if not value:
            raise Corrupt("it has no bytes")
        return value, self._label_of(index)

    def location(self, index: int) -> str:
        return f"row {index} of {self.name}"


def source(cfg: ConfigDict, name: str) -> HuggingFace:
    """Open the split `name` (train, val, validation, test) of the set at cfg.path.

    The path is a folder of Parquet files, a pattern such as DIR/{split}-*.parquet, a folder that
    `save_to_disk` wrote, or the name of a set on the hub, NAME or NAME@REVISION. Without a test
    set, `test` is the validation set. Raises UserError for a set that cannot be read, and where it
    is not clear which column holds the images or the labels.
    """
    datasets = _datasets()
    with _errors(cfg.path):
        splits = _splits(datasets, os.path.expanduser(cfg.path))
        split = labelled_split(cfg, name, splits, lambda one: _has_labels(splits[one], cfg))
        rows, train = splits[split], splits.get("train", splits[split])
    image, label = _image_column(rows, cfg), _label_column(rows, cfg)
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    labels: np.ndarray | Rows
    if cfg.target == CLASS:
        labels, classes = _labels(rows, train, label)
    else:
        labels, classes = _targets(rows, train, label, cfg.target)
    return HuggingFace(
        f"{cfg.path} {split}", rows.select_columns([image]), image, labels, classes, cfg
    )


def pinned(path: str) -> str:
    """Return the name of a set on the hub as NAME@REVISION, and any other path as it is.

    The set may change there, and a run goes on with what it began with. Raises UserError for a set
    that cannot be found.
    """
    if not HUB_NAME.fullmatch(path) or os.path.exists(path):
        return path
    with _errors(path):
        revision = _datasets().load_dataset_builder(path).hash or ""
    return f"{path}@{revision}" if COMMIT.fullmatch(revision) else path


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data.name=huggingface needs the package datasets: {INSTALL}") from error
    return datasets


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # datasets and pyarrow raise any type
        raise UserError(
            f"cannot open {path} with Hugging Face's datasets: {one_line(error)}; correct "
            "data.path, a folder, a pattern, or a name on the hub, which needs a network"
        ) from error


def _splits(datasets: Any, path: str) -> dict[str, Any]:
    """Open the splits of a set by `datasets`."""
    candidates = dict.fromkeys(split for names in FOLDERS.values() for split in names)
    pattern = SPLIT in path or path.endswith(PARQUET)
    if pattern or "://" in path or os.path.isdir(path):
        named = {split: find_files(path, split, PARQUET) for split in candidates}
        files = {
            split: list(map(str, cache.stage(named[split]))) for split in named if named[split]
        }
        if files:
            return datasets.load_dataset("parquet", data_files=files)
        if pattern:
            raise UserError(f"no Parquet file matches data.path={path}; correct the pattern")
    if any(os.path.exists(os.path.join(path, name)) for name in SAVED):
        saved = datasets.load_from_disk(path)
        return saved if isinstance(saved, dict) else {"train": saved}
    hub_name, _, revision = (path, "", "") if os.path.exists(path) else path.partition("@")
    return datasets.load_dataset(hub_name, revision=revision or None)


def _is_class(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _item(feature: Any) -> Any:
    """Return the type of the items of a column of lists, else None."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _dtype(feature: Any) -> str:
    return getattr(feature, "dtype", "")


# Tests of a column's type, the surest first.
IMAGE_TYPES = (
    lambda feature: type(feature).__name__ == "Image",
    lambda feature: isinstance(feature, dict) and "bytes" in feature,
    lambda feature: _dtype(feature) in ("binary", "large_binary"),
)
LABEL_TYPES = {  # by data.target
    CLASS: (
        _is_class,
        lambda feature: _dtype(feature).startswith(("int", "uint")),
        lambda feature: _dtype(feature) in ("string", "large_string"),
    ),
    CLASSES: (
        lambda feature: _is_class(_item(feature)),
        lambda feature: _item(feature) is not None,
    ),
    VALUE: (
        lambda feature: _dtype(_item(feature)).startswith("float"),
        lambda feature: _dtype(feature).startswith("float"),
        lambda feature: _dtype(feature).startswith(("int", "uint")),
    ),
}


def _image_column(rows: Any, cfg: ConfigDict) -> str:
    return choose_column(rows.features, IMAGE_TYPES, "image", cfg)


def _label_column(rows: Any, cfg: ConfigDict) -> str:
    return choose_column(rows.features, LABEL_TYPES[cfg.target], "label", cfg)


def _has_labels(rows: Any, cfg: ConfigDict) -> bool:
    """Return whether a split has a label other than -1 or none, or labels of another kind."""
    column = _label_column(rows, cfg)
    if cfg.target != CLASS:
        return True
    return not len(rows) or any(label not in (None, -1) for label in _values(rows, column).tolist())


def _targets(rows: Any, train: Any, column: str, kind: str) -> tuple[Rows, tuple[str, ...]]:
    """Return the rows of a column, and the names of the classes, which are the training set's."""

    def read(part: Any) -> Rows:
        return rows_of(part[column][:], lambda index: f"row {index} of column {column}")

    own, item = read(rows), _item(rows.features[column])
    if kind == CLASSES and _is_class(item):
        names = _training_names(item, _item(train.features[column]), column)
        table = _renumbering(item.names, names, column)
        return own._replace(flat=table[own.flat]), names
    return own, class_names(own if train is rows else read(train), kind)


def _labels(rows: Any, train: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels and the names of the classes, which are the training set's."""
    values, feature = _values(rows, column), rows.features[column]
    if values.dtype.kind == "O" and None in values.tolist():
        raise UserError(f"column {column} has rows without a label; remove them")
    if _is_class(feature):
        names = _training_names(feature, train.features[column], column)
        if tuple(feature.names) == names:
            return values, names
        table = np.append(_renumbering(feature.names, names, column), -1)  # -1: without a label
        return table[values], names
    if values.dtype.kind == "f":
        raise UserError(
            f"column {column} has floating-point numbers, not classes: set "
            "--config.data.target=value, or name another with --config.data.label_column"
        )
    known = values if train is rows else _values(train, column)
    if values.dtype.kind == "b":  # classes False and True
        values, known = values.astype(str), known.astype(str)
    if values.dtype.kind in "iu":
        most = int(known.max(initial=-1)) + 1
        if most > max(MOST_CLASSES, len(known)):
            raise UserError(
                f"column {column} has labels up to {most - 1:,} in {len(known):,} rows, as an id "
                "would: name the column of classes with --config.data.label_column"
            )
        return values, tuple(map(str, range(most)))
    texts = sorted(set(known.tolist()))
    if unknown := sorted(set(values.tolist()) - set(texts)):
        raise UserError(f"class {unknown[0]!r} of {column} is not in the training set")
    return np.searchsorted(np.array(texts), values).astype(np.int32), tuple(texts)


def _training_names(own: Any, train: Any, column: str) -> tuple[str, ...]:
    """Return the training set's names of a column of numbered classes. Raises UserError."""
    if not _is_class(train):
        raise UserError(f"column {column} has named classes, and in the training set it has none")
    return tuple(train.names)


def _renumbering(own: Sequence[str], names: Sequence[str], column: str) -> np.ndarray:
    """Return the training set's number of each class. Raises UserError for one that it lacks."""
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := [name for name in own if name not in numbers]:
        raise UserError(f"class {unknown[0]!r} of {column} is not in the training set")
    return np.array([numbers[name] for name in own], np.int32)


def _values(rows: Any, column: str) -> np.ndarray:
    return np.asarray(rows[column][:])

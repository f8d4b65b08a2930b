"""Sets that TensorFlow Datasets prepared in its ArrayRecord format, read without TensorFlow.

An example's image and label are the features of those types. File names, by which slices are
chosen, are only in the records: `index_names` reads them and the labels once, and writes
SPLIT.index.npz beside the shards. Without it a set is sliced by position.
"""

import functools
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.data.columns import choose_column, labelled_split
from vit_scale.data.decode import Corrupt
from vit_scale.data.encoded_images import EncodedImages
from vit_scale.data.example_ids import Examples
from vit_scale.data.image_files import check_readable
from vit_scale.errors import UserError
from vit_scale.storage import files, paths
from vit_scale.storage.errors import DAMAGED, one_line, user_errors

INSTALL = "launch/environment.sh tfds in a clone, or pip install tensorflow-datasets"
INFO = "dataset_info.json"  # in the folder of a prepared version
FILE_NAMES = ("file_name", "filename", "image/filename")


class TfdsSet(EncodedImages):
    """The images of one split of a prepared set."""

    def __init__(self, name: str, split: str, builder: Any, cfg: ConfigDict):
        features = builder.info.features
        self._image, self._label = (_feature(features, kind, cfg) for kind in ("image", "label"))
        super().__init__(name, features[self._label].names, cfg)
        self._rows = _rows(builder, split, [self._image])
        self._index = index_file(builder.data_dir, split)
        *_, self._last_label = _of_type(features, "label")

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def examples(self) -> Examples | None:  # type: ignore[override]
        if not self._index.is_file():
            return None
        again = f"run `vit-scale data index {self._index.parent}`"
        with (
            user_errors(f"cannot read {self._index}", again, also=DAMAGED),
            np.load(io.BytesIO(self._index.read_bytes())) as stored,
        ):
            name = labels_of(self._label)
            if name not in stored and self._label == self._last_label:
                name = "labels"  # as earlier versions called those of the last feature
            if name not in stored:
                raise UserError(f"{self._index} lacks the labels {self._label!r}; {again}")
            examples = Examples(stored["files"], stored[name])
        if len(examples.files) != len(self):
            raise UserError(
                f"{self._index} has {len(examples.files)} names of {len(self)} images; {again}"
            )
        return examples

    def encoded(self, index: int) -> tuple[bytes, int]:
        row = self._row(index)
        label = int(row[self._label])
        if not 0 <= label < len(self.classes):
            raise UserError(
                f"{self.location(index)}: label {label} is outside the {len(self.classes)} classes"
            )
        return row[self._image], label

    def has_labels(self) -> bool:
        """Return whether the first example has a label, as none or all of a split have one."""
        try:
            return not len(self) or int(self._row(0)[self._label]) != -1
        except Corrupt:  # which is reported when it is read
            return True

    def _row(self, index: int) -> dict:
        try:
            return self._rows[index]
        except Exception as error:  # Riegeli and protobuf raise several types
            check_readable(self._index.parent / INFO)
            raise Corrupt(one_line(error)) from error

    def location(self, index: int) -> str:
        return f"example {index} of {self.name}"


def source(cfg: ConfigDict, name: str) -> TfdsSet:
    """Open the split `name` of the set prepared at cfg.path, the folder of a version, or so named.

    Without a test set, `test` is the validation set. Raises UserError for a set that is missing or
    in another format, and where it is not clear which features are the image and the label.
    """
    builder = _builder(cfg.path)
    split = labelled_split(
        cfg, name, builder.info.splits, lambda one: TfdsSet(one, one, builder, cfg).has_labels()
    )
    return TfdsSet(f"{builder.info.name} {split}", split, builder, cfg)


def is_prepared(path: str) -> bool:
    """Return whether `path` is the folder of a prepared version."""
    return (paths.parse(path) / INFO).is_file()


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"data.name=tfds needs the package tensorflow-datasets: {INSTALL}"
        ) from error
    return tensorflow_datasets


def _builder(path: str) -> Any:
    tfds = _tfds()
    if "://" in path:
        raise UserError(f"{path}: a set of TensorFlow Datasets must be on a disk; copy it there")
    try:
        builder = tfds.builder_from_directory(path) if is_prepared(path) else tfds.builder(path)
        prepared = bool(builder.info.splits)
        kind = builder.info.file_format
    except UserError:
        raise
    except Exception as error:  # tfds raises any type
        raise UserError(
            f"{path} is no set of TensorFlow Datasets ({one_line(error)}): give the folder with "
            f"its {INFO}, such as DIR/NAME/1.0.0, or a name"
        ) from error
    if not prepared:
        raise UserError(
            f"{path} is not prepared: run tfds.builder({path!r}, file_format='array_record')"
            ".download_and_prepare() in Python"
        )
    if kind != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{path} is in the format {kind.value}, which cannot be read at random: prepare it "
            "with file_format='array_record'"
        )
    return builder


def _rows(builder: Any, split: str, images: Iterable[str]) -> Any:
    decoders = {image: _tfds().decode.SkipDecoding() for image in images}
    with user_errors(f"cannot open {builder.data_dir}", "prepare it again", also=(Exception,)):
        return builder.as_data_source(split=split, decoders=decoders)


def _feature(features: Any, kind: str, cfg: ConfigDict) -> str:
    """Return the feature of images or labels: the named one, or the only one of that type."""
    return choose_column(_of_type(features, kind), [lambda feature: True], kind, cfg)


def _of_type(features: Any, kind: str) -> dict[str, Any]:
    """Return the features that are images or labels, by name."""
    wanted = getattr(_tfds().features, {"image": "Image", "label": "ClassLabel"}[kind])
    return {name: feature for name, feature in features.items() if type(feature) is wanted}


def index_file(folder: str | os.PathLike, split: str) -> Path:
    return paths.parse(folder) / f"{split}.index.npz"


def labels_of(feature: str) -> str:
    """Return the name of a feature's labels in an index."""
    return f"labels of {feature}"


def index_names(path: str) -> dict[str, int]:
    """Write each example's file name and labels; return the number of images of each split.

    Raises UserError for a set without file names.
    """
    builder, counts = _builder(path), {}
    features = builder.info.features
    name = next((field for field in FILE_NAMES if field in features), None)
    if name is None:
        raise UserError(f"{path} has no feature {' or '.join(FILE_NAMES)}: nothing to index")
    images, classes = (_of_type(features, kind) for kind in ("image", "label"))
    if not images or not classes:
        raise UserError(f"{path} has no image with a class; nothing to index")
    for split in builder.info.splits:
        rows, names = _rows(builder, split, images), []
        labels: dict[str, list[int]] = {feature: [] for feature in classes}
        for index in tqdm(range(len(rows)), desc=f"index {split}", unit="image", disable=None):
            row = rows[index]
            names.append(row[name])
            for feature, values in labels.items():
                values.append(row[feature])
        columns = {labels_of(f): np.array(values, np.int32) for f, values in labels.items()}
        content = io.BytesIO()
        np.savez_compressed(content, files=np.array(names), **columns)  # type: ignore[arg-type]
        files.write(index_file(builder.data_dir, split), content.getvalue())
        counts[split] = len(names)
    return counts

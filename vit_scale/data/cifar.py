"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): read their official layouts into memory.

The Python layout is pickled, and a pickle can run any code: the unpickler here admits only what
rebuilds an array of bytes, so that files of any origin are safe to open.
"""

import contextlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from vit_scale.data.sources import InMemory, check_labels
from vit_scale.errors import UserError
from vit_scale.storage import paths
from vit_scale.storage.errors import user_errors

NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
CLASSES = tuple(NAMES.split())
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
LAYOUTS = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}  # folder: suffix of its files
IMAGES = 10_000  # in each file
PIXELS = 3 * 32 * 32  # bytes of an image: its red plane, its green one, its blue one

ADVICE = "`vit-scale data download cifar10 --out FOLDER` downloads all files of CIFAR-10"
Batch = tuple[UInt8[np.ndarray, "n 3072"], np.ndarray]


def source(cfg: ConfigDict, name: str) -> InMemory:
    """Read CIFAR-10's `train` (50,000 images) or `test` (10,000), uint8 [n, 32, 32, 3].

    cfg.path contains `cifar-10-batches-bin` or `cifar-10-batches-py`, or is one of them. Raises
    UserError if both are missing, or a file is truncated, unsafe or not CIFAR-10's.
    """
    folder, suffix = _find(paths.parse(cfg.path))
    stems = BATCHES[name]
    images = np.empty((len(stems) * IMAGES, 32, 32, 3), np.uint8)
    labels = np.empty(len(images), np.int32)
    for number, stem in enumerate(stems):
        file = folder / f"{stem}{suffix}"
        with user_errors(f"cannot read {file}", ADVICE):
            planes, part = _read_binary(file) if suffix else _read_pickle(file, "labels", IMAGES)
        rows = slice(number * IMAGES, (number + 1) * IMAGES)
        images[rows] = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[rows] = check_labels(part, CLASSES, str(file))
    return InMemory(f"cifar10 {name}", images, labels, CLASSES)


def source100(cfg: ConfigDict, name: str) -> InMemory:
    """Read CIFAR-100's `train` (50,000 images) or `test` (10,000), with its 100 fine classes.

    cfg.path contains `cifar-100-python`, or is it. Raises UserError as `source` does.
    """
    top = paths.parse(cfg.path)
    candidates = (top / "cifar-100-python", top)
    folder = next((f for f in candidates if (f / "meta").is_file()), None)
    if folder is None:
        raise UserError(
            f"CIFAR-100 is not in {top}: run `vit-scale data download cifar100 --out {top}`"
        )
    advice = f"`vit-scale data download cifar100 --out {top}` downloads its files"
    with user_errors(f"cannot read {folder}", advice):
        classes = _unpickle(folder / "meta")["fine_label_names"]
        classes = [c if isinstance(c, str) else c.decode() for c in classes]
        planes, labels = _read_pickle(folder / name, "fine_labels", None)
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = check_labels(labels, classes, str(folder / name))
    return InMemory(f"cifar100 {name}", np.ascontiguousarray(images), labels, classes)


def _find(path: Path) -> tuple[Path, str]:
    for layout, suffix in LAYOUTS.items():
        for folder in (path / layout, path):
            stems = (*BATCHES["train"], *BATCHES["test"])
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if not paths.sizes(folder).keys().isdisjoint(f"{stem}{suffix}" for stem in stems):
                    return folder, suffix
    raise UserError(
        f"CIFAR-10 is not in {path}: run `vit-scale data download cifar10 --out {path}`, "
        f"or unpack cifar-10-python.tar.gz there, as {path / 'cifar-10-batches-py'}"
    )


def _read_binary(file: Path) -> Batch:
    """Read rows of one label byte and PIXELS pixel bytes."""
    data = np.frombuffer(file.read_bytes(), np.uint8)
    if data.size != IMAGES * (1 + PIXELS):
        raise UserError(
            f"{file} ends at byte {data.size}, in image {data.size // (1 + PIXELS)}, not after "
            f"{IMAGES} images x {1 + PIXELS} = {IMAGES * (1 + PIXELS)} bytes; replace it"
        )
    rows = data.reshape(IMAGES, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _read_pickle(file: Path, field: str, images: int | None) -> Batch:
    """Read a pickled dict of `data`, uint8 [n, PIXELS], and of a list of labels.

    `images` is their number; None: any.
    """
    fields = _unpickle(file)
    try:
        data, labels = fields["data"], np.array(fields[field], np.int64)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} has no {field} ({error!r}); replace it") from error
    n = len(labels) if images is None else images
    if data.shape != (n, PIXELS) or labels.shape != (n,) or data.dtype != np.uint8:
        raise UserError(
            f"{file} has {data.dtype} pixels {data.shape} and labels {labels.shape}, not uint8 "
            f"({n}, {PIXELS}) and ({n},); replace it"
        )
    return data, labels


def _unpickle(file: Path) -> dict[str, Any]:
    """Read a pickled dict of arrays, texts and numbers; its keys become texts."""
    with io.BufferedReader(io.BytesIO(file.read_bytes())) as stream:  # type: ignore[type-var]
        try:
            content = ArrayUnpickler(stream, encoding="bytes").load()
            return {k if isinstance(k, str) else k.decode(): v for k, v in content.items()}
        except Exception as error:  # broken pickles raise any type
            raise UserError(
                f"{file}: byte {stream.tell()}: {error or type(error).__name__}; not an intact "
                "CIFAR batch, replace it"
            ) from error


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler of uint8 arrays, containers, text and numbers only."""

    def find_class(self, module: str, name: str):
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, not a numpy array") from None


def _uint8(name: str | bytes, *_) -> np.dtype:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"asks for an array of {name!r}, not u1")
    return np.dtype(np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes as Python 3 pickles them in protocol 2, as text; refuse other codecs."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"asks for codec {encoding!r}, not latin1")
    return text.encode("latin1")


# numpy renamed the module in 2.0; its pickles name the function either way.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _uint8,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): _latin1,
}

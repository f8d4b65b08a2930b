"""CIFAR-10 (Krizhevsky 2009): download it, and read either official layout into memory.

The Python layout is pickled, and a pickle can run any code: the unpickler here admits only what
rebuilds an array of bytes, so that files of any origin are safe to open.
"""

import contextlib
import io
import pickle
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from vit_scale.data.sources import InMemory, check_labels
from vit_scale.errors import UserError
from vit_scale.storage import paths
from vit_scale.storage.download import fetch, unpack
from vit_scale.storage.errors import user_errors

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3d95e74349a"  # as its page gives it
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
            planes, part = _read_binary(file) if suffix else _read_pickle(file)
        rows = slice(number * IMAGES, (number + 1) * IMAGES)
        images[rows] = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[rows] = check_labels(part, CLASSES, str(file))
    return InMemory(f"cifar10 {name}", images, labels, CLASSES)


def download(folder: str | Path, url: str = URL, md5: str = MD5) -> Path:
    """Download and unpack CIFAR-10 into `folder`; return its `cifar-10-batches-py`.

    An archive that is already in `folder` is used, and an interrupted download is resumed. Raises
    UserError if the network or the archive fails, and for a `folder` in a bucket, where nothing can
    be unpacked.
    """
    target = paths.parse(folder) / "cifar-10-batches-py"
    if paths.in_bucket(target):
        raise UserError(
            f"--out {folder}: cannot unpack in a bucket; download to a disk, then copy the folder "
            f"with `gcloud storage cp -r .data/{target.name} {target.parent}/`"
        )
    if not target.exists():
        archive = Path(folder) / url.rpartition("/")[2]
        fetch(url, archive, f"md5={md5}")
        unpack(archive, target)
    return target


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


def _read_pickle(file: Path) -> Batch:
    """Read a pickled dict of `data`, uint8 [IMAGES, PIXELS], and `labels`, a list."""
    with io.BufferedReader(io.BytesIO(file.read_bytes())) as stream:  # type: ignore[type-var]
        try:
            content = ArrayUnpickler(stream, encoding="bytes").load()
            fields = {k if isinstance(k, str) else k.decode(): v for k, v in content.items()}
            data, labels = fields["data"], np.array(fields["labels"], np.int64)
        except Exception as error:  # broken pickles raise any type
            raise UserError(
                f"{file}: byte {stream.tell()}: {error or type(error).__name__}; not an intact "
                "CIFAR-10 batch, replace it"
            ) from error
    if data.shape != (IMAGES, PIXELS) or labels.shape != (IMAGES,) or data.dtype != np.uint8:
        raise UserError(
            f"{file} has {data.dtype} pixels {data.shape} and labels {labels.shape}, not uint8 "
            f"({IMAGES}, {PIXELS}) and ({IMAGES},); replace it"
        )
    return data, labels


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

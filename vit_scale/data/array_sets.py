"""Well-known sets of small images that are arrays in files: MNIST, Fashion-MNIST, SVHN, STL-10.

Each reads the files as their authors published them, compressed or not, in cfg.path or in the
folder that `vit-scale data download` makes there. Grey images become RGB. CIFAR is in cifar.py.
"""

import gzip
import io
import math
import struct
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vit_scale.data.sources import InMemory, check_labels
from vit_scale.errors import UserError
from vit_scale.storage import paths
from vit_scale.storage.errors import DAMAGED, user_errors

FASHION = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DIGITS = tuple("0123456789")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
UINT8 = 0x08  # a type of IDX files
NAMES = {"train": "train", "test": "t10k"}  # prefix of MNIST's files
MAT_ERRORS = (*DAMAGED, TypeError, OSError)


def _file(cfg: ConfigDict, folder: str, name: str) -> Path:
    """Return the file `name`, or name.gz, in cfg.path or in its `folder`. Raises UserError."""
    top = paths.parse(cfg.path)
    for candidate in (top / folder, top):
        for file in (candidate / name, candidate / f"{name}.gz"):
            if file.is_file():
                return file
    raise UserError(
        f"{top / folder / name} is missing: run `vit-scale data download {cfg.name} --out {top}`"
    )


def _content(file: Path, name: str) -> bytes:
    """Return the content of a file, decompressed. Raises UserError."""
    advice = f"remove it, and run `vit-scale data download {name}` again"
    with user_errors(f"cannot read {file}", advice, also=DAMAGED):
        data = file.read_bytes()
        return gzip.decompress(data) if file.suffix == ".gz" else data


def _idx(file: Path, name: str, axes: int) -> np.ndarray:
    """Read an array in the IDX format of MNIST: a magic number, the shape, uint8 values."""
    data = _content(file, name)
    if len(data) < 4 * (1 + axes) or data[:4] != bytes([0, 0, UINT8, axes]):
        raise UserError(f"{file} is not an IDX file of {axes} axes of uint8; download it again")
    shape = struct.unpack(f">{axes}I", data[4 : 4 * (1 + axes)])
    values = np.frombuffer(data, np.uint8, offset=4 * (1 + axes))
    if values.size != math.prod(shape):
        raise UserError(f"{file} has {values.size} values of {math.prod(shape)}; download it again")
    return values.reshape(shape)


def mnist(cfg: ConfigDict, split: str) -> InMemory:
    """Read MNIST or Fashion-MNIST, by cfg.name: 60,000 and 10,000 images of 28 x 28."""
    images, labels = (
        _idx(_file(cfg, cfg.name, f"{NAMES[split]}-{kind}"), cfg.name, axes)
        for kind, axes in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1))
    )
    classes = DIGITS if cfg.name == "mnist" else FASHION
    rgb = np.repeat(images[..., None], 3, axis=3)
    return _in_memory(cfg, split, rgb, labels, classes)


def svhn(cfg: ConfigDict, split: str) -> InMemory:
    """Read SVHN's cropped digits: 73,257 and 26,032 images of 32 x 32. Label 10 is the digit 0."""
    from scipy.io import loadmat

    file = _file(cfg, cfg.name, f"{split}_32x32.mat")
    advice = f"remove it, and run `vit-scale data download {cfg.name}` again"
    with user_errors(f"cannot read {file}", advice, also=MAT_ERRORS):
        content = loadmat(io.BytesIO(file.read_bytes()))
        images, labels = content["X"], content["y"].ravel().astype(np.int32)
    images = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
    return _in_memory(cfg, split, images, np.where(labels == 10, 0, labels), DIGITS)


def stl10(cfg: ConfigDict, split: str) -> InMemory:
    """Read STL-10: 5,000 and 8,000 labelled images of 96 x 96."""
    folder = "stl10_binary"
    pixels = np.frombuffer(_content(_file(cfg, folder, f"{split}_X.bin"), cfg.name), np.uint8)
    labels = np.frombuffer(_content(_file(cfg, folder, f"{split}_y.bin"), cfg.name), np.uint8)
    if pixels.size != labels.size * 3 * 96 * 96:
        raise UserError(
            f"{folder}/{split}_X.bin has {pixels.size} bytes, not {labels.size} images x "
            f"{3 * 96 * 96}; download it again"
        )
    images = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # columns before rows
    return _in_memory(cfg, split, np.ascontiguousarray(images), labels.astype(np.int32) - 1, STL10)


def _in_memory(cfg: ConfigDict, split: str, images, labels, classes) -> InMemory:
    name = f"{cfg.name} {split}"
    if len(images) != len(labels):
        raise UserError(f"{name} has {len(images)} images and {len(labels)} labels")
    return InMemory(name, images, check_labels(labels, classes, name), classes)

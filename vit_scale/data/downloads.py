"""Download well-known sets from their authors, resumed where they stopped and checked.

Checksums are the authors' own, or those that torchvision and TensorFlow Datasets publish; Imagewoof
has none, and is only unpacked completely or not at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vit_scale.errors import USAGE, UserError, nearest
from vit_scale.storage import paths
from vit_scale.storage.download import fetch, unpack


class File(NamedTuple):
    """A file to download, and the folder that it unpacks to, if it is an archive."""

    url: str
    checksum: str = ""  # "md5=..." or "sha256=..."
    unpacks: str = ""


class Set(NamedTuple):
    """The files of a set, and the folder below --out that they go into."""

    files: tuple[File, ...]
    folder: str = ""


def _archive(url: str, checksum: str, unpacks: str) -> Set:
    """Return the set that is one archive of one folder."""
    return Set((File(url, checksum, unpacks),))


TORONTO = "https://www.cs.toronto.edu/~kriz"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
STREET = "http://ufldl.stanford.edu/housenumbers"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas"
SETS = {
    "cifar10": _archive(
        f"{TORONTO}/cifar-10-python.tar.gz",
        "md5=c58f30108f718f92721af3d95e74349a",
        "cifar-10-batches-py",
    ),
    "cifar100": _archive(
        f"{TORONTO}/cifar-100-python.tar.gz",
        "md5=eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
    ),
    "mnist": Set(
        (
            File(f"{MNIST}/train-images-idx3-ubyte.gz", "md5=f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            File(f"{MNIST}/train-labels-idx1-ubyte.gz", "md5=d53e105ee54ea40749a09fcbcd1e9432"),
            File(f"{MNIST}/t10k-images-idx3-ubyte.gz", "md5=9fb629c4189551a2d022fa330f9573f3"),
            File(f"{MNIST}/t10k-labels-idx1-ubyte.gz", "md5=ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        "mnist",
    ),
    "fashion_mnist": Set(
        (
            File(f"{FASHION}/train-images-idx3-ubyte.gz", "md5=8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            File(f"{FASHION}/train-labels-idx1-ubyte.gz", "md5=25c81989df183df01b3e8a0aad5dffbe"),
            File(f"{FASHION}/t10k-images-idx3-ubyte.gz", "md5=bef4ecab320f06d8554ea6380940ec79"),
            File(f"{FASHION}/t10k-labels-idx1-ubyte.gz", "md5=bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        "fashion_mnist",
    ),
    "svhn": Set(
        (
            File(f"{STREET}/train_32x32.mat", "md5=e26dedcc434d2e4c54c9b2d4a06d8373"),
            File(f"{STREET}/test_32x32.mat", "md5=eb5a983be6a315427106f1b164d9cef3"),
        ),
        "svhn",
    ),
    "stl10": _archive(
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "md5=91f7769df0f17e558f3565bffb0c7dfb",
        "stl10_binary",
    ),
    "flowers102": Set(
        (
            File(
                f"{OXFORD}/flowers/102/102flowers.tgz",
                "md5=52808999861908f626f3c1f4e79d11fa",
                "jpg",
            ),
            File(f"{OXFORD}/flowers/102/imagelabels.mat", "md5=e0620be6f572b9609742df49c70aed4d"),
            File(f"{OXFORD}/flowers/102/setid.mat", "md5=a5357ecc9cb78c4bef273ce3793fc85c"),
        ),
        "flowers-102",
    ),
    "pets": Set(
        (
            File(
                f"{OXFORD}/pets/data/images.tar.gz",
                "md5=5c4f3ee8e5d25df40f4fd59a7f44e54c",
                "images",
            ),
            File(
                f"{OXFORD}/pets/data/annotations.tar.gz",
                "md5=95a8c909bbe2e81eed6a22bccdf3f68f",
                "annotations",
            ),
        ),
        "oxford-iiit-pet",
    ),
    "food101": _archive(
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
        "md5=85eeb15f3717b99a5da872d97d918f87",
        "food-101",
    ),
    "imagenette": _archive(
        f"{FAST_AI}/imagenette2.tgz", "md5=fe2fc210e6bb7c5664d602c3cd71e612", "imagenette2"
    ),
    "imagewoof": _archive(f"{FAST_AI}/imagewoof2.tgz", "", "imagewoof2"),
    "tiny_imagenet": _archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "md5=90528d7ca1a48142e341f4ef8d21d0de",
        "tiny-imagenet-200",
    ),
}


def download(name: str, out: str | Path, files: Sequence[File] = ()) -> Path:
    """Download the set `name` into `out`, and unpack it; return the folder that holds it.

    What is complete is not downloaded again, an interrupted download is resumed, and an archive
    that is already in the folder is used. `files` replace the set's own.

    Raises UserError for an unknown name, if the network or a file fails, and for an `out` in a
    bucket, where nothing can be unpacked.
    """
    if name not in SETS:
        raise UserError(f"unknown data set {name!r}; {nearest(name, SETS)}", USAGE)
    folder = paths.parse(out) / SETS[name].folder
    files = files or SETS[name].files
    single = files[0].unpacks if not SETS[name].folder else ""
    if paths.in_bucket(folder):
        local = f".data/{single or SETS[name].folder}"
        raise UserError(
            f"--out {out}: cannot unpack in a bucket; download to a disk, then copy the folder "
            f"with `gcloud storage cp -r {local} {out}/`"
        )
    for file in files:
        archive = folder / file.url.rpartition("/")[2]
        target = folder / file.unpacks
        if file.unpacks and target.exists():
            continue
        fetch(file.url, archive, file.checksum)
        if file.unpacks:
            unpack(archive, target)
    return folder / single

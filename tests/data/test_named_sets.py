"""Well-known sets: small files of each official layout give the right pixels, labels and names."""

import gzip
import hashlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from scipy.io import savemat

from tests.data.test_image_folder import everything, picture, save
from tests.data.test_tar_shards import refused
from vit_scale import cli, data
from vit_scale.config import base
from vit_scale.data import array_sets, downloads, photo_sets
from vit_scale.data.registry import SETS

N = 12


def block(name, path, **changes):
    cfg = base().data
    cfg.update({"name": name, "path": str(path), "resolution": 8, "workers": 0} | changes)
    return cfg


def opened(name, path, split="train", **changes):
    return data.open_split(block(name, path, **changes), split)


def drawn(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.RandomState(sum(shape)).randint(0, high, shape).astype(np.uint8)


def idx(values: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + (values.tobytes())
    )


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("folder", ["", "sub"])
def test_mnist(tmp_path, name, folder):
    images, labels = drawn(N, 28, 28), np.arange(N, dtype=np.uint8) % 10
    place = tmp_path / (name if folder else "")
    place.mkdir(exist_ok=True)
    for split in ("train", "t10k"):
        (place / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (place / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    for split in ("train", "test"):
        source = opened(name, tmp_path, split)
        batch = everything(source)
        np.testing.assert_array_equal(batch["image"], np.stack([images] * 3, -1))
        np.testing.assert_array_equal(batch["label"], labels)
    assert source.size == data.delivered_size(block(name, tmp_path)) == (28, 28)
    assert source.classes[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[name]
    file = place / "train-images-idx3-ubyte.gz"
    for content, message in (
        (file.read_bytes()[:-9], "cannot read"),
        (gzip.compress(idx(images)[:-1]), f"has {N * 784 - 1} values of {N * 784}"),
        (gzip.compress(idx(labels)), "is not an IDX file of 3 axes"),
        (gzip.compress(idx(images[1:])), f"has {N - 1} images and {N} labels"),
    ):
        file.write_bytes(content)
        assert message in refused(lambda: opened(name, tmp_path))
    file.unlink()
    assert f"vit-scale data download {name} --out {tmp_path}" in refused(
        lambda: opened(name, tmp_path)
    )


def test_svhn(tmp_path):
    images, labels = drawn(32, 32, 3, N), np.arange(N) % 10 + 1
    (tmp_path / "svhn").mkdir()
    savemat(tmp_path / "svhn/train_32x32.mat", {"X": images, "y": labels[:, None]})
    batch = everything(opened("svhn", tmp_path))
    np.testing.assert_array_equal(batch["image"][5], images[..., 5])
    np.testing.assert_array_equal(batch["label"], labels % 10)
    file = tmp_path / "svhn/train_32x32.mat"
    file.write_bytes(file.read_bytes()[:200])
    assert f"cannot read {file}" in refused(lambda: opened("svhn", tmp_path))


def test_stl10(tmp_path):
    images, labels = drawn(N, 96, 96, 3), np.arange(N, dtype=np.uint8) % 10 + 1
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "test_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / "test_y.bin").write_bytes(labels.tobytes())
    source = opened("stl10", tmp_path, "test")
    np.testing.assert_array_equal(everything(source)["image"], images)
    np.testing.assert_array_equal(everything(source)["label"], labels - 1)
    assert (source.size, source.classes[2]) == ((96, 96), "car")
    (folder / "test_y.bin").write_bytes(labels[1:].tobytes())
    assert f"not {N - 1} images x 27648" in refused(lambda: opened("stl10", tmp_path, "test"))


def test_cifar100(tmp_path):
    planes, labels = drawn(N, 3072), [i * 7 % 100 for i in range(N)]
    names = [f"class {i}" for i in range(100)]
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    content = {b"data": planes, b"fine_labels": labels, b"coarse_labels": [0] * N}
    (folder / "train").write_bytes(pickle.dumps(content, protocol=3))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    source = opened("cifar100", tmp_path)
    expected = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(everything(source)["image"], expected)
    assert everything(source)["label"].tolist() == labels and source.classes == tuple(names)
    (folder / "train").write_bytes(pickle.dumps({b"data": planes}, protocol=3))
    assert "train has no fine_labels" in refused(lambda: opened("cifar100", tmp_path))
    assert "CIFAR-100 is not in" in refused(lambda: opened("cifar100", tmp_path / "none"))


def photos(folder, names) -> list[np.ndarray]:
    pictures = [picture(8, 8, number) for number in range(len(names))]
    for name, pixels in zip(names, pictures, strict=True):
        save(folder / name, pixels)
    return pictures


def test_food101(tmp_path):
    folder = tmp_path / "food-101"
    names = ["beet_salad/10", "apple_pie/11", "beet_salad/12"]
    photos(folder / "images", [f"{name}.jpg" for name in names])
    (folder / "meta").mkdir()
    (folder / "meta/classes.txt").write_text("apple_pie\nbeet_salad\n")
    (folder / "meta/train.txt").write_text("\n".join(names[:2]) + "\n")
    (folder / "meta/test.txt").write_text(names[2])
    source = opened("food101", tmp_path)
    assert source.classes == ("apple pie", "beet salad")
    assert everything(source)["label"].tolist() == [1, 0]
    assert everything(opened("food101", folder, "test"))["label"].tolist() == [1]
    assert source.examples.files.tolist() == [b"beet_salad/10.jpg", b"apple_pie/11.jpg"]
    (folder / "meta/test.txt").write_text("pizza/1")
    assert "class 'pizza' is not in classes.txt" in refused(
        lambda: opened("food101", tmp_path, "test")
    )


def test_pets(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    photos(folder / "images", ["Abyssinian_1.jpg", "american_bulldog_10.jpg", "Abyssinian_3.jpg"])
    (folder / "annotations").mkdir()
    rows = "american_bulldog_10 2 2 1\nAbyssinian_1 1 1 1\n"
    (folder / "annotations/trainval.txt").write_text(rows)
    (folder / "annotations/test.txt").write_text("#Image CLASS-ID\nAbyssinian_3 1 1 1\n")
    source = opened("pets", tmp_path)
    assert source.classes == ("Abyssinian", "american bulldog")
    assert everything(source)["label"].tolist() == [1, 0]
    assert everything(opened("pets", tmp_path, "test"))["label"].tolist() == [0]
    (folder / "annotations/trainval.txt").write_text("Abyssinian_1 3 1 1\n")
    assert "has classes [2], not 0 to 0" in refused(lambda: opened("pets", tmp_path))


def test_flowers(tmp_path):
    folder = tmp_path / "flowers-102"
    photos(folder / "jpg", [f"image_{number:05}.jpg" for number in range(1, 6)])
    savemat(folder / "setid.mat", {"trnid": [[5, 1]], "valid": [[2]], "tstid": [[3, 4]]})
    savemat(folder / "imagelabels.mat", {"labels": [[77, 1, 2, 102, 73]]})
    source = opened("flowers102", tmp_path)
    assert everything(source)["label"].tolist() == [72, 76]
    assert len(source.classes) == 102 and source.classes[76] == "passion flower"
    assert everything(opened("flowers102", tmp_path, "val"))["label"].tolist() == [0]
    assert everything(opened("flowers102", tmp_path, "test"))["label"].tolist() == [1, 101]
    assert source.examples.files.tolist() == [b"image_00005.jpg", b"image_00001.jpg"]
    savemat(folder / "setid.mat", {"trnid": [[9]]})
    assert f"cannot read {folder}" in refused(lambda: opened("flowers102", tmp_path))


@pytest.mark.parametrize(
    ("name", "folder", "names"),
    [
        ("imagenette", "imagenette2", photo_sets.IMAGENETTE),
        ("imagewoof", "imagewoof2-160", photo_sets.IMAGEWOOF),
    ],
)
def test_imagenette_and_imagewoof(tmp_path, name, folder, names):
    for split in ("train", "val"):
        photos(tmp_path / folder / split, [f"{wnid}/{split}_1.JPEG" for wnid in names])
    source = opened(name, tmp_path)
    assert source.classes == tuple(names[wnid] for wnid in sorted(names)) and len(source) == 10
    assert everything(opened(name, tmp_path / folder, "test"))["label"].tolist() == list(range(10))
    assert source.ids == tuple(sorted(names))


def test_tiny_imagenet(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    photos(folder / "train", ["n01/images/a.JPEG", "n02/images/b.JPEG"])
    photos(folder / "val", ["images/v.JPEG"])
    (folder / "val/val_annotations.txt").write_text("v.JPEG\tn02\t0\t0\t1\t1\n")
    (folder / "words.txt").write_text("n01\tant, emmet\nn02\tbee\n")
    assert opened("tiny_imagenet", tmp_path).classes == ("ant", "bee")
    assert everything(opened("tiny_imagenet", tmp_path, "val"))["label"].tolist() == [1]


def test_every_set_that_can_be_downloaded_can_be_read_and_says_how(tmp_path):
    assert downloads.SETS.keys() <= SETS.keys()
    for name in downloads.SETS:
        message = refused(lambda name=name: opened(name, tmp_path))
        assert f"`vit-scale data download {name} --out {tmp_path}`" in message
    assert len(array_sets.FASHION) == len(array_sets.STL10) == 10


def archive(file, members: dict[str, bytes]) -> bytes:
    """Write a .tar.gz, or a .zip."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, content in members.items():
        inner = file.parent / "content" / name
        inner.parent.mkdir(parents=True, exist_ok=True)
        inner.write_bytes(content)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as stored:
            for name in members:
                stored.write(file.parent / "content" / name, name)
    else:
        with tarfile.open(file, "w:gz") as tar:
            for name in members:
                tar.add(file.parent / "content" / name, name)
    return file.read_bytes()


def test_a_download_puts_each_file_where_the_set_is_read(tmp_path, capsys):
    def local(name: str, content: bytes, unpacks: str = "") -> downloads.File:
        file = tmp_path / "server" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        return downloads.File(file.as_uri(), f"md5={hashlib.md5(content).hexdigest()}", unpacks)

    content = archive(tmp_path / "a/102flowers.tgz", {"jpg/image_00001.jpg": b"1"})
    files = [local("102flowers.tgz", content, "jpg"), local("setid.mat", b"ids")]
    folder = downloads.download("flowers102", tmp_path / "out", files)
    assert folder == tmp_path / "out/flowers-102"
    assert (folder / "jpg/image_00001.jpg").read_bytes() == b"1"
    assert (folder / "setid.mat").read_bytes() == b"ids"
    content = archive(tmp_path / "b/tiny-imagenet-200.zip", {"tiny-imagenet-200/words.txt": b"w"})
    file = local("tiny-imagenet-200.zip", content, "tiny-imagenet-200")
    folder = downloads.download("tiny_imagenet", tmp_path / "out", [file])
    assert (folder / "words.txt").read_bytes() == b"w" and folder.parent == tmp_path / "out"
    damaged = file._replace(checksum="md5=0")
    (folder / "words.txt").unlink()
    folder.rmdir()
    (tmp_path / "out/tiny-imagenet-200.zip").unlink()
    assert "not 0: it is damaged" in refused(
        lambda: downloads.download("tiny_imagenet", tmp_path / "out", [damaged])
    )
    assert cli.main(["data", "download", "flowers10"]) == 2
    assert "unknown data set 'flowers10'; did you mean flowers102?" in capsys.readouterr().err

"""Image folders: labels and splits of each layout, pixels at the requested size, corrupt files."""

import errno
import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from vit_scale import data
from vit_scale.config import base
from vit_scale.data.decode import Corrupt, decode
from vit_scale.data.mixtures import relabel
from vit_scale.errors import UserError


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def save(file: pathlib.Path, pixels: np.ndarray) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def block(path, **changes):
    cfg = base().data
    cfg.update({"name": "folder", "path": str(path), "resolution": 8, "workers": 0} | changes)
    return cfg


def everything(source):
    return source.read(np.arange(len(source)))


@pytest.fixture
def plain(tmp_path):
    """train: two ants, one bee; test: one bee."""
    save(tmp_path / "train/bee/1.png", picture(8, 8, 1))
    save(tmp_path / "train/ant/2.PNG", picture(8, 8, 2))
    save(tmp_path / "train/ant/10.bmp", picture(8, 8, 3))
    save(tmp_path / "test/bee/1.png", picture(8, 8, 4))
    (tmp_path / "train/ant/boxes.txt").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/ant/._2.png").write_bytes(b"a Mac's shadow of a file")
    return tmp_path


def test_classes_and_files_are_sorted(plain):
    train = data.open_split(block(plain), "train")
    assert train.classes == ("ant", "bee") and train.decodes and train.size == (8, 8)
    actual = everything(train)
    assert actual["label"].tolist() == [0, 0, 1] and actual["mask"].all()
    expected = np.stack([picture(8, 8, seed) for seed in (3, 2, 1)])
    np.testing.assert_array_equal(actual["image"], expected)


def test_the_test_set_uses_the_labels_of_the_training_set(plain):
    test = data.open_split(block(plain), "test")
    assert test.classes == ("ant", "bee") and everything(test)["label"].tolist() == [1]


def test_a_class_that_the_training_set_lacks_is_refused(plain):
    save(plain / "test/cat/1.png", picture(8, 8))
    with pytest.raises(UserError, match=r"test/cat is a class that the training set lacks"):
        data.open_split(block(plain), "test")


@pytest.mark.parametrize("split", ["val", "validation", "test"])
def test_imagenet_test_is_the_validation_set(tmp_path, split):
    """ImageNet's own test folder has images without labels."""
    for wordnet in ("n02", "n01"):
        save(tmp_path / "train" / wordnet / f"{wordnet}_1.JPEG", picture(8, 8))
        save(tmp_path / "val" / wordnet / "v.JPEG", picture(8, 8))
    save(tmp_path / "test/images/t.JPEG", picture(8, 8))
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    source = data.open_split(block(tmp_path), split)
    assert source.name.endswith(" val") and source.classes == ("tench", "goldfish")
    assert everything(source)["label"].tolist() == [0, 1]


@pytest.fixture
def tiny(tmp_path):
    for wordnet in ("n01", "n02", "n03"):
        save(tmp_path / "train" / wordnet / "images" / f"{wordnet}_0.JPEG", picture(8, 8))
    lines = []
    for number, wordnet in enumerate(("n03", "n01", "n03")):
        save(tmp_path / f"val/images/val_{number}.JPEG", picture(8, 8, number))
        lines.append(f"val_{number}.JPEG\t{wordnet}\t0\t0\t7\t7\n")
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    (tmp_path / "words.txt").write_text("n01\tcrane\nn02\tcrane, derrick\nn03\tbee, insect\n")
    return tmp_path


def test_tiny_imagenet(tiny):
    train, val = (data.open_split(block(tiny), split) for split in ("train", "test"))
    assert everything(train)["label"].tolist() == [0, 1, 2]
    assert everything(val)["label"].tolist() == [2, 0, 2]
    assert val.classes == ("crane (n01)", "crane (n02)", "bee")


def test_an_annotation_with_an_unknown_class_is_reported_with_its_line(tiny):
    (tiny / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\nval_1.JPEG\tn09\n")
    with pytest.raises(
        UserError, match=r"val_annotations.txt: line 2: class 'n09' is none of the 3"
    ):
        data.open_split(block(tiny), "val")


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (lambda top: None, "train", "has no labelled split 'train'; expected train/CLASS/IMAGE"),
        (lambda top: (top / "train/ant").mkdir(parents=True), "train", "train has no images"),
        (lambda top: save(top / "train/1.png", picture(8, 8)), "train", "train has no images"),
        (lambda top: save(top / "train/ant/1.png", picture(8, 8)), "test", "split 'test'"),
    ],
)
def test_folders_without_an_image_set_are_refused(tmp_path, make, split, message):
    make(tmp_path)
    with pytest.raises(UserError) as caught:
        data.open_split(block(tmp_path), split)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


# Pixels


def encoded(image: Image.Image, form: str = "png") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "covering", "crop"),
    [
        ((16, 16), (8, 8), (slice(0, 8), slice(0, 8))),
        ((16, 40), (20, 8), (slice(0, 8), slice(6, 14))),
        ((40, 16), (8, 20), (slice(6, 14), slice(0, 8))),
        ((4, 10), (20, 8), (slice(0, 8), slice(6, 14))),
    ],
)
def test_images_are_resized_to_cover_and_cropped_at_the_centre(shape, covering, crop):
    image = Image.fromarray(picture(*shape))
    expected = np.asarray(image.resize(covering, Image.Resampling.BICUBIC))[crop]
    actual = decode(encoded(image), (8, 8))
    assert actual.shape == (8, 8, 3)
    np.testing.assert_allclose(actual.astype(int), expected.astype(int), atol=1)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    actual = decode(encoded(Image.fromarray(stripes)), (8, 8)).astype(int)
    assert abs(actual[:, 1:-1] - 127.5).max() < 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(mode):
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    assert (decode(encoded(image, "tiff"), (8, 8)) == 255).all()


def test_load_width_and_resolution_determine_the_size(plain):
    for changes, size in (
        ({}, (8, 8)),
        ({"resolution": 4, "width": 6}, (4, 6)),
        ({"load": 5, "width": 6}, (5, 4)),
    ):
        source = data.open_split(block(plain, **changes), "train")
        assert source.size == size and everything(source)["image"].shape == (3, *size, 3)


# Corrupt files


def test_storage_that_fails_is_no_corrupt_image(plain, monkeypatch):
    source = data.open_split(block(plain, on_corrupt="skip"), "train")

    def fail(number):
        def read(path):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(pathlib.Path, "read_bytes", read)

    fail(errno.EIO)  # of this file's blocks
    assert not source.read(np.arange(2))["mask"].any()
    fail(errno.EMFILE)
    with pytest.raises(UserError, match="Too many open files") as caught:
        source.read(np.arange(2))
    assert caught.value.code == 42


@pytest.mark.parametrize("form", ["jpeg", "png", "gif", "webp"])
def test_a_truncated_image_is_corrupt(form):
    whole = encoded(Image.fromarray(picture(40, 40)), form)
    decode(whole, (8, 8))
    for part in (whole[: len(whole) // 2], whole[:10], b"", b"<html>404</html>"):
        with pytest.raises(Corrupt):
            decode(part, (8, 8))


def truncate_second(plain):
    file = plain / "train/ant/2.PNG"
    file.write_bytes(file.read_bytes()[:60])
    return file


def test_a_corrupt_image_is_reported_with_file_and_position(plain):
    file = truncate_second(plain)
    with pytest.raises(UserError) as caught:
        everything(data.open_split(block(plain), "train"))
    message = str(caught.value)
    assert f"cannot read {file}: " in message
    assert "on_corrupt=skip" in message and "\n" not in message


def test_skip_masks_exactly_the_corrupt_image(plain):
    truncate_second(plain)
    source = data.open_split(block(plain, on_corrupt="skip"), "train")
    (plain / "train/ant/10.bmp").rename(plain / "train/ant/11.bmp")  # after it was listed
    assert everything(source)["mask"].tolist() == [False, False, True]
    (plain / "train/ant/11.bmp").rename(plain / "train/ant/10.bmp")
    actual = everything(source)
    assert actual["mask"].tolist() == [True, False, True]
    assert not actual["image"][1].any() and actual["image"][0].any()


def test_an_unknown_on_corrupt_is_refused(plain):
    with pytest.raises(UserError, match=r"data.on_corrupt='skp' is unknown; did you mean skip\?"):
        data.open_split(block(plain, on_corrupt="skp"), "train")


def test_memory_decodes_once(plain):
    source = data.open_split(block(plain, memory=True), "train[:67%]")
    expected = everything(data.open_split(block(plain), "train[:67%]"))
    for file in plain.rglob("*.*"):
        if file.is_file():
            file.unlink()
    assert not source.decodes
    for name, values in everything(source).items():
        np.testing.assert_array_equal(values, expected[name])


def test_memory_keeps_the_mask_of_skipped_images(plain):
    truncate_second(plain)
    source = data.open_split(block(plain, memory=True, on_corrupt="skip"), "train")
    assert everything(source)["mask"].tolist() == [True, False, True]
    loaded = data.open_split(block(plain, on_corrupt="skip"), "train")
    assert data.class_counts(source).tolist() == data.class_counts(loaded).tolist()


def test_imagenet_v2_has_its_classes_by_number(tmp_path):
    """Its folders 0 to 999 are ImageNet's classes in order, without a folder of the split."""
    v2 = tmp_path / "imagenetv2"
    for label in range(12):
        save(v2 / f"{label}/{100 - label}.png", picture(8, 8, label))
    source = data.open_split(block(v2), "val")
    assert source.classes == tuple(map(str, range(12))) and source.name == "imagenetv2"
    outputs = tuple(f"n{label:02}" for label in range(12))  # of a model of ImageNet
    aligned, line = data.align(source, outputs)
    assert "assuming that output i is class i of the set, 0 to 11" in line
    batch = everything(aligned)
    pixels = {image.tobytes(): y for image, y in zip(batch["image"], batch["label"], strict=True)}
    assert pixels == {picture(8, 8, label).tobytes(): label for label in range(12)}
    with pytest.raises(UserError, match="has no labelled split 'train'"):
        data.open_split(block(v2), "train")


def test_folders_of_numbers_below_a_training_set_keep_their_order(tmp_path):
    """As text: it is the labels of runs that exist."""
    for split in ("train", "val"):
        for label in range(12):
            save(tmp_path / f"{split}/{label}/{label}.png", picture(8, 8, label))
    for split in ("train", "val"):
        classes = data.open_split(block(tmp_path), split).classes
        assert classes[:4] == ("0", "1", "10", "11")
    numbered = data.InMemory("numbers", np.zeros((12, 8, 8, 3), np.uint8), range(12), range(12))
    numbered.classes = tuple(map(str, range(12)))
    assert everything(relabel(numbered, classes))["label"].tolist()[:4] == [0, 1, 4, 5]

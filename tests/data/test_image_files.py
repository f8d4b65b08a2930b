"""Which files count as images, and how others are reported: formats, tools' folders, depth."""

import shutil

import pytest
from PIL import Image

from tests.data.test_image_folder import block, everything, picture, save
from vit_scale import config, data
from vit_scale.data import image_files, packing
from vit_scale.data.decode import TRAINING
from vit_scale.errors import UserError
from vit_scale.inspect.samples import from_folder


@pytest.fixture(autouse=True)
def print_again():
    """Print every message again, even if an earlier test has caused it."""
    image_files.print_once.cache_clear()


@pytest.fixture
def small(tmp_path):
    """train: an ant, a bee."""
    for number, name in enumerate(("ant", "bee")):
        save(tmp_path / "train" / name / "1.png", picture(8, 8, number))
    return tmp_path


def count(folder, split="train", **changes) -> int:
    return len(data.open_split(block(folder, **changes), split))


FORMATS = {"avif": "AVIF", "jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "pgm": "PPM"}
FORMATS |= {"mpo": "MPO", "tga": "TGA", "ico": "ICO", "dds": "DDS", "pcx": "PCX", "apng": "PNG"}


@pytest.mark.parametrize("extension", sorted(FORMATS))
def test_every_format_that_pillow_decodes_is_read(small, extension, capsys):
    image = Image.fromarray(picture(16, 16, 3))
    image = image.convert("L") if extension == "pgm" else image
    image.save(small / f"train/bee/2.{extension.upper()}", FORMATS[extension])
    source = data.open_split(block(small, resolution=16), "train")
    actual = everything(source)
    assert actual["label"].tolist() == [0, 1, 1] and actual["mask"].all()
    assert count(small, listing="common") == 2
    assert (small / "train" / "bee" / f"2.{extension.upper()}").is_file()


def test_formats_that_pillow_cannot_decode_are_not_images():
    assert {".jpg", ".jpeg", ".png", ".tif", ".webp", ".bmp", ".gif", ".ppm"} < set(
        image_files.extensions()
    )
    assert not {".h5", ".mpg", ".eps", ".ps", ".grib", ".wmf", ".pdf", ".txt"} & set(
        image_files.extensions()
    )


def test_formats_that_this_pillow_lacks_are_skipped(small, monkeypatch, capsys):
    Image.fromarray(picture(8, 8)).save(small / "train/bee/2.avif")
    with monkeypatch.context() as patch:
        patch.setattr(image_files.features, "check", lambda library: library != "avif")
        image_files.extensions.cache_clear()
        assert count(small) == 2
    assert "1 file is not an image that Pillow" in capsys.readouterr().err
    image_files.extensions.cache_clear()
    assert count(small) == 3


def test_skipped_files_are_counted_and_named(small, capsys):
    for name in ("a.txt", "b.TXT", "c.heic", "noextension", ".hidden.txt", "Thumbs.db"):
        (small / "train/bee" / name).write_bytes(b"no image")
    for split in ("train[:50%]", "train[50%:]"):
        data.open_split(block(small), split)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1, "once, though the set is opened twice"
    assert printed[0].startswith(
        f"vit-scale: {small / 'train'}: 4 files are not images that Pillow "
    )
    assert printed[0].endswith(": .txt 2, .heic 1, no extension 1 (first: bee/a.txt); skipped")


def test_hidden_files_are_skipped_silently(small, capsys):
    (small / "train/bee/.DS_Store").write_bytes(b"")
    assert count(small) == 2 and capsys.readouterr().err == ""


def test_a_class_without_images_names_its_files(small):
    (small / "train/cat").mkdir()
    (small / "train/cat/1.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat has no images; .*\.heic 1 \(first: cat/1.heic"):
        data.open_split(block(small), "train")


def test_images_outside_class_folders_are_counted(small, capsys):
    save(small / "train/3.png", picture(8, 8))
    assert count(small) == 2
    line = "1 image is in no class folder; skipped (first: 3.png)"
    assert line in capsys.readouterr().err


JUNK = ["@eaDir", ".ipynb_checkpoints", ".AppleDouble", "__MACOSX", "#recycle", "$RECYCLE.BIN"]
JUNK += ["lost+found", "System Volume Information", "@Recycle"]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("where", ["train/{}", "train/bee/{}", "train/bee/deep/{}/1.png"])
def test_tools_folders_are_ignored_at_every_depth(small, where, junk):
    save(small / "train/bee/deep/3.png", picture(8, 8))
    save(small / where.format(junk) / "2.png", picture(8, 8))
    source = data.open_split(block(small), "train")
    assert (source.classes, len(source)) == (("ant", "bee"), 3)


def test_tools_folders_are_not_packed_or_inspected(small, tmp_path):
    save(small / "train/bee/@eaDir/1.png/thumb.jpg", picture(8, 8))
    Image.fromarray(picture(8, 8)).save(small / "train/bee/2.jfif", "JPEG")
    assert packing.pack(small, tmp_path / "out", workers=1)["train"] == 3
    shown = from_folder(str(small / "train"), (8, 8), TRAINING)
    assert shown.names == ("1", "1", "2") and shown.images.shape == (3, 8, 8, 3)


def test_earlier_runs_list_the_same_files_as_before(small):
    save(small / "train/bee/@eaDir/1.png", picture(8, 8))
    Image.fromarray(picture(8, 8)).save(small / "train/bee/2.jfif", "JPEG")
    old = config.from_json({}).data
    assert old.listing == "common" and config.base().data.listing == "every"
    assert (count(small, listing="common"), count(small)) == (3, 3)
    listings = [
        data.open_split(block(small, listing=kind), "train")._listing.files.tolist()
        for kind in ("common", "every")
    ]
    assert listings == [
        [b"ant/1.png", b"bee/1.png", b"bee/@eaDir/1.png"],
        [b"ant/1.png", b"bee/1.png", b"bee/2.jfif"],
    ]
    with pytest.raises(UserError, match=r"data.listing='comon' is unknown; did you mean common\?"):
        count(small, listing="comon")


# Depth


def refusal(folder, split="train") -> str:
    with pytest.raises(UserError) as caught:
        data.open_split(block(folder), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_set_one_folder_up_or_down_is_suggested(small, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    shutil.move(small / "train", outer / "set" / "train")
    assert f"; {outer / 'set'} is such a folder: --config.data.path={outer / 'set'}" in refusal(
        outer
    )
    inner = outer / "set" / "train"
    assert f"; {outer / 'set'} is such a folder: " in refusal(inner)


def test_classes_one_level_too_deep_are_explained(small):
    (small / "train").rename(small / "classes")
    (small / "train").mkdir()
    (small / "classes").rename(small / "train/imagenet")
    assert refusal(small) == (
        f"{small}/train/imagenet is the only class of {small}/train and has 2 folders of images "
        f"(ant, bee): the classes are one level too deep; move them up to {small}/train"
    )
    save(small / "val/ant/1.png", picture(8, 8))
    assert f"in {small}/train/imagenet: move them up to {small}/train" in refusal(small, "val")


@pytest.mark.parametrize("more", [(), ("ant",)])
def test_validation_classes_one_level_too_deep_are_explained(small, more):
    save(small / "val/val/ant/1.png", picture(8, 8))
    for name in more:
        save(small / "val" / name / "1.png", picture(8, 8))
    assert f"one level too deep, in {small}/val/val: move them up" in refusal(small, "val")


def test_a_class_with_images_only_in_subfolders_is_mentioned(small, capsys):
    for name in ("cat", "dog"):
        save(small / "train/more" / name / "1.png", picture(8, 8))
    source = data.open_split(block(small), "train")
    assert everything(source)["label"].tolist() == [0, 1, 2, 2]
    printed = capsys.readouterr().err
    assert "train/more has images only in 2 subfolders (cat, dog): all are one class" in printed


def test_a_validation_set_of_one_class_may_have_subfolders(small):
    for day in ("monday", "tuesday"):
        save(small / "val/bee" / day / "1.png", picture(8, 8))
    assert everything(data.open_split(block(small), "val"))["label"].tolist() == [1, 1]


def test_the_same_subfolders_in_every_class_are_not_mentioned(tmp_path, capsys):
    for name in ("ant", "bee"):
        for day in ("monday", "tuesday"):
            save(tmp_path / "train" / name / day / "1.png", picture(8, 8))
    assert count(tmp_path) == 4 and capsys.readouterr().err == ""

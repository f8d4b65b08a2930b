"""Folders whose labels are in a listing: CSV and JSON, splits, packs; a bad file is one line."""

import json

import numpy as np
import pytest

from tests.data.test_array_record import Inline
from tests.data.test_image_folder import block, everything, picture, save
from tests.data.test_tar_shards import refused
from vit_scale import data
from vit_scale.data import packing
from vit_scale.data.sources import labels_of
from vit_scale.data.statistics import all_labels, class_counts, mean_and_std

FILES = ("a.png", "deep/b.png", "ü,1.png")
CSV = {
    "classes": 'file,bee,ant,cat\na.png,1,0,1\ndeep/b.png,0,0,0\n\n"ü,1.png",0,1.0,1\n',
    "value": 'file,age,height\na.png,3,0.5\ndeep/b.png,-1e3,1\n"ü,1.png",7,2.25\n',
}
JSON = {
    "classes": {"a.png": ["bee", "cat"], "deep/b.png": [], "ü,1.png": ["cat", "ant"]},
    "value": {"a.png": [3, 0.5], "deep/b.png": [-1e3, 1], "ü,1.png": [7, 2.25]},
}
HOT = {
    ("classes", "csv"): (("bee", "ant", "cat"), [[1, 0, 1], [0, 0, 0], [0, 1, 1]]),
    ("classes", "json"): (("ant", "bee", "cat"), [[0, 1, 1], [0, 0, 0], [1, 0, 1]]),
    ("value", "csv"): (("age", "height"), [[3, 0.5], [-1000, 1], [7, 2.25]]),
    ("value", "json"): (("0", "1"), [[3, 0.5], [-1000, 1], [7, 2.25]]),
}


@pytest.fixture
def folder(tmp_path):
    for seed, file in enumerate(FILES):
        save(tmp_path / "set" / file, picture(8, 8, seed))
    return tmp_path / "set"


def write(folder, suffix, target, split="train", content=None):
    made = CSV[target] if suffix == "csv" else json.dumps(JSON[target])
    (folder / f"{split}.{suffix}").write_text(content or made)


def opened(folder, target, split="train", **changes):
    return data.open_split(block(folder, target=target, **changes), split)


@pytest.mark.parametrize(("target", "suffix"), HOT)
def test_a_listing_labels_files(folder, tmp_path, target, suffix, monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Inline)
    write(folder, suffix, target)
    source, (names, expected) = opened(folder, target), HOT[target, suffix]
    assert source.classes == names and source.name == "set train"
    batch = everything(source)
    assert batch["mask"].all() and batch["target"].tolist() == expected
    for seed in range(3):
        np.testing.assert_array_equal(batch["image"][seed], picture(8, 8, seed))
    (padded,) = data.eval_batches(source, 4, workers=1)
    assert padded["target"].tolist() == [*expected, [0] * len(names)]
    overrides = [f"data.target={target}"]
    packing.pack(f"folder:{folder}", tmp_path / "out", overrides=overrides)
    packed = opened(tmp_path / "out", target, name="array_record")
    order = [FILES.index(file.decode()) for file in packed.examples.files]
    listed = labels_of(packed, np.arange(3))
    monkeypatch.setattr(type(packed), "_targets", None)  # as of an older pack: in the records only
    for other in (listed, labels_of(packed, np.arange(3)), everything(packed)["target"]):
        np.testing.assert_array_equal(other, batch["target"][order])
    half, again = (opened(folder, target, "train[:50%]") for _ in range(2))
    assert len(half) == 1 and data.describe(half) == data.describe(again)
    if target == "classes":
        assert class_counts(source).tolist() == np.sum(expected, 0).tolist()
    else:
        mean, std = mean_and_std(source)
        np.testing.assert_allclose(mean, np.mean(expected, 0), rtol=1e-12)
        np.testing.assert_allclose(std, np.std(expected, 0), rtol=1e-12)


def test_other_splits_have_the_classes_of_the_training_listing(folder):
    write(folder, "csv", "classes")
    write(folder, "csv", "classes", "val", "file,cat,bee,ant\na.png,1,0,0\n")
    source = opened(folder, "classes", "test")
    assert source.classes == ("bee", "ant", "cat") and source.name == "set val"
    assert everything(source)["target"].tolist() == [[0, 0, 1]]
    write(folder, "csv", "classes", "val", "file,cat,bee\na.png,1,0\n")
    assert "have different columns ('ant')" in refused(lambda: opened(folder, "classes", "val"))
    write(folder, "csv", "value")
    write(folder, "csv", "value", "val", "file,height,age\na.png,1,2\n")
    assert everything(opened(folder, "value", "val"))["target"].tolist() == [[2, 1]]
    (folder / "train.csv").unlink()
    write(folder, "json", "classes")
    (folder / "val.csv").unlink()
    write(folder, "json", "classes", "val", '{"a.png": ["dog"]}')
    message = refused(lambda: opened(folder, "classes", "val"))
    assert "val.json (a.png): class dog is none of the 3 known" in message


@pytest.mark.parametrize(
    ("suffix", "target", "content", "message"),
    [
        (
            "csv",
            "classes",
            "a.png,ant\n",
            "begins with the header file,NAME,NAME,..., of",
        ),
        ("csv", "classes", "file,ant,ant\n", "not 'file,ant,ant'"),
        ("csv", "classes", "file,labels\na.png,ant bee\n", "line 2: 'ant bee' is not a number"),
        ("csv", "classes", "file,ant\na.png,2\n", "image 1 has 2 in column 2; with data.target=cl"),
        ("csv", "value", "file,age\na.png,1,2\n", "line 2 has 3 cells, and the header 2"),
        ("csv", "value", 'file,age\n"a.png,1\n' + "b.png,2\n" * 20_000, "field larger than field"),
        ("csv", "value", "file,age\na.png,nan\n", "train.csv (a.png): nan is not finite"),
        ("csv", "value", "file,age\n", "lists no image"),
        ("csv", "value", "file,age\na.png,1\na.png,2\n", "lists a.png twice"),
        ("json", "value", '{"a.png": 1, "a.png": 2}', "lists a.png twice"),
        ("json", "classes", "{", "is not JSON ("),
        ("json", "classes", "[1]", 'data.target=classes: {"FILE": ["CLASS", ...], ...}'),
        ("json", "classes", '{"a.png": "ant"}', 'data.target=classes: {"FILE": ["CLASS", ...]'),
        ("json", "classes", '{"a.png": [1]}', "has numbers for classes; a listing has names"),
        ("json", "value", '{"a.png": "old"}', "'old' is not a number"),
        (
            "json",
            "value",
            '{"a.png": 1, "b.png": [1, 2]}',
            "it has 2 numbers, and the training set",
        ),
    ],
)
def test_a_bad_listing_is_one_line(folder, suffix, target, content, message):
    write(folder, suffix, target, content=content)
    assert message in refused(lambda: opened(folder, target))


def test_what_is_missing_is_one_line(folder):
    message = refused(lambda: opened(folder, "classes"))
    assert "has no listing of split 'train': data.target=classes needs train.csv or" in message
    write(folder, "csv", "classes")
    write(folder, "json", "classes")
    assert "has both train.csv and train.json" in refused(lambda: opened(folder, "classes"))
    (folder / "train.json").unlink()
    (folder / "a.png").unlink()
    assert f"cannot read {folder}/a.png" in refused(lambda: everything(opened(folder, "classes")))


def test_labels_are_known_without_images(folder, tmp_path):
    """Of class folders, slices and mixtures too; none of the files is read."""
    for number, name in enumerate(("ant", "bee", "bee", "cat")):
        save(tmp_path / f"plain/train/{name}/{number}.png", picture(8, 8)).write_bytes(b"")
    plain = opened(tmp_path / "plain", "class")
    assert all_labels(plain).tolist() == [0, 1, 1, 2] and class_counts(plain).tolist() == [1, 2, 1]
    half = opened(tmp_path / "plain", "class", "train[:75%]")
    assert all_labels(half).tolist() == all_labels(plain)[half._indices].tolist()
    (tmp_path / "plain/train/ant/0.png").rename(tmp_path / "plain/train/cat/0.png")
    (tmp_path / "plain/train/ant").rmdir()
    other = opened(tmp_path / "plain", "class")
    mixed = data.Mixture([other, plain], (1, 1))
    assert mixed.classes == ("bee", "cat", "ant")
    assert all_labels(mixed).tolist() == [0, 0, 1, 1, 2, 0, 0, 1]
    relabelled, _ = data.align(plain, ("cat", "ant", "bee"))
    assert all_labels(relabelled).tolist() == [1, 2, 2, 0]

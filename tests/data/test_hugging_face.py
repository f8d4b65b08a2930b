"""Hugging Face's sets: columns are found by type, and what is ambiguous or missing is one line."""

import json
import sys
import types

import numpy as np
import pytest

from tests.data.test_image_folder import block, everything, picture
from tests.data.test_tar_shards import png, refused
from vit_scale import config, data
from vit_scale.data import image_files
from vit_scale.runs import resume

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
FILES = ["b/1.png", "a/2.png", "b/3.png"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    image_files.print_once.cache_clear()


def rows(labels=(1, 0, 1), names=("ant", "bee"), files=FILES, **more):
    """Three pictures, of seeds 1 to 3, in columns "img" and "label"."""
    images = [{"bytes": png(i), "path": file} for i, file in enumerate(files, 1)]
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = {"img": datasets.Image(), "label": label} | {k: f for k, (f, _) in more.items()}
    columns = {"img": images, "label": list(labels)} | {k: v for k, (_, v) in more.items()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def hf_block(path, **changes):
    return block(path, name="huggingface", **changes)


@pytest.fixture
def folder(tmp_path):
    rows().to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    rows((0,), files=["a/9.png"]).to_parquet(tmp_path / "set/validation-00000-of-00001.parquet")
    return tmp_path / "set"


@pytest.mark.parametrize(
    "pattern", ["", "/{split}-*.parquet", "/{split}-00000-of-{00001..00001}.parquet"]
)
def test_parquet_files(folder, pattern):
    source = data.open_split(hf_block(f"{folder}{pattern}"), "train")
    batch = everything(source)
    assert source.classes == ("ant", "bee") and batch["label"].tolist() == [1, 0, 1]
    for i, image in enumerate(batch["image"], 1):
        np.testing.assert_array_equal(image, picture(8, 8, i))
    assert source.examples.files.tolist() == [file.encode() for file in FILES]
    test = data.open_split(hf_block(f"{folder}{pattern}"), "test")
    assert (len(test), everything(test)["label"].tolist()) == (1, [0])


def test_a_saved_set(tmp_path):
    datasets.DatasetDict({"train": rows(), "test": rows((1,), files=["x"])}).save_to_disk(
        tmp_path / "both"
    )
    assert len(data.open_split(hf_block(tmp_path / "both"), "test")) == 1
    rows().select([2, 0]).save_to_disk(tmp_path / "one")
    source = data.open_split(hf_block(tmp_path / "one"), "train")
    assert everything(source)["label"].tolist() == [1, 1]
    np.testing.assert_array_equal(everything(source)["image"][0], picture(8, 8, 3))
    assert source.examples.files.tolist() == [b"3.png", b"1.png"]  # save_to_disk shortens them
    assert "has no split 'val'; it has train" in refused(
        lambda: data.open_split(hf_block(tmp_path / "one"), "val")
    )


def test_a_plain_table_of_bytes(tmp_path):
    """Without Hugging Face's metadata, and without paths: sliced by position, which is said."""
    table = pa.table({"jpg": [png(1), png(2)], "cls": [3, 0], "note": ["x", "y"]})
    pq.write_table(table, tmp_path / "train.parquet")
    source = data.open_split(hf_block(tmp_path), "train")
    assert source.classes == ("0", "1", "2", "3") and source.examples is None
    assert everything(source)["label"].tolist() == [3, 0]
    assert data.describe(data.open_split(hf_block(tmp_path), "train[:50%]"))["slices"] == "position"


def test_text_labels_are_numbered_by_the_training_set(tmp_path):
    for split, labels in (("train", "bab"), ("test", "b")):
        text = (datasets.Value("string"), list(labels))
        table = rows((0,) * len(labels), None, FILES[: len(labels)], kind=text)
        table.remove_columns("label").to_parquet(tmp_path / f"{split}.parquet")
    train, test = (data.open_split(hf_block(tmp_path), split) for split in ("train", "test"))
    assert train.classes == test.classes == ("a", "b")
    assert everything(train)["label"].tolist() == [1, 0, 1]
    assert everything(test)["label"].tolist() == [1]


def test_named_classes_are_numbered_as_in_the_training_set(tmp_path):
    own = {"names": ("bee", "ant"), "files": ["x", "y", "z"]}
    others = {"set": rows((1, 0, 0), **own), "other": rows((0,) * 3, ("wolf",))}
    for name, validation in others.items():
        both = datasets.DatasetDict({"train": rows(), "validation": validation})
        both.save_to_disk(tmp_path / name)
    source = data.open_split(hf_block(tmp_path / "set"), "val")
    assert source.classes == ("ant", "bee") and everything(source)["label"].tolist() == [0, 1, 1]
    message = refused(lambda: data.open_split(hf_block(tmp_path / "other"), "val"))
    assert "class 'wolf' of label is not in the training set" in message


def test_labels_that_are_no_classes(tmp_path):
    def open_column(set_of_rows, name, **changes):
        set_of_rows.save_to_disk(tmp_path / name)
        return data.open_split(hf_block(tmp_path / name, **changes), "train")

    truth = rows(sure=(datasets.Value("bool"), [True, False, True]))
    source = open_column(truth, "bool", label_column="sure")
    assert source.classes == ("False", "True")
    assert everything(source)["label"].tolist() == [1, 0, 1]
    share = rows(share=(datasets.Value("float32"), [0.5, 1, 2]))
    message = refused(lambda: open_column(share, "float", label_column="share"))
    assert "column share has floating-point numbers, not classes" in message
    message = refused(lambda: open_column(rows((10**9, 1, 2), names=()), "ids"))
    assert "labels up to 1,000,000,000 in 3 rows, as an id would" in message


def test_a_split_of_labels_that_are_none_has_none(tmp_path):
    none = rows((None,) * 3, files=["x", "y", "z"])
    splits = {"train": rows(), "validation": rows((1, 1, 1)), "test": none}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    source = data.open_split(hf_block(tmp_path / "set"), "test")
    assert everything(source)["label"].tolist() == [1, 1, 1]


def test_columns_are_named_where_their_types_do_not_decide(tmp_path):
    more = {"coarse": (datasets.ClassLabel(names=["x", "y", "z"]), [2, 2, 0])}
    rows(**more).to_parquet(tmp_path / "train.parquet")
    error = refused(lambda: data.open_split(hf_block(tmp_path), "train"))
    assert "columns label, coarse might be the labels" in error
    assert "set --config.data.label_column" in error
    coarse = {"label_column": "coarse"}
    source = data.open_split(hf_block(tmp_path, **coarse), "train")
    assert source.classes == ("x", "y", "z") and everything(source)["label"].tolist() == [2, 2, 0]
    error = refused(
        lambda: data.open_split(hf_block(tmp_path, image_column="imgs", **coarse), "train")
    )
    assert "data.image_column='imgs' is not in" in error and "did you mean img?" in error


def test_a_set_on_the_hub_is_pinned_to_its_revision(monkeypatch, tmp_path, folder):
    """A run records what it began with, and resumes with it, though the hub has a newer one."""
    newest, opened = ["a" * 40], []

    def load(name, revision=None):
        opened.append((name, revision))
        return datasets.DatasetDict({"train": rows()})

    builder = lambda name: types.SimpleNamespace(hash=newest[0])  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", load)

    def config_of(**fields):
        cfg = config.base()
        cfg.data = hf_block("nobody/set", **fields)
        return cfg

    mixed = (("huggingface:nobody/set", 1.0), (f"huggingface:{folder}", 2), ("folder:x", 1.0))
    first = data.pinned(config_of(mixture=mixed))
    assert first.data.path == f"nobody/set@{'a' * 40}"
    assert first.data.mixture[0] == (f"huggingface:nobody/set@{'a' * 40}", 1.0)
    assert first.data.mixture[1:] == mixed[1:] and data.pinned(first) == first
    (tmp_path / "run.json").write_text(json.dumps({"config": config.to_json(first)}))
    newest[0] = "b" * 40
    resumed = data.pinned(resume.resumed_config(config_of(mixture=mixed), tmp_path))
    assert resumed.data == first.data
    moved = config_of(mixture=(("huggingface:other/set", 1.0), *mixed[1:]))
    moved.data.path = f"nobody/set@{'c' * 40}"
    resumed = data.pinned(resume.resumed_config(moved, tmp_path))
    assert resumed.data.mixture[0][0] == f"huggingface:other/set@{'b' * 40}"
    assert resumed.data.path == moved.data.path
    data.open_split(first.data, "train")
    data.open_split(hf_block("nobody/set"), "train")
    assert opened == [("nobody/set", "a" * 40), ("nobody/set", None)]


def test_what_cannot_be_opened_is_one_line(tmp_path, folder, monkeypatch, capsys):
    assert "cannot open nobody/nothing with Hugging Face's datasets: " in refused(
        lambda: data.open_split(hf_block("nobody/nothing"), "train")
    )
    assert "no Parquet file matches data.path=" in refused(
        lambda: data.open_split(hf_block(f"{tmp_path}/{{split}}.parquet"), "train")
    )
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    assert f"cannot open {folder} with" in refused(
        lambda: data.open_split(hf_block(folder), "train")
    )
    rows(labels=(0, -1, 1)).to_parquet(tmp_path / "unlabelled/train.parquet")
    assert "label -1 at position 1 is outside the 2 classes" in refused(
        lambda: data.open_split(hf_block(tmp_path / "unlabelled"), "train")
    )
    rows(labels=(-1, -1, -1)).to_parquet(tmp_path / "unlabelled/test.parquet")
    rows().to_parquet(tmp_path / "unlabelled/train.parquet")
    assert "unlabelled: split test has no labels, all are -1" in refused(
        lambda: data.open_split(hf_block(tmp_path / "unlabelled"), "test")
    )
    rows(labels=(1, 1, 0)).to_parquet(tmp_path / "unlabelled/validation.parquet")
    source = data.open_split(hf_block(tmp_path / "unlabelled"), "test")
    assert source.name.endswith(" validation")
    assert everything(source)["label"].tolist() == [1, 1, 0]
    assert "test has no labels, all are -1: validation is read\n" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets: launch/environment.sh hf" in refused(
        lambda: data.open_split(hf_block(folder), "train")
    )


def test_corrupt_images_are_named_or_skipped(tmp_path):
    images = [{"bytes": png(1), "path": "1"}, {"bytes": png(2)[:50], "path": "2"}]
    images.append({"bytes": None, "path": str(tmp_path / "none.png")})
    pq.write_table(pa.table({"img": images, "label": [0, 1, 0]}), tmp_path / "train.parquet")
    source = data.open_split(hf_block(tmp_path), "train")
    assert f"cannot read row 1 of {tmp_path} train: " in refused(lambda: everything(source))
    assert "none.png: No such file" in refused(lambda: source.read(np.array([2])))
    skipping = data.open_split(hf_block(tmp_path, on_corrupt="skip"), "train")
    assert everything(skipping)["mask"].tolist() == [True, False, False]

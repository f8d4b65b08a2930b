"""Names of classes and files: any bytes, any script; nothing is renamed, and nothing ends in a
traceback."""

import json
import os

import numpy as np
import pytest

import vit_scale
from tests.data.test_image_folder import block, everything, picture, save
from tests.helpers.tiny import tiny_config
from vit_scale import data
from vit_scale.data import packing
from vit_scale.errors import UserError, printable
from vit_scale.inspect import inspect
from vit_scale.training import trainer

LATIN = os.fsdecode(b"caf\xe9")
ODD = (LATIN, "a, b", "line\nbreak", "$\\frac$", "猫", "कुत्ता", "שלום", "👩‍👩‍👧", " x ", "<b>&amp;")


@pytest.fixture
def odd(tmp_path):
    """train and val: an image of each class with an odd name, in a file with that name."""
    for number, name in enumerate(ODD):
        for split in ("train", "val"):
            folder = tmp_path / LATIN / split / name
            save(folder / "1.png", picture(8, 8, number)).rename(folder / f"{name}.png")
    return tmp_path / LATIN


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (LATIN, r"caf\xe9"),
        ("line\nbreak\t", r"line\nbreak\t"),
        ("\ud83d", r"\ud83d"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u2028", r"\u2028"),
        *((name, name) for name in ("a, b", "猫", "कुत्ता", "שלום", "👩‍👩‍👧", "می‌خواهم")),
    ],
)
def test_a_name_is_printed_on_one_line(name, shown):
    assert printable(name) == shown
    shown.encode()


def test_no_class_is_renamed(odd, tmp_path):
    source = data.open_split(block(odd), "train")
    assert set(source.classes) == set(ODD)
    assert everything(source)["mask"].all()
    packing.pack(odd, tmp_path / "out", workers=1)
    packed = data.open_split(block(tmp_path / "out", name="array_record"), "val")
    assert packed.classes == source.classes and everything(packed)["mask"].all()


@pytest.mark.slow
def test_a_run_works_with_odd_class_names(odd, tmp_path, run_cli):
    """Train, evaluate, load, predict and inspect, with strict output encodings."""
    fields = ("data.name=folder", f"data.path={odd}", "data.resolution=16", "data.batch=2")
    cfg = tiny_config(*fields, f"model.classes={len(ODD)}", "eval.split=val", "eval.final=val")
    cfg.update({"steps": 2})
    cfg.eval.batch = 2
    run = tmp_path / "run"
    trainer.train(cfg, run, "odd", quiet=True)
    assert set(json.loads((run / "run.json").read_text())["classes"]) == set(ODD)
    assert set(vit_scale.load(run).classes) == set(ODD)
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    done = run_cli("predict", run, odd / "val" / LATIN / f"{LATIN}.png", env=strict)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and lines[0].endswith(r"val/caf\xe9/caf\xe9.png")
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    done = run_cli("predict", run, odd / "val/猫/猫.png", env=ascii_only)
    assert done.returncode == 0, done.stderr
    actual = inspect([str(run)], None, None, None, (), False)
    page = (run / "inspect/index.html").read_text()
    assert r"caf\xe9" in page and actual["page"]
    assert trainer.train(cfg, run, "odd", quiet=True)["step"] == 2


def test_an_error_about_an_odd_name_is_one_line(odd, run_cli, tmp_path):
    (odd / "val" / "new\nclass").mkdir()
    save(odd / "val" / "new\nclass" / "1.png", picture(8, 8))
    with pytest.raises(UserError):
        data.open_split(block(odd), "val")
    done = run_cli("predict", tmp_path / LATIN, "x\ny.png")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert r"caf\xe9" in done.stderr


# Words that replace WordNet ids


@pytest.fixture
def ids(tmp_path):
    for name in ("n01", "n02", "n03", "other, class"):
        save(tmp_path / "train" / name / "1.png", picture(8, 8))
    return tmp_path


def classes(folder, **changes):
    return data.open_split(block(folder, **changes), "train").classes


WORDS = "n01\tcrane, bird\nn02\tcrane\nn03\tcafé, coffee house\n"
EXPECTED = ("crane (n01)", "crane (n02)", "café", "other, class")


@pytest.mark.parametrize(
    "content",
    [
        WORDS.encode(),
        b"\xef\xbb\xbf" + WORDS.encode(),
        WORDS.replace("\n", "\r\n").encode(),
        WORDS.replace("\n", "\r").encode(),
        WORDS.encode("latin-1"),
        WORDS.encode("cp1252"),
        WORDS.encode("utf-16"),
        b"\xef\xbb\xbf" + WORDS.replace("\n", "\r\n").encode(),
    ],
    ids=["utf-8", "bom", "crlf", "cr", "latin-1", "cp1252", "utf-16", "bom-crlf"],
)
def test_words_in_any_encoding(ids, content):
    (ids / "words.txt").write_bytes(content)
    assert classes(ids) == EXPECTED


@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe\x81\n", b"n01", b"n01\t\n", b"\xff\xfe\x00"])
def test_words_files_without_words_are_ignored(ids, content):
    (ids / "words.txt").write_bytes(content)
    assert classes(ids) == ("n01", "n02", "n03", "other, class")


def test_only_words_are_cut_at_a_comma(ids):
    assert classes(ids)[-1] == "other, class"
    assert classes(ids, listing="common")[-1] == "other", "as in earlier runs"


def test_words_that_equal_another_class_name(ids):
    save(ids / "train/crane/1.png", picture(8, 8))
    (ids / "words.txt").write_text("n01\tcrane\nn02\tbee\n")
    assert set(classes(ids)) == {"crane", "crane (n01)", "bee", "n03", "other, class"}
    save(ids / "train/crane (n01)/1.png", picture(8, 8))
    assert set(classes(ids)) == {"crane", "crane (n01)", "n01", "n02", "n03", "other, class"}


def test_annotations_with_windows_line_ends_and_odd_file_names(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / "train/n01/1.png", picture(8, 8))
    save(tmp_path / "train/n02/1.png", picture(8, 8))
    save(tmp_path / "val/images/1.png", picture(8, 8, 1))
    (tmp_path / "val/images/1.png").rename(tmp_path / "val/images" / name)
    text = b"\xef\xbb\xbfcaf\xe9.png\tn02\t0\t0\t1\t1\r\n\r\n"
    (tmp_path / "val/val_annotations.txt").write_bytes(text)
    actual = everything(data.open_split(block(tmp_path), "val"))
    assert actual["label"].tolist() == [1]
    np.testing.assert_array_equal(actual["image"][0], picture(8, 8, 1))

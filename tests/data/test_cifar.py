"""CIFAR-10: both layouts give the same pixels, and malicious files do no harm."""

import os
import pickle
import struct

import numpy as np
import pytest

from vit_scale import data
from vit_scale.config import base
from vit_scale.data import cifar
from vit_scale.errors import UserError

N = 20  # images a file, instead of 10,000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cifar, "IMAGES", N)


def block(path):
    cfg = base().data
    cfg.path = str(path)
    return cfg


def content(number: int) -> tuple[np.ndarray, list[int]]:
    draw = np.random.RandomState(number)
    return draw.randint(0, 256, (N, 3072)).astype(np.uint8), draw.randint(0, 10, N).tolist()


def python3(planes, labels) -> bytes:
    return pickle.dumps({b"labels": labels, b"data": planes}, protocol=3)


def python3_protocol2(planes, labels) -> bytes:
    return pickle.dumps({"labels": labels, "data": planes}, protocol=2)


def python2(planes, labels) -> bytes:
    """The official archive's opcodes: Python 2 strings, numpy 1 names."""
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    dtype = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    pixels = b"T" + struct.pack("<i", planes.size) + planes.tobytes()
    state = (
        b"(K\x01" + b"K" + bytes([N]) + b"M" + struct.pack("<H", 3072) + b"\x86" + dtype + b"\x89"
    )
    whole = b"U\x06labels](" + numbers + b"e" + b"U\x04data" + array + state + pixels + b"tb"
    return b"\x80\x02}(" + whole + b"u."


def binary(planes, labels) -> bytes:
    return np.column_stack([np.array(labels, np.uint8), planes]).tobytes()


def write(folder, encode, ending=""):
    folder.mkdir(parents=True)
    for number, stem in enumerate((*cifar.BATCHES["train"], *cifar.BATCHES["test"])):
        (folder / f"{stem}{ending}").write_bytes(encode(*content(number)))
    return folder


@pytest.mark.parametrize(
    ("layout", "encode", "ending"),
    [
        ("cifar-10-batches-bin", binary, ".bin"),
        ("cifar-10-batches-py", python2, ""),
        ("cifar-10-batches-py", python3, ""),
        ("cifar-10-batches-py", python3_protocol2, ""),
    ],
)
def test_every_layout_gives_the_same_pixels(tmp_path, layout, encode, ending):
    folder = write(tmp_path / layout, encode, ending)
    for path in (tmp_path, folder):
        train, test = (data.open_split(block(path), name) for name in ("train", "test"))
        assert (len(train), len(test)) == (5 * N, N)
        assert train.classes[3] == "cat" and train.size == (32, 32) and not train.decodes
        actual = train.read(np.array([2 * N + 7]))
        planes, labels = content(2)
        assert actual["label"].tolist() == [labels[7]]
        assert actual["image"][0, 5, 9].tolist() == planes[7].reshape(3, 32, 32)[:, 5, 9].tolist()
        assert test.read(np.arange(N))["label"].tolist() == content(5)[1]


def test_a_missing_set_is_a_one_line_error_with_the_download_command(tmp_path):
    with pytest.raises(UserError) as caught:
        data.open_split(block(tmp_path), "train")
    message = str(caught.value)
    assert f"vit-scale data download cifar10 --out {tmp_path}" in message
    assert "cifar-10-python.tar.gz" in message and "\n" not in message


def refusal(tmp_path, layout, encode, ending, stem, change):
    """Return the error of opening a set whose file `stem` was changed."""
    folder = write(tmp_path / layout, encode, ending)
    file = folder / f"{stem}{ending}"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError) as caught:
        data.open_split(block(tmp_path), "train")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], f"ends at byte {N * 3073 - 1}, in image {N - 1}"),
        (lambda rows: rows[: 4 * 3073], f"ends at byte {4 * 3073}, in image 4"),
        (lambda rows: rows + rows, f"ends at byte {2 * N * 3073}"),
        (lambda rows: b"", "ends at byte 0"),
        (
            lambda rows: rows[: 6 * 3073] + b"\x0a" + rows[6 * 3073 + 1 :],
            "label 10 at position 6 is outside the 10 classes",
        ),
    ],
)
def test_broken_binary_names_the_file_and_position(tmp_path, change, message):
    actual = refusal(tmp_path, "cifar-10-batches-bin", binary, ".bin", "data_batch_3", change)
    assert message in actual


def test_a_missing_file_is_named(tmp_path):
    folder = write(tmp_path / "cifar-10-batches-bin", binary, ".bin")
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_2.bin: No such file or directory"):
        data.open_split(block(tmp_path), "train")


class Malicious:
    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "byte "),
        (lambda raw: b"", "byte 0"),
        (lambda raw: b"\x80\x03]q\x00.", "object has no attribute"),
        (lambda raw: pickle.dumps({b"labels": [0] * N}), "'data'"),
        (lambda raw: python3(np.zeros((N, 3), np.uint8), [0] * N), f"uint8 pixels ({N}, 3)"),
        (lambda raw: python3(np.zeros((N, 3072)), [0] * N), "asks for an array of 'f8'"),
        (lambda raw: python3(content(0)[0], [0] * 3), "labels (3,)"),
        (lambda raw: python3(content(0)[0], [0] * 9 + [10] * 11), "label 10 at position 9"),
        (lambda raw: python3(content(0)[0], [-1] * N), "label -1 at position 0"),
    ],
)
def test_broken_pickle_names_the_file_and_position(tmp_path, change, message):
    assert message in refusal(tmp_path, "cifar-10-batches-py", python3, "", "data_batch_1", change)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "arguments", "asked"),
    [
        (os.system, ("touch harmed",), "posix.system"),
        (eval, ("open('harmed', 'w')",), "builtins.eval"),
        (getattr, (np.ndarray, "tofile"), "builtins.getattr"),
        (np.load, ("harmed",), "numpy"),
    ],
)
def test_a_malicious_pickle_executes_nothing(
    tmp_path, monkeypatch, protocol, call, arguments, asked
):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps({"data": Malicious(call, *arguments), "labels": []}, protocol)
    message = refusal(tmp_path, "cifar-10-batches-py", python3, "", "data_batch_1", lambda _: evil)
    assert f"asks for {asked}" in message.replace("__builtin__", "builtins")  # Python 2's name
    assert not (tmp_path / "harmed").exists()


def test_only_latin1_is_decoded(tmp_path):
    bomb = pickle.dumps({"data": Malicious(__import__("_codecs").encode, b"aaaa", "zlib")}, 2)
    message = refusal(tmp_path, "cifar-10-batches-py", python3, "", "data_batch_1", lambda _: bomb)
    assert "codec 'zlib'" in message

"""Packed sets: packing is lossless, an interrupted pack resumes, errors name the damaged file."""

import concurrent.futures
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.data.test_image_folder import block, everything, picture, save
from vit_scale import data
from vit_scale.data import packing, shards
from vit_scale.errors import UserError

N = 20


class Inline(concurrent.futures.Executor):
    """Runs each job in this process as soon as it is submitted, where a test can observe it."""

    def __init__(self, *_):
        pass

    def submit(self, function, /, *arguments):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except UserError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Inline)


@pytest.fixture
def folder(tmp_path):
    """`train`: 20 images in 4 classes; `val`: 2."""
    for number in range(N):
        save(
            tmp_path / "set/train" / f"class_{number % 4}" / f"{number}.png", picture(8, 8, number)
        )
    for number in range(2):
        save(tmp_path / "set/val" / "class_3" / f"{number}.png", picture(8, 8, 100 + number))
    return tmp_path / "set"


def packed_block(out, **changes):
    return block(out, name="array_record", **changes)


def as_set(actual) -> set:
    return {
        (int(label), image.tobytes())
        for image, label in zip(actual["image"], actual["label"], strict=True)
    }


def test_packing_shuffles_the_images_and_loses_none(folder, tmp_path):
    """With real worker processes."""
    assert packing.pack(folder, tmp_path / "out", workers=2, shard=6) == {
        "train": N,
        "val": 2,
        "skipped": 0,
    }
    for split in ("train", "test"):
        source = data.open_split(packed_block(tmp_path / "out"), split)
        original = data.open_split(block(folder), split)
        assert (source.classes, source.size, len(source)) == (
            original.classes,
            (8, 8),
            len(original),
        )
        assert as_set(everything(source)) == as_set(everything(original))
    train = data.open_split(packed_block(tmp_path / "out"), "train")
    assert everything(train)["label"].tolist() != sorted(everything(train)["label"].tolist())


def test_image_files_are_packed_byte_for_byte(folder, tmp_path, inline):
    packing.pack(folder, tmp_path / "out", shard=6)
    source = data.open_split(packed_block(tmp_path / "out"), "train")
    actual = {source.encoded(index)[0] for index in range(N)}
    assert actual == {file.read_bytes() for file in (folder / "train").rglob("*.png")}


def test_larger_images_are_reduced(folder, tmp_path, inline):
    """Their shorter side; files that are small enough are stored byte for byte."""
    photo = np.uint8(np.add.outer(np.arange(40), np.arange(80))[..., None] + [0, 30, 60])
    save(folder / "train/class_0/photo.png", photo)
    counts = packing.pack(folder, tmp_path / "out", shard=6, shorter_side=16, quality=90)
    assert counts == {"train": N + 1, "val": 2, "skipped": 0}
    source = data.open_split(packed_block(tmp_path / "out"), "train")
    stored = {source.encoded(index)[0] for index in range(N + 1)}
    untouched = {file.read_bytes() for file in (folder / "train").rglob("*.png")}
    assert len(stored & untouched) == N
    (reduced,) = stored - untouched
    with Image.open(io.BytesIO(reduced)) as image:
        assert (image.format, image.size) == ("JPEG", (32, 16))
        theirs = Image.fromarray(photo).resize((32, 16), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(theirs))
        assert difference.mean() < 1.5 and np.ptp(np.asarray(image)) > 100
    other = data.open_split(block(folder), "train[:50%]")
    half = data.open_split(packed_block(tmp_path / "out"), "train[:50%]")
    assert data.describe(half)["fingerprint"] == data.describe(other)["fingerprint"]
    with pytest.raises(UserError, match="has shards of other images or options"):
        packing.pack(folder, tmp_path / "out", shard=6, shorter_side=20, quality=90)
    with pytest.raises(UserError, match="--shorter-side 8 must be at least 0, and --quality 101"):
        packing.pack(folder, tmp_path / "new", shorter_side=8, quality=101)


def test_packing_is_deterministic(folder, tmp_path, inline):
    for out in ("a", "b"):
        packing.pack(folder, tmp_path / out, shard=6)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names[:3] == [
        "index.json",
        "train-00000-of-00004.array_record",
        "train-00001-of-00004.array_record",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_workers_read_the_same_records(folder, tmp_path, inline):
    packing.pack(folder, tmp_path / "out", shard=6)
    source = data.open_split(packed_block(tmp_path / "out"), "train")
    everything(source)  # opens its readers, which must not be pickled
    alone = list(data.eval_batches(source, 8))
    together = list(data.eval_batches(source, 8, workers=1))
    for one, other in zip(alone, together, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_an_interrupted_pack_resumes(folder, tmp_path, inline, monkeypatch):
    out, write = tmp_path / "out", shards.write_shard
    written = []

    def count(shard):
        written.append(shard.file.name)
        return write(shard)

    def fail_at_the_third(shard):
        if len(written) == 2:
            raise KeyboardInterrupt
        return count(shard)

    monkeypatch.setattr(shards, "write_shard", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        packing.pack(folder, out, shard=6)
    with pytest.raises(UserError, match="is not packed completely; run `vit-scale data pack"):
        data.open_split(packed_block(out), "train")
    first = {file: file.stat().st_mtime_ns for file in out.glob("*.array_record")}
    assert len(first) == 2
    monkeypatch.setattr(shards, "write_shard", count)
    assert packing.pack(folder, out, shard=6)["train"] == N
    assert len(written) == len(set(written)) == 5
    assert {file: file.stat().st_mtime_ns for file in first} == first
    assert len(data.open_split(packed_block(out), "train")) == N
    assert packing.pack(folder, out, shard=6)["train"] == N and len(written) == 5


def test_a_failed_shard_leaves_no_file(folder, tmp_path, inline):
    (folder / "train/class_1/5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*class_1/5.png: .*on-corrupt skip"):
        packing.pack(folder, tmp_path / "out", shard=100)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"index.json", "val-00000-of-00001.array_record"}


def test_images_without_labels_are_not_packed(folder, tmp_path):
    with pytest.raises(UserError, match="data pack needs labels"):
        packing.pack(folder, tmp_path / "out", overrides=["data.target=none"])
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_skipped_and_counted(folder, tmp_path, inline):
    (folder / "train/class_1/5.png").write_bytes(b"no image")
    counts = packing.pack(folder, tmp_path / "out", on_corrupt="skip", shard=6)
    assert counts == {"train": N - 1, "val": 2, "skipped": 1}
    actual = everything(data.open_split(packed_block(tmp_path / "out"), "train"))
    assert len(actual["mask"]) == N - 1 and actual["mask"].all()


def test_a_full_disk_is_a_one_line_error(folder, tmp_path, inline, monkeypatch):
    class Full:
        def __init__(self, path, options):
            open(path, "wb").close()

        def write(self, record):
            raise RuntimeError("write failed\nNo space left on device")

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(UserError) as caught:
        packing.pack(folder, tmp_path / "out")
    assert ".array_record: write failed No space left on device; free space" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["index.json"]


@pytest.mark.parametrize("change", ["images", "options", "foreign"])
def test_packing_into_the_folder_of_another_set_is_refused(folder, tmp_path, inline, change):
    out = tmp_path / "out"
    packing.pack(folder, out, shard=6)
    if change == "images":
        save(folder / "train/class_0/new.png", picture(8, 8))
    if change == "foreign":
        (out / "index.json").unlink()
    with pytest.raises(UserError, match="has shards of other images or options"):
        packing.pack(folder, out, shard=5 if change == "options" else 6)


# Damage


@pytest.fixture
def packed(folder, tmp_path, inline):
    packing.pack(folder, tmp_path / "out", shard=6)
    return tmp_path / "out"


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 4
    file.write_bytes(raw)


def test_a_flipped_bit_is_reported_with_file_and_position(packed):
    """Even if the image would still decode: a checksum covers the label and the pixels."""
    source = data.open_split(packed_block(packed), "train")
    image, _ = source.encoded(8)
    file = packed / "train-00001-of-00004.array_record"
    start = file.read_bytes().index(image[:60])
    for offset in (-4, 2, 40):
        flip(file, start + offset)
        source = data.open_split(packed_block(packed), "train")
        with pytest.raises(UserError) as caught:
            source.read(np.array([3, 8]))
        assert f"cannot read {file} (record 2): " in str(caught.value)
        assert "\n" not in str(caught.value)
        skipping = data.open_split(packed_block(packed, on_corrupt="skip"), "train")
        assert skipping.read(np.array([3, 8, 9]))["mask"].tolist() == [True, False, True]
        flip(file, start + offset)
    assert source.read(np.array([3, 8]))["mask"].all()  # the error is not cached


def test_a_truncated_or_missing_shard_is_refused_at_once(packed):
    file = packed / "train-00002-of-00004.array_record"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file.name} has {size - 100} bytes of {size}"):
        data.open_split(packed_block(packed), "train")
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        data.open_split(packed_block(packed), "train")


def test_a_shard_that_vanished_is_no_corrupt_image(packed):
    source = data.open_split(packed_block(packed, on_corrupt="skip"), "train")
    file = packed / "train-00002-of-00004.array_record"
    file.unlink()
    with pytest.raises(UserError, match=f"cannot read {file}: No such file"):
        everything(source)


def test_a_label_outside_the_classes_is_refused(packed):
    index = json.loads((packed / "index.json").read_text())
    index["classes"] = index["classes"][:3]
    (packed / "index.json").write_text(json.dumps(index))
    for on_corrupt in ("fail", "skip"):
        source = data.open_split(packed_block(packed, on_corrupt=on_corrupt), "train")
        with pytest.raises(
            UserError, match=r"\(record \d\): label 3 is outside the 3 classes 0..2"
        ):
            everything(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a packed set; run `vit-scale data pack FOLDER"),
        ("{", "is not the index of a packed set"),
        ("[]", "is not the index of a packed set"),
        ('{"version": 9}', "has version 9, not 1 to 3"),
    ],
)
def test_a_folder_that_is_not_a_packed_set_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError) as caught:
        data.open_split(packed_block(tmp_path), "train")
    assert message in str(caught.value)

"""Data in a bucket gives the same batches as on a disk; the bucket is an emulator."""

import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from tests.helpers.objects import record_requests
from vit_scale import cli, config, data
from vit_scale.data import packing
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.runs.json_files import read_json, write_json
from vit_scale.storage import cache, paths
from vit_scale.storage.bucket import file_system, listing
from vit_scale.storage.ranges import RangeReader


def block(name: str, path, **more):
    fields = {"name": name, "path": path, "resolution": 32, "batch": 8, "workers": 1, **more}
    return config.override(config.base(), [f"data.{k}={v}" for k, v in fields.items()]).data


def same_batches(here, there, split="train") -> None:
    """Check that both give the same two training batches and the same first evaluation batch."""
    sources = data.open_split(here, split), data.open_split(there, split)
    assert sources[0].classes == sources[1].classes and len(sources[0]) == len(sources[1])
    read = [
        list(data.train_batches(s, c, 3, 5, 7)) for s, c in zip(sources, (here, there), strict=True)
    ]
    read += [[(0, next(data.eval_batches(s, 8)))] for s in sources]
    for left, right in (*zip(*read[:2], strict=True), *zip(*read[2:], strict=True)):
        assert left[0] == right[0]
        for name in left[1]:
            np.testing.assert_array_equal(left[1][name], right[1][name])
        assert left[1]["image"].any() and left[1]["mask"].all()


def test_an_image_folder_gives_the_same_batches(jpegs, images):
    same_batches(block("folder", jpegs), block("folder", images))
    with pytest.raises(UserError, match=r"gs://bucket/jpegs has no images|has no labelled split"):
        data.open_split(block("folder", images / "train"), "train")


@pytest.mark.slow
def test_tar_shards_are_indexed_in_a_bucket_and_read_by_ranges(
    bucket, jpegs, tmp_path, monkeypatch
):
    """An image is one request for its bytes; shards are neither copied nor read as a whole."""
    here, there = tmp_path / "tar", f"{bucket}/tar"
    here.mkdir()
    for split in ("train", "val"):
        with tarfile.open(here / f"{split}.tar", "w") as tar:
            tar.add(jpegs / split, ".")
        content = (here / f"{split}.tar").read_bytes()
        (paths.parse(there) / f"{split}.tar").write_bytes(content)
    for path in (str(here), there):
        assert cli.main(["data", "index", path, "--workers", "1"]) == 0
    same_batches(block("tar", here), block("tar", f"{there}/{{split}}.tar"))
    source = data.open_split(block("tar", there, cache=0), "train")
    cached = data.open_split(block("tar", there), "train")
    for one in (cached, source):
        assert [one.encoded(index) for index in (5, 0, 5)]
    requests = record_requests(monkeypatch)
    files = [source.encoded(index)[0] for index in (5, 0)]
    assert all(file.startswith(b"\xff\xd8\xff") for file in files)
    assert [end - start for _, start, end in requests] == list(map(len, files))
    assert [cached.encoded(index)[0] for index in (5, 0)] == files and len(requests) == 2
    (paths.parse(there) / "train.tar").write_bytes(content)
    with pytest.raises(UserError, match="and its index is of one with"):
        data.open_split(block("tar", there), "train")


@pytest.fixture(scope="module")
def packed(bucket, images) -> pathlib.Path:
    """The `jpegs` packed into the bucket."""
    assert cli.main(["data", "pack", str(images), f"{bucket}/packed", "--workers", "1"]) == 0
    return paths.parse(f"{bucket}/packed")


def test_an_array_record_set_is_packed_into_a_bucket(packed, jpegs, images, tmp_path):
    packing.pack(jpegs, tmp_path / "packed", workers=1)
    for file in (tmp_path / "packed").iterdir():
        assert (packed / file.name).read_bytes() == file.read_bytes()
    before = listing(packed)
    assert packing.pack(images, packed) == {"train": 48, "val": 12, "skipped": 0}
    again = listing(packed)
    shards = [name for name in again if name.endswith(".array_record")]
    assert [again[n]["generation"] for n in shards] == [before[n]["generation"] for n in shards]
    for workers in (0, 1):
        here, there = (
            block("array_record", p, workers=workers) for p in (tmp_path / "packed", packed)
        )
        same_batches(here, there)
    described = [data.describe(data.open_split(cfg, "train[:50%]")) for cfg in (here, there)]
    assert described[0] == described[1]
    assert not any(cache.local(packed).glob("*"))  # no shard is copied


def test_a_shard_in_a_bucket_that_lacks_images_is_packed_again(bucket, jpegs, tmp_path):
    shutil.copytree(jpegs / "train", tmp_path / "set/train")
    (tmp_path / "set/train/class_1/001.jpg").write_bytes(b"no image")
    there = paths.parse(f"{bucket}/skipping")
    for _ in range(2):
        counts = packing.pack(tmp_path / "set", there, 1, on_corrupt="skip", shard=30)
        assert counts == {"train": 47, "skipped": 1}
    assert len(data.open_split(block("array_record", there), "train")) == 47


def test_a_record_in_a_bucket_is_one_request_in_the_first_epoch(packed, monkeypatch):
    """Whatever the processes are: one that reads the set for the first time has no request."""
    shutil.rmtree(cache.folder("ranges"), ignore_errors=True)
    requests, shard = record_requests(monkeypatch), "train-00000-of-00001.array_record"
    source = data.open_split(block("array_record", packed), "train")
    assert [name for name, *_ in requests] == ["index.json", shard]  # the end of the shard
    requests.clear()
    first = [source.encoded(index) for index in range(48)]
    assert [name for name, *_ in requests] == [shard] * 48
    fetched = [end - start for _, start, end in requests]
    assert all(len(d) < n < len(d) + 200 for (d, _), n in zip(first, fetched, strict=True))
    requests.clear()
    assert [source.encoded(index) for index in range(48)] == first and not requests
    another = data.open_split(block("array_record", packed), "train")
    assert [another.encoded(index) for index in range(48)] == first
    assert [name for name, *_ in requests] == ["index.json"]
    uncached = data.open_split(block("array_record", packed, cache=0), "train")
    requests.clear()
    assert [uncached.encoded(index) for index in (3, 3)] == [first[3]] * 2 and len(requests) == 2


def test_an_index_of_an_array_record_set_that_cannot_be_used_is_refused(bucket, packed):
    other = upload_again(packed, f"{bucket}/other")
    index = read_json(packed / "index.json")
    index["splits"]["train"][0]["images"] = 40
    write_json(other / "index.json", index)
    with pytest.raises(
        UserError, match=r"00001\.array_record has 48 records, and index.json says 40;"
    ):
        data.open_split(block("array_record", other), "train")
    write_json(other / "index.json", index | {"version": 0})
    with pytest.raises(UserError, match=r"^gs://bucket/other/index.json has version 0"):
        data.open_split(block("array_record", other), "train")


def upload_again(folder: pathlib.Path, address: str) -> pathlib.Path:
    for name, _ in paths.entries(folder):
        paths.parse(f"{address}/{name}").write_bytes((folder / name).read_bytes())
    return paths.parse(address)


@pytest.mark.parametrize("on_corrupt", ["fail", "skip"])
def test_an_object_that_is_replaced_or_out_of_reach_stops_the_run(
    bucket, packed, monkeypatch, on_corrupt
):
    """In one line, and even where corrupt images are skipped: the images are fine."""
    from gcsfs.retry import HttpError

    other = upload_again(packed, f"{bucket}/replaced-{on_corrupt}")
    cfg = block("array_record", other, cache=0, on_corrupt=on_corrupt)
    source, shard = data.open_split(cfg, "train"), other / "train-00000-of-00001.array_record"
    assert source.read(np.arange(3))["mask"].all()
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(UserError) as caught:
        source.read(np.arange(3))
    assert str(caught.value) == (
        f"cannot read {shard}: it was replaced or removed after this command opened it: run it "
        "again to read the new one"
    )
    source = data.open_split(cfg, "train")

    def fail(*_, **__):
        raise HttpError({"code": 503, "message": "backend\nerror"})

    monkeypatch.setattr(file_system(), "cat_file", fail)
    with pytest.raises(UserError) as caught:
        source.read(np.arange(3))
    assert str(caught.value) == (
        f"cannot read {shard}: backend error, 503; check the network, and rerun the same command "
        "to resume"
    )
    assert caught.value.code == RESUMABLE


def test_too_little_disk_space_for_the_copies_is_refused(bucket, monkeypatch):
    file = paths.parse(f"{bucket}/large/a.array_record")
    file.write_bytes(bytes(10))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 0, 9))
    with pytest.raises(UserError, match=r"not enough disk space .*0.0 GiB needed, 0.0 GiB free"):
        cache.stage([file])


def test_cifar_gives_the_same_batches(bucket, cifar):
    there = paths.parse(f"{bucket}/cifar")
    name = "cifar-10-batches-bin/test_batch.bin"
    (there / name).write_bytes((cifar / name).read_bytes())
    same_batches(block("cifar10", cifar), block("cifar10", there), "test")
    same_batches(block("cifar10", cifar), block("cifar10", (there / name).parent), "test")
    with pytest.raises(
        UserError,
        match=r"cannot read .*/data_batch_1.bin: no such object; .*download cifar10",
    ):
        data.open_split(block("cifar10", there), "train")
    with pytest.raises(UserError, match=r"^CIFAR-10 is not in gs://bucket/none: "):
        data.open_split(block("cifar10", f"{bucket}/none"), "train")


def test_generated_images_are_cached_in_the_bucket(bucket, tmp_path, monkeypatch):
    from vit_scale.data import fractal

    small = {
        "fractal.classes": 8,
        "fractal.train_per_class": 2,
        "fractal.resolution": 8,
        "fractal.points": 50,
    }
    there = block("fractal", f"{bucket}/fractals", **small)
    same_batches(block("fractal", tmp_path, **small), there)
    assert len(paths.entries(paths.parse(there.path))) == 1
    monkeypatch.setattr(fractal, "_draw_all", None)
    assert len(data.open_split(there, "train")) == 16  # from the cache: drawing would fail


def test_ranges_of_an_object_are_of_the_generation_that_it_had_at_first(bucket):
    file = paths.parse(f"{bucket}/ranges/a.bin")
    file.write_bytes(b"one and one")
    first = RangeReader([file], 1)
    assert first.read(0, 0, 3) == b"one"
    file.write_bytes(b"two and two")
    second = RangeReader([file], 1)
    assert (second.read(0, 0, 3), second.read(0, 8, 3)) == (b"two", b"two")
    assert first.read(0, 0, 3) == b"one"  # from the cache
    with pytest.raises(UserError, match=r"a\.bin: it was replaced or removed after"):
        first.read(0, 8, 3)

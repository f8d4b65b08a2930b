"""One set in every storage: the same images in each slice, and batches that depend on nothing else.

A batch has the same bytes for any number of decoding workers and of hosts, random crops included.
"""

import io
import pickle
import shutil
import threading

import numpy as np
import pytest

from tests.data.test_array_record import Inline
from tests.data.test_image_folder import block, picture, save
from tests.data.test_tar_shards import write_tar
from tests.data.test_tfds_sets import prepare
from tests.helpers.objects import upload
from vit_scale import data
from vit_scale.augment.random_crop import RandomCrop
from vit_scale.data import packing, tar_shards, tfds_sets
from vit_scale.errors import UserError

N, BATCH = 23, 6
CROP = RandomCrop("torchvision", (0.3, 1.0), (3 / 4, 4 / 3), "random")
STORAGES = ("folder", "array_record", "tar", "huggingface", "tfds", "array_record in a bucket")


@pytest.fixture(scope="module")
def storages(tmp_path_factory, bucket):
    top = tmp_path_factory.mktemp("storages")
    names = [f"class_{number % 3}/{number:02}.png" for number in range(N)]
    for number, name in enumerate(names):
        save(top / "folder/train" / name, picture(12 + number % 5, 14, number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("concurrent.futures.ProcessPoolExecutor", Inline)
        packing.pack(top / "folder", top / "array_record", shard=7)
        for number in range(4):
            members = {}
            for name in names[number::4]:
                members[name] = (top / "folder/train" / name).read_bytes()
                members[name.replace(".png", ".cls")] = name[6:7].encode()
            write_tar(top / f"tar/train-{number}.tar", members)
        tar_shards.index_shards(str(top / "tar"))
    write_parquet(top, names)
    write_tfds(top, names)
    upload(top / "array_record", f"{bucket}/storages")
    return {name: top / name for name in STORAGES[:-1]} | {STORAGES[-1]: f"{bucket}/storages"}


def write_parquet(top, names: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    content = [(top / "folder/train" / name).read_bytes() for name in names]
    images = [{"bytes": b, "path": n} for b, n in zip(content, names, strict=True)]
    label = datasets.ClassLabel(names=["class_0", "class_1", "class_2"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    columns = {"image": images, "label": [int(name[6]) for name in names]}
    (top / "huggingface").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(top / "huggingface/train.parquet", batch_size=5)


def write_tfds(top, names: list[str]) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["class_0", "class_1", "class_2"]),
        "file_name": tfds.features.Text(),
    }
    rows = [
        {
            "image": io.BytesIO((top / "folder/train" / name).read_bytes()),
            "label": int(name[6]),
            "file_name": name,
        }
        for name in names
    ]
    folder = prepare(top / "prepared", {"train": rows}, features)
    tfds_sets.index_names(folder)
    (top / "tfds").symlink_to(folder)


def opened(storages, name: str, split: str = "train", crop=None, **changes):
    cfg = block(storages[name], name=name.partition(" ")[0], **changes)
    return data.open_split(cfg, split, crop=crop)


def batches(source, workers: int, rows=None) -> list[dict]:
    cfg = block("", batch=BATCH, workers=workers)
    return [batch for _, batch in data.train_batches(source, cfg, 5, 2, 7, rows)]


# Hosts and workers. Starting workers takes long, so most of these are slow tests.
SETTINGS = ((2, 0), (1, 1), (1, 3), (2, 1), (2, 3))


@pytest.mark.parametrize("name", STORAGES)
def test_a_batch_is_the_same_for_any_threads(storages, name):
    one = batches(opened(storages, name, crop=CROP), 0)
    several = batches(opened(storages, name, crop=CROP, threads=4), 0)
    names = {thread.name.rpartition("_")[0] for thread in threading.enumerate()}
    assert "decode" in names
    for left, right in zip(one, several, strict=True):
        for field in left:
            np.testing.assert_array_equal(left[field], right[field])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, SETTINGS[:1]) for name in STORAGES),
        ("folder", SETTINGS[2:3]),
        *(pytest.param(name, SETTINGS, marks=pytest.mark.slow) for name in STORAGES),
    ],
)
def test_a_batch_is_the_same_for_any_workers_and_hosts(storages, name, settings):
    source = opened(storages, name, crop=CROP)
    whole = batches(source, 0)
    assert len({batch["image"].tobytes() for batch in whole}) == 5
    for hosts, workers in settings:
        parts = [batches(source, workers, rows) for rows in np.split(np.arange(BATCH), hosts)]
        for one, *others in zip(whole, *parts, strict=True):
            for field in one:
                joined = np.concatenate([other[field] for other in others])
                np.testing.assert_array_equal(one[field], joined, err_msg=f"{hosts} {workers}")


@pytest.mark.parametrize("name", STORAGES)
def test_an_image_is_cropped_anew_in_each_epoch(storages, name):
    source = opened(storages, name, "train[:6]", CROP)
    first, second = batches(source, 0)[:2]  # each is an epoch
    assert sorted(first["label"]) == sorted(second["label"])
    crops = {image.tobytes() for batch in (first, second) for image in batch["image"]}
    assert len(crops) == 12
    plain = batches(opened(storages, name, "train[:6]"), 0)
    assert len({image.tobytes() for batch in plain for image in batch["image"]}) == 6


@pytest.mark.parametrize("split", ["train[:50%]", "train[50%:]", "train[3:9]", "train"])
def test_a_slice_holds_the_same_images_in_all_storages(storages, split):
    members = []
    for name in STORAGES:
        source = opened(storages, name, split)
        batch = source.read(np.arange(len(source)))
        members.append(
            {(y, x.tobytes()) for x, y in zip(batch["image"], batch["label"].tolist(), strict=True)}
        )
    assert all(other == members[0] for other in members) and len(members[0]) == len(source)
    prints = {data.describe(opened(storages, name, split))["fingerprint"] for name in STORAGES}
    assert len(prints) == 1


# Packing


class Sent(Inline):
    """Runs each job in this process, on what another process would receive."""

    def submit(self, function, /, *arguments):
        return super().submit(function, *pickle.loads(pickle.dumps(arguments)))


def contents(source) -> set:
    return {source.encoded(index) for index in range(len(source))}


@pytest.mark.parametrize("name", STORAGES)
def test_a_pack_of_any_storage_is_the_same_set(storages, name, tmp_path, monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Sent)
    of = f"{name.partition(' ')[0]}:{storages[name]}"
    assert packing.pack(of, tmp_path / "out", shard=7) == {"train": N, "skipped": 0}
    original, packed = opened(storages, name), data.open_split(packed_block(tmp_path), "train")
    assert packed.classes == original.classes and contents(packed) == contents(original)
    for split in ("train", "train[:50%]", "train[50%:]"):
        half = data.open_split(packed_block(tmp_path), split)
        expected = data.describe(opened(storages, name, split))
        assert data.describe(half) == expected | {"name": half.name}
    folder = storages["array_record"]
    for file in folder.glob("*.array_record"):
        there = (tmp_path / "out" / file.name).read_bytes()
        assert (there == file.read_bytes()) == (name == "folder"), "another order of the files"


def packed_block(tmp_path):
    return block(tmp_path / "out", name="array_record")


def test_a_set_without_names_is_packed_in_order(storages, tmp_path, monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Sent)
    datasets = pytest.importorskip("datasets")
    content = [path.read_bytes() for path in sorted(storages["folder"].rglob("*.png"))]
    rows = {
        "image": content,
        "label": [i % 5 for i in range(N)],
        "other": [i % 2 for i in range(N)],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set/train.parquet")
    of = f"huggingface:{tmp_path}/set"
    with pytest.raises(UserError, match="columns label, other might be the labels"):
        packing.pack(of, tmp_path / "out")
    column = ["data.label_column=other"]
    with pytest.raises(UserError, match="has no names of its images, so leaving out corrupt ones"):
        packing.pack(of, tmp_path / "out", on_corrupt="skip", overrides=column)
    packing.pack(of, tmp_path / "out", shard=7, overrides=column)
    cfg = block(tmp_path / "set", name="huggingface", label_column="other")
    for split in ("train", "train[:50%]", "train[3:9]"):
        one, other = data.open_split(cfg, split), data.open_split(packed_block(tmp_path), split)
        indices = np.arange(len(one))
        for field, values in one.read(indices).items():
            np.testing.assert_array_equal(other.read(indices)[field], values)
    content[0] = content[1]
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set/train.parquet")
    with pytest.raises(UserError, match="has shards of other images or options"):
        packing.pack(of, tmp_path / "out", shard=7, overrides=column)


def test_splits_keep_their_names(storages, tmp_path, monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Sent)
    for split, count in (("train", 5), ("validation", 3), ("test", 2)):
        members = {}
        for number in range(count):
            members[f"{split}{number}.png"] = (
                storages["folder"] / "train/class_0/00.png"
            ).read_bytes()
            members[f"{split}{number}.cls"] = str(number).encode()
        write_tar(tmp_path / f"tar/{split}-0.tar", members)
    (tmp_path / "tar/classes.txt").write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(UserError, match="run `vit-scale data index"):
        packing.pack(f"tar:{tmp_path}/tar", tmp_path / "out")
    tar_shards.index_shards(str(tmp_path / "tar"))
    counts = packing.pack(f"tar:{tmp_path}/tar", tmp_path / "out")
    assert counts == {"train": 5, "val": 3, "test": 2, "skipped": 0}
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        packed = data.open_split(packed_block(tmp_path), split)
        assert packed.classes == tuple("abcde") and len(packed) == count
        names = {name.decode() for name in packed.examples.files}
        assert names == {f"{split.replace('val', 'validation')}{i}.png" for i in range(count)}


def test_a_test_set_without_labels_is_not_packed(storages, tmp_path, monkeypatch):
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Sent)
    shutil.copytree(storages["folder"] / "train", tmp_path / "set/train")
    shutil.copytree(tmp_path / "set/train/class_0", tmp_path / "set/test")
    images = len(data.open_split(block(tmp_path / "set"), "train"))
    assert packing.pack(tmp_path / "set", tmp_path / "out") == {"train": images, "skipped": 0}
    with pytest.raises(UserError, match="test has none of the 3 classes"):
        data.open_split(block(tmp_path / "set"), "test")
    (tmp_path / "set/test/other").mkdir()  # it has classes, and other ones
    with pytest.raises(UserError, match="test has none of the 3 classes"):
        packing.pack(tmp_path / "set", tmp_path / "out2")


def test_what_cannot_be_packed_is_one_line(tmp_path):
    for source, message in (
        ("hugingface:DIR", "'hugingface' is unknown; did you mean huggingface?"),
        (f"tar:{tmp_path}", "has no shards of split 'train'"),
        ("cifar10:.data", "cifar10 is not a set of image files"),
        (f"{tmp_path}/a:b", "is unknown"),
        (f"{tmp_path}", "has no labelled split 'train'"),
    ):
        with pytest.raises(UserError) as caught:
            packing.pack(source, tmp_path / "out")
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()

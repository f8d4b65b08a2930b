"""One set in every storage: the same images in each slice, and batches that depend on nothing else.

A batch has the same bytes for any number of decoding workers and of hosts, random crops included.
"""

import io
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
from vit_scale.data import array_record, tar_shards, tfds_sets

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
        array_record.pack(top / "folder", top / "array_record", shard=7)
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

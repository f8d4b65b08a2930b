"""Several classes of an image, or numbers: the same vectors in every storage and batch."""

import json
import pickle

import numpy as np
import pytest

from tests.data.test_array_record import Inline
from tests.data.test_image_folder import block, everything
from tests.data.test_tar_shards import png, refused, write_tar
from tests.helpers.tiny import tiny_config
from vit_scale import data
from vit_scale.data import packing, tar_shards
from vit_scale.data.class_mapping import Relabelled
from vit_scale.data.mixtures import Mixture
from vit_scale.training import objectives

N = 7
LABELS = {
    "classes": [["cat"], ["ant", "cat"], [], ["bee"], ["bee", "ant"], ["cat", "bee"], ["ant"]],
    "numbers": [[2], [0, 2], [], [1], [1, 0], [2, 1], [0]],
    "value": [0.5, -3, 2.25, 7, 0, 1e6, 1 / 3],
    "values": [[i / 4, -i] for i in range(N)],
}
HOT = np.zeros((N, 3), np.float32)
for row, chosen in enumerate(LABELS["numbers"]):
    HOT[row, chosen] = 1
EXPECTED = {
    "classes": HOT,
    "numbers": HOT,
    "value": np.array(LABELS["value"], np.float32)[:, None],
    "values": np.array(LABELS["values"], np.float32),
}
NAMES = {
    "classes": ("ant", "bee", "cat"),
    "numbers": ("0", "1", "2"),
    "value": ("0",),
    "values": ("0", "1"),
}


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    class Sent(Inline):
        def submit(self, function, /, *arguments):
            return super().submit(function, *pickle.loads(pickle.dumps(arguments)))

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Sent)


def target_of(what: str) -> str:
    return "value" if what.startswith("value") else "classes"


def write_tars(folder, labels, split="train"):
    members = {}
    for number, label in enumerate(labels):
        members[f"{number}.png"] = png(number)
        members[f"{number}.json"] = json.dumps({"label": label}).encode()
    write_tar(folder / f"{split}-0.tar", members)
    tar_shards.index_shards(str(folder))


def write_parquet(folder, labels, split="train", item=None):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
    table = datasets.Dataset.from_dict(
        {"image": images, "tags": labels, "id": [*range(len(labels))]}
    )
    table = table.cast_column("image", datasets.Image())
    if item:
        table = table.cast_column("tags", item)
    table.to_parquet(folder / f"{split}.parquet")


def opened(folder, name, target, split="train", **changes):
    column = {"label_column": "tags"} if name == "huggingface" and target == "value" else {}
    return data.open_split(block(folder, name=name, target=target, **column, **changes), split)


@pytest.mark.parametrize("what", LABELS)
@pytest.mark.parametrize("name", ["tar", "huggingface"])
def test_vectors_are_the_same_in_every_storage(tmp_path, name, what):
    write = {"tar": write_tars, "huggingface": write_parquet}[name]
    write(tmp_path / "set", LABELS[what])
    target = target_of(what)
    source = opened(tmp_path / "set", name, target)
    assert source.classes == NAMES[what] and source.targets == len(NAMES[what])
    batch = everything(source)
    assert batch["target"].dtype == np.float32 and batch["mask"].all()
    np.testing.assert_array_equal(batch["target"], EXPECTED[what])
    assert not batch["label"].any()
    overrides = [f"data.target={target}", "data.label_column=tags"]
    packing.pack(f"{name}:{tmp_path}/set", tmp_path / "out", shard=3, overrides=overrides)
    packed = opened(tmp_path / "out", "array_record", target)
    assert packed.classes == source.classes
    order = [int(file.decode()[:-4]) for file in packed.examples.files]
    assert sorted(order) == list(range(N)) != order
    for field, values in everything(packed).items():
        np.testing.assert_array_equal(values, batch[field][order])
    for split in ("train", "train[:50%]"):
        one, other = (
            opened(tmp_path / "set", name, target, split),
            opened(tmp_path / "out", "array_record", target, split),
        )
        assert data.describe(one) == data.describe(other) | {"name": one.name}
    assert f"was packed with data.target={target}, not class" in refused(
        lambda: opened(tmp_path / "out", "array_record", "class")
    )


@pytest.fixture
def tar(tmp_path):
    write_tars(tmp_path / "tar", LABELS["classes"])
    return tmp_path / "tar"


def test_batches_carry_them(tar):
    """Through workers, padding, memory, slices, and a training stream."""
    source = opened(tar, "tar", "classes")
    for workers in (0, 1):
        batches = list(data.eval_batches(source, 4, workers=workers))
        joined = np.concatenate([batch["target"] for batch in batches])
        np.testing.assert_array_equal(joined, np.concatenate([HOT, np.zeros((1, 3))]))
    memory = opened(tar, "tar", "classes", memory=True)
    np.testing.assert_array_equal(memory.read(np.array([4, 1]))["target"], HOT[[4, 1]])
    assert memory.targets == 3
    half = opened(tar, "tar", "classes", "train[:50%]")
    indices = half._indices
    np.testing.assert_array_equal(everything(half)["target"], HOT[indices])
    cfg = block(tar, batch=N, workers=0)
    (_, batch), *_ = data.train_batches(source, cfg, 5, 0, 1)
    assert sorted(map(tuple, batch["target"])) == sorted(map(tuple, HOT))
    assert not np.array_equal(batch["target"], HOT)


def test_a_checksum_covers_them(tar, tmp_path):
    write_tars(tmp_path / "other", [["bee"], *LABELS["classes"][1:]])
    sums = {data.checksum(opened(folder, "tar", "classes")) for folder in (tar, tmp_path / "other")}
    prints = {
        data.describe(opened(folder, "tar", "classes"))["fingerprint"]
        for folder in (tar, tmp_path / "other")
    }
    assert len(sums) == len(prints) == 2


def test_classes_are_matched_by_name(tar, tmp_path):
    source = opened(tar, "tar", "classes")
    columns = {"bee": HOT[:, 1], "cat": HOT[:, 2], "ant": HOT[:, 0]}
    other = Relabelled(source, ("cat", "dog", "ant", "bee"), (2, 3, 0))
    target = everything(other)["target"]
    assert other.targets == 4 and not target[:, 1].any()
    for position, name in ((0, "cat"), (2, "ant"), (3, "bee")):
        np.testing.assert_array_equal(target[:, position], columns[name])
    write_tars(tmp_path / "dogs", [["dog", "cat"], ["dog"]])
    mixture = Mixture([source, opened(tmp_path / "dogs", "tar", "classes")], (1, 1))
    assert mixture.classes == ("ant", "bee", "cat", "dog")
    target = mixture.read(np.array([N, 1, N + 1]))["target"]
    assert target.tolist() == [[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]


def test_classes_are_those_of_the_training_set(tmp_path):
    write_tars(tmp_path, LABELS["classes"])
    write_tars(tmp_path, [["cat"], []], "val")
    source = opened(tmp_path, "tar", "classes", "val")
    assert source.classes == ("ant", "bee", "cat")
    assert everything(source)["target"].tolist() == [[0, 0, 1], [0, 0, 0]]
    write_tars(tmp_path, [["cat"], ["emu"]], "val")
    assert "val-0.tar (1.png): class emu is none of the 3 known" in refused(
        lambda: opened(tmp_path, "tar", "classes", "val")
    )
    (tmp_path / "classes.txt").write_text("cat\nbee\nant\nemu\n")
    source = opened(tmp_path, "tar", "classes", "val")
    assert everything(source)["target"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_columns_of_class_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    kind = datasets.List(datasets.ClassLabel(names=["x", "y", "z", "w"]))
    write_parquet(tmp_path, LABELS["numbers"], item=kind)
    source = opened(tmp_path, "huggingface", "classes")
    assert source.classes == ("x", "y", "z", "w")
    np.testing.assert_array_equal(everything(source)["target"][:, :3], HOT)


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        ([0.5, float("nan")], "value", "(1.png): nan is not finite; correct its label"),
        ([[1, 2], [3]], "value", "(1.png): it has 1 numbers, and the training set 2 an image"),
        (["cat"], "classes", "has no label that is a number"),
        ([["cat"], ["ant", 1]], "classes", "1.png: 1 is no name of a class"),
        ([[1], [None]], "classes", "1.png: None is no number"),
        ([[1], [-1]], "classes", "(1.png): class -1 is none of the 2 known"),
        ([[1], [0.5]], "classes", "(1.png): class 0.5 is none of the 2 known"),
        ([["cat"], ["ant"]], "value", "'cat' is not a number"),
        ([[1], [0]], "class", "it has lists or fractions: set --config.data.target=classes or"),
        ([1, 0], "clases", "data.target='clases' is unknown; did you mean class"),
    ],
)
def test_bad_labels_are_one_line(tmp_path, labels, target, message):
    def write_and_open():
        write_tars(tmp_path, labels)
        opened(tmp_path, "tar", target)

    assert message in refused(write_and_open)


def test_a_single_class_is_a_list_of_one(tmp_path):
    write_tars(tmp_path, [1, 0, 2])
    target = everything(opened(tmp_path, "tar", "classes"))["target"]
    assert target.tolist() == np.eye(3)[[1, 0, 2]].tolist()
    assert everything(opened(tmp_path, "tar", "value"))["target"].tolist() == [[1], [0], [2]]


def test_what_does_not_learn_or_have_them_refuses_them():
    message = refused(lambda: objectives.check(tiny_config("data.target=value")))
    assert message == (
        "data.target=value needs an objective that learns it; objective=classification learns "
        "class or classes"
    )
    assert "data.name=tfds has one class an image; data.target=value needs array_record" in (
        refused(lambda: data.open_split(block("", name="tfds", target="value"), "train"))
    )

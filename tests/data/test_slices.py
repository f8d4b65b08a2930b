"""Which images a slice contains: the same in every storage format of a set, nearly the same after
images were added, and unchanged for earlier runs."""

import concurrent.futures
import json

import numpy as np
import pytest

from tests.data.test_array_record import Inline, packed_block
from tests.data.test_image_folder import block, everything, picture, save
from vit_scale import config, data
from vit_scale.data import image_files, packing, shards
from vit_scale.data.example_ids import Examples
from vit_scale.data.sources import InMemory
from vit_scale.data.splits import Slice, are_disjoint, cut
from vit_scale.errors import UserError

N = 40
GOLDEN_HASHES = [
    "66bdacb6190a8972",
    "6590638cc3346dc0",
    "20297638a17f9573",
    "a8fbd1f002754546",
    "b4b2797457a0a6e4",
]
GOLDEN_ORDER, GOLDEN_PRINT = [2, 1, 0, 3, 4], "0b79cb34cf5ad9b0"


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    image_files.print_once.cache_clear()
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Inline)


@pytest.fixture
def folder(tmp_path):
    for number in range(N):
        name = f"train/class_{number % 3}/{number:02}.png"
        save(tmp_path / "set" / name, picture(8, 8, number))
    return tmp_path / "set"


def members(cfg, split: str) -> set[bytes]:
    """The images of a split, by their pixels."""
    return {image.tobytes() for image in everything(data.open_split(cfg, split))["image"]}


def paths_of(folder, split: str, **changes) -> set[bytes]:
    source = data.open_split(block(folder, **changes), split)
    return set(source._source._listing.files[source._indices].tolist())


SPLITS = ["train[:90%]", "train[90%:]", "train[:7]", "train[7:30]", "train[25%:50%]"]


def test_the_order_of_examples_never_changes():
    """Golden: with another order, earlier runs would hold out other images."""
    names = [b"ant/1.png", b"ant/2.png", b"bee/1.png", b"caf\xe9/\xf0\x9f\x90\x9d.jpg", b""]
    examples = Examples(np.array(names), np.array([0, 0, 1, 2, 3]))
    assert [f"{value:016x}" for value in examples.hashes.tolist()] == GOLDEN_HASHES
    assert examples.order().tolist() == GOLDEN_ORDER
    assert examples.fingerprint() == GOLDEN_PRINT


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shard", [6, 100])
def test_a_pack_has_the_slices_of_its_folder(folder, tmp_path, split, shard):
    packing.pack(folder, tmp_path / "out", shard=shard)
    actual = members(block(folder), split)
    assert members(packed_block(tmp_path / "out"), split) == actual
    assert members(packed_block(tmp_path / "out", memory=True), split) == actual
    assert actual != members(block(folder, slices="position"), split)


def test_counts_are_exact_and_parts_are_disjoint(folder):
    sizes = [len(data.open_split(block(folder), split)) for split in SPLITS]
    assert sizes == [36, 4, 7, 23, 10]
    parts = [paths_of(folder, split) for split in ("train[:20%]", "train[20%:50%]", "train[50%:]")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == N


@pytest.mark.parametrize("name", ["class_0/new.png", "class_1/a.jpeg", "class_2/00.png"])
def test_an_added_image_moves_at_most_one_other(folder, name):
    for bound in ("50%", "75%", "90%", "7"):
        before = [paths_of(folder, f"train[{part}]") for part in (f":{bound}", f"{bound}:")]
        added = save(folder / "train" / name, picture(8, 8))
        after = [paths_of(folder, f"train[{part}]") for part in (f":{bound}", f"{bound}:")]
        added.unlink()
        moved = (before[0] & after[1]) | (before[1] & after[0])
        assert len(moved) <= 1, bound
        assert len(after[0]) + len(after[1]) == N + 1


def test_slices_do_not_depend_on_the_order_of_paths():
    names = np.array([f"{i % 5}/{i}.png".encode() for i in range(50)])
    labels = np.arange(50) % 5
    other = np.random.RandomState(0).permutation(50)
    one, two = Examples(names, labels), Examples(names[other], labels[other])
    np.testing.assert_array_equal(names[one.order()], names[other][two.order()])
    assert one.fingerprint() == two.fingerprint() == one.fingerprint(other)


def test_paths_with_the_same_hash_are_ordered_by_path(monkeypatch):
    monkeypatch.setattr(Examples, "hashes", np.zeros(3, np.uint64))
    assert Examples(np.array([b"b", b"c", b"a"]), np.zeros(3)).order().tolist() == [2, 0, 1]


@pytest.mark.parametrize("change", ["path", "label", "fewer", "twice"])
def test_different_sets_have_different_fingerprints(change):
    names = [b"a/1.png", b"a/2.png", b"b/1.png"]
    labels = [0, 0, 1]
    before = Examples(np.array(names), np.array(labels)).fingerprint()
    if change == "path":
        names[1] = b"a/3.png"
    elif change == "label":
        labels[1] = 1
    else:
        names, labels = (names[:2], labels[:2]) if change == "fewer" else (names * 2, labels * 2)
    assert Examples(np.array(names), np.array(labels)).fingerprint() != before


def test_a_folder_and_its_pack_have_the_same_fingerprint(folder, tmp_path):
    packing.pack(folder, tmp_path / "out", shard=6)
    for split in ("train", "train[:90%]"):
        one = data.describe(data.open_split(block(folder), split))
        two = data.describe(data.open_split(packed_block(tmp_path / "out", memory=True), split))
        assert one["fingerprint"] == two["fingerprint"]
        assert one.get("of") == two.get("of") == (None if split == "train" else N)


def test_official_sets_and_earlier_runs_keep_slices_by_position(folder):
    images = np.arange(50, dtype=np.uint8)[:, None, None, None].repeat(3, axis=-1)
    source = InMemory("official", images, np.zeros(50, int), ["only"])
    part = cut(source, "train[:20%]")
    old = np.random.RandomState(20201022).permutation(50)[:10]
    assert isinstance(part, Slice) and part.by == "position"
    np.testing.assert_array_equal(part._indices, np.sort(old))
    assert config.from_json({}).data.slices == "position"
    listed = sorted(f"class_{i % 3}/{i:02}.png".encode() for i in range(N))
    old = np.random.RandomState(20201022).permutation(N)[:36]
    assert paths_of(folder, "train[:90%]", slices="position") == {listed[i] for i in old}
    with pytest.raises(UserError, match=r"data.slices='exmple' is unknown; did you mean example\?"):
        data.open_split(block(folder, slices="exmple"), "train")


# Packs


def test_skipped_images_are_not_listed(folder, tmp_path):
    for number in (5, 17, 30):
        (folder / f"train/class_{number % 3}/{number:02}.png").write_bytes(b"no image")
    out = tmp_path / "out"
    packing.pack(folder, out, on_corrupt="skip", shard=6)
    source = data.open_split(packed_block(out), "train")
    assert len(source) == N - 3
    for index in range(N - 3):
        content, label = source.encoded(index)
        path = folder / "train" / source.examples.files[index].decode()
        assert content == path.read_bytes() and label == source.examples.labels[index]


def test_a_resumed_pack_remembers_skipped_images(folder, tmp_path, monkeypatch):
    (folder / "train/class_2/05.png").write_bytes(b"no image")
    write, written = shards.write_shard, []

    def fail_at_the_last(shard):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(shard.file.name)
        return write(shard)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", fail_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            packing.pack(folder, tmp_path / "a", on_corrupt="skip", shard=6)
    packing.pack(folder, tmp_path / "a", on_corrupt="skip", shard=6)
    packing.pack(folder, tmp_path / "b", on_corrupt="skip", shard=6)
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.fixture
def earlier(folder, tmp_path):
    """A pack as version 1 wrote it."""
    out = tmp_path / "out"
    packing.pack(folder, out, shard=6)
    index = json.loads((out / "index.json").read_text())
    del index["examples"]
    (out / "index.json").write_text(json.dumps(index | {"version": 1}))
    (out / "train-examples.npz").unlink()
    return out


def test_an_earlier_pack_keeps_its_slices_with_a_message(earlier, folder, capsys):
    source = data.open_split(packed_block(earlier), "train[:90%]")
    order = np.random.RandomState(20201022).permutation(N)
    np.testing.assert_array_equal(source._indices, np.sort(order[:36]))
    printed = capsys.readouterr().err
    assert (
        "out train has no names of its images (a set without them, or packed by an earlier version)"
        in printed
    )
    assert printed.count("\n") == 1 and "fingerprint" not in data.describe(source)
    data.open_split(packed_block(earlier, slices="position"), "train[90%:]")
    data.open_split(packed_block(earlier), "train")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="was packed by an earlier version, without image names"):
        packing.pack(folder, earlier, shard=6)


def test_an_interrupted_earlier_pack_is_finished_or_refused(earlier, folder):
    index = json.loads((earlier / "index.json").read_text())
    text = json.dumps(index | {"finished": False, "splits": {}})
    (earlier / "index.json").write_text(text)
    assert packing.pack(folder, earlier, shard=6)["train"] == N
    actual = members(packed_block(earlier), "train[:90%]")
    assert actual == members(block(folder), "train[:90%]")
    (earlier / "index.json").write_text(text)
    save(folder / "train/class_0/new.jfif.png", picture(8, 8))
    with pytest.raises(UserError, match="was begun by an earlier version, which listed other"):
        packing.pack(folder, earlier, shard=6)


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_image_names_are_refused(folder, tmp_path, damage):
    packing.pack(folder, tmp_path / "out", shard=6)
    file = tmp_path / "out/train-examples.npz"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "cut" else b"\0" * len(content))
    with pytest.raises(UserError, match=r"train-examples\.npz(:| is missing| has)"):
        data.open_split(packed_block(tmp_path / "out"), "train[:90%]")


@pytest.mark.parametrize(
    ("one", "other", "disjoint"),
    [
        ("train[:90%]", "train[90%:]", True),
        ("train[90%:]", "train[:90%]", True),
        ("train[:45000]", "train[45000:50000]", True),
        ("train", "test", True),
        ("train", "train", False),
        ("train", "train[90%:]", False),
        ("train[:91%]", "train[90%:]", False),
        ("train[:10]", "train[90%:]", False),  # which of a small set may share images
    ],
)
def test_which_splits_share_no_image(one, other, disjoint):
    assert are_disjoint(one, other) == disjoint

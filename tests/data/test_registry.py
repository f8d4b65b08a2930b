"""Which examples a split and a batch contain, for every step, process, worker and restart."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data.test_image_folder import picture, save
from vit_scale import data
from vit_scale.config import base
from vit_scale.data.loader import in_memory, shuffled
from vit_scale.data.registry import share_images
from vit_scale.data.splits import split_name
from vit_scale.errors import UserError


def numbered(n: int, classes: int = 1000) -> data.InMemory:
    """Example i is an image full of i mod 256, labelled i."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 2, 3, 3)).copy()
    return data.InMemory("numbered", images, np.arange(n), [f"class {c}" for c in range(classes)])


class Decoding:
    """Example i is labelled i too, from a source that decodes; its pixels hold the reader's PID."""

    name, classes, size, decodes = "decoding", tuple(map(str, range(1000))), (1, 3), True

    def __init__(self, n: int, corrupt: int = -1, skip: bool = False):
        self.n, self.corrupt, self.skip = n, corrupt, skip

    def __len__(self) -> int:
        return self.n

    def read(self, indices):
        if self.corrupt in indices and not self.skip:
            raise UserError(f"example {self.corrupt} is corrupt")
        pid = np.frombuffer(np.uint32(os.getpid()).tobytes()[:3], np.uint8)
        return {
            "image": np.broadcast_to(pid, (len(indices), 1, 3, 3)).copy(),
            "label": indices.astype(np.int32),
            "mask": indices != self.corrupt,
        }


def block(**changes):
    cfg = base().data
    cfg.update(changes)
    return cfg


def labels(source, batch, seed=0, start=0, stop=None, rows=None, workers=0) -> list:
    cfg = block(batch=batch, workers=workers)
    return [
        (step, examples["label"].tolist())
        for step, examples in data.train_batches(source, cfg, seed, start, stop, rows)
    ]


# Splits


@pytest.mark.parametrize("bound", ["0%", "1", "37", "40%", "98%", "100"])
def test_complementary_slices_are_disjoint_and_cover(bound):
    source = numbered(101)
    parts = []
    for split in (f"train[:{bound}]", f"train[{bound}:]"):
        try:
            part = data.cut(source, split)
        except UserError:
            assert split == "train[:0%]"  # an empty slice is refused
            continue
        parts.append(part.read(np.arange(len(part)))["label"].tolist())
    assert sorted(itertools.chain(*parts)) == list(range(101))


def test_slice_lengths():
    source = numbered(50)
    expected = {
        "[:45]": 45,
        "[45:]": 5,
        "[10%:20%]": 5,
        "[98%:]": 1,
        "[:]": 50,
        "": 50,
        "[5:50%]": 20,
    }
    assert {part: len(data.cut(source, f"train{part}")) for part in expected} == expected


def test_a_slice_of_a_set_in_class_order_has_all_classes():
    images, by_class = np.zeros((1000, 1, 1, 3), np.uint8), np.repeat(np.arange(10), 100)
    source = data.InMemory("sorted", images, by_class, list("abcdefghij"))
    part = data.cut(source, "train[90%:]")
    assert set(part.read(np.arange(100))["label"]) == set(range(10))


def test_the_order_of_slices_never_changes():
    """Golden: a different order would leak training images of earlier runs into selection."""
    part = data.cut(numbered(20), "train[75%:]")
    assert part.read(np.arange(5))["label"].tolist() == GOLDEN_SLICE


GOLDEN_SLICE = [1, 5, 7, 14, 19]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tset", "valid: train, test"),
        ("train[", "valid: train, test"),
        ("train[-5:]", "valid: train, test"),
        ("train[1:2:3]", "valid: train, test"),
        ("train[30:20]", "[30, 20) of 40 images"),
        ("train[:41]", "[0, 41) of 40 images"),
        ("train[101%:]", "[40, 40) of 40 images"),
    ],
)
def test_bad_splits_are_refused_in_one_line(split, message):
    with pytest.raises(UserError) as caught:
        split_name(split, ("train", "test"))
        data.cut(numbered(40), split)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_test_set_that_is_the_validation_set_shares_its_images(tmp_path):
    folder = block(name="folder", path=str(tmp_path))
    for number, split in enumerate(("train", "val")):
        save(tmp_path / split / "ant" / "1.png", picture(8, 8, number))
    assert share_images(folder, "val", "test") and share_images(folder, "val", "validation")
    assert share_images(folder, "val[:60%]", "test[50%:]")
    assert not share_images(folder, "val[:50%]", "test[50%:]")
    assert not share_images(folder, "train", "test")
    save(tmp_path / "test" / "ant" / "1.png", picture(8, 8, 2))
    assert not share_images(folder, "val", "test")
    assert not share_images(block(name="folder", path="nowhere"), "val", "test")


def test_an_unknown_set_gets_a_suggestion():
    with pytest.raises(UserError, match=r"is unknown; did you mean cifar10 or cifar100\?"):
        data.open_split(block(name="cifar1"), "train")


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_outside_the_classes_is_refused_with_its_position(wrong):
    with pytest.raises(UserError, match=f"label {wrong} at position 2 is outside the 3 classes"):
        data.InMemory("set", np.zeros((4, 1, 1, 3), np.uint8), np.array([0, 1, wrong, 2]), "abc")


# Training batches


def test_each_epoch_visits_each_example_once_in_a_new_order():
    n, batch = 30, 8
    batches = (batch_labels for _, batch_labels in labels(numbered(n), batch, stop=15))
    stream = list(itertools.chain.from_iterable(batches))
    epochs = [stream[i : i + n] for i in range(0, len(stream), n)]
    assert len(epochs) == 4
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_images_stay_with_their_labels():
    for _, batch in data.train_batches(numbered(30), block(batch=7), 0, 0, 5):
        np.testing.assert_array_equal(batch["image"][:, 1, 2, 0], batch["label"])
        assert batch["image"].shape == (7, 2, 3, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and batch["mask"].all()


def test_the_seed_determines_the_order():
    first, again, other = (labels(numbered(30), 10, seed, stop=3) for seed in (1, 1, 2))
    assert first == again != other


def test_the_order_of_a_seed_never_changes():
    """Golden: a run resumed with another version of numpy must see the same batches."""
    assert shuffled(np.arange(6, 12), 6, seed=7).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [5, 4, 3, 0, 1, 2]


@pytest.mark.parametrize("n", [3, 20])  # a batch of several epochs, and less than one
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_processes_together_read_the_same_global_batch(n, count):
    source, cfg = numbered(n), block(batch=16)
    whole = [batch for _, batch in data.train_batches(source, cfg, 5, 2, 6)]
    parts = zip(
        *(
            [b for _, b in data.train_batches(source, cfg, 5, 2, 6, rows)]
            for rows in np.array_split(np.arange(16), count)
        ),
        strict=True,
    )
    for expected, pieces in zip(whole, parts, strict=True):
        for name in expected:
            assert all(len(part[name]) == 16 // count for part in pieces)
            joined = np.concatenate([part[name] for part in pieces])
            assert (
                joined.tobytes() == expected[name].tobytes()
                and joined.dtype == expected[name].dtype
            )


def test_resuming_at_any_step_continues_with_the_same_batches():
    whole = labels(numbered(30), 7, stop=12)
    assert [step for step, _ in whole] == list(range(12))
    for start in range(13):
        assert labels(numbered(30), 7, start=start, stop=12) == whole[start:]


def test_repeats_are_spread_over_the_batch():
    """A batch is a third as many images, three times: neighbours, which are mixed, differ."""
    source = numbered(30)
    single = [batch for _, batch in labels(source, 4, stop=20)]
    cfg = block(batch=12, workers=0, repeats=3)
    batches = list(data.train_batches(source, cfg, 0, 0, 20))
    assert [b["label"].tolist() for _, b in batches] == [three * 3 for three in single]
    later = list(data.train_batches(source, cfg, 0, 13, 20, np.array([1, 7])))
    assert [b["label"].tolist() for _, b in later] == [[b[1], b[3]] for b in single[13:]]
    cfg = block(batch=11, workers=0, repeats=3)  # no multiple: the last image twice
    batches = list(data.train_batches(source, cfg, 0, 0, 20))
    assert [b["label"].tolist() for _, b in batches] == [(three * 3)[:11] for three in single]


def test_without_a_last_step_batches_never_end():
    stream = data.train_batches(numbered(3), block(batch=2), 0, 10**9)
    assert [step for step, _ in itertools.islice(stream, 50)] == list(range(10**9, 10**9 + 50))


def test_workers_are_processes_and_give_the_same_batches():
    def run(workers, start):
        cfg = block(batch=6, workers=workers)
        batches = list(data.train_batches(Decoding(20), cfg, 3, start, 9, np.arange(3, 6)))
        pids = {int.from_bytes(b["image"][0, 0, 0].tobytes(), "little") for _, b in batches}
        return [(step, b["label"].tolist()) for step, b in batches], pids

    here = int.from_bytes(np.uint32(os.getpid()).tobytes()[:3], "little")
    alone, pids = run(0, 4)
    assert pids == {here}
    together, pids = run(2, 4)
    assert together == alone and len(pids) == 2 and here not in pids


def test_a_user_error_in_a_worker_is_raised_unchanged():
    with pytest.raises(UserError) as caught:
        list(data.eval_batches(Decoding(8, corrupt=3), 4, workers=1))
    assert str(caught.value) == "example 3 is corrupt"


# Exact evaluation


@pytest.mark.parametrize("batch", [1, 7, 128, 200])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_example_once(batch, count):
    n = 130
    parts = np.array_split(np.arange(batch), count)
    runs = [list(data.eval_batches(numbered(n), batch, rows)) for rows in parts]
    assert {len(run) for run in runs} == {-(-n // batch)}
    for step in zip(*runs, strict=True):
        assert sum(len(part["mask"]) for part in step) == batch
    seen = [b["label"][b["mask"]] for step in zip(*runs, strict=True) for b in step]
    assert np.concatenate(seen).tolist() == list(range(n))
    padding = [b["image"][~b["mask"]] for run in runs for b in run]
    assert not np.concatenate(padding).any()


def test_a_skipped_example_is_not_counted():
    batches = list(data.eval_batches(Decoding(10, corrupt=3, skip=True), 4))
    assert sum(int(batch["mask"].sum()) for batch in batches) == 9


# In memory


def test_in_memory_has_the_same_examples(capsys):
    source = Decoding(150, corrupt=70, skip=True)
    loaded = in_memory(source, workers=0)
    assert not loaded.decodes and loaded.classes == source.classes and loaded.size == source.size
    everything = np.arange(150)
    for name, values in source.read(everything).items():
        np.testing.assert_array_equal(loaded.read(everything)[name], values)


def test_in_memory_is_refused_if_it_cannot_fit():
    source = Decoding(150)
    source.size = (10**6, 10**6)
    with pytest.raises(
        UserError, match=r"150 images x 1000000 x 1000000 x 3 = .* GiB do not fit in"
    ):
        in_memory(source, workers=0)


# Workers when their run ends

PROGRAM = """
import os, sys
from tests.data.test_registry import Decoding, block
from vit_scale import data
if __name__ == "__main__":
    stream = data.train_batches(Decoding(20), block(batch=6, workers=2), 0, 0)
    pids = {int.from_bytes(next(stream)[1]["image"][0, 0, 0].tobytes(), "little") for _ in range(9)}
    print(*pids, flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.read()
"""


def start(tmp_path, argument):
    (tmp_path / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, tmp_path / "program.py", argument],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_exits_silently_with_an_open_stream(tmp_path):
    """It leaves no workers, no shared memory and no message about them."""
    _, errors = start(tmp_path, "end").communicate(timeout=60)
    assert errors == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_survive_a_stop_signal_but_not_their_run(tmp_path):
    run = start(tmp_path, "wait")
    workers = [int(pid) for pid in run.stdout.readline().split()]
    try:
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        assert all(alive(pid) for pid in workers)
        run.kill()
        run.wait()
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(pid) for pid in workers)
    finally:
        for pid in (pid for pid in (run.pid, *workers) if alive(pid)):
            os.kill(pid, signal.SIGKILL)
        run.communicate()

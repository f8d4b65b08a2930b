"""data/workers.py: a killed process and too little shared memory are one-line errors."""

import errno
import os
import signal

import numpy as np
import pytest
from PIL import Image

from vit_scale import cli, config, data
from vit_scale.data import loader, shards, workers
from vit_scale.errors import RESUMABLE, UserError

BASE = config.FOLDER / "base.py"


class FailingSource:
    """A source that decodes; reading example 5 calls `do`."""

    name, classes, size, decodes = "ending", tuple("abc"), (2, 3), True

    def __init__(self, do, n: int = 40):
        self.do, self.n = do, n

    def __len__(self) -> int:
        return self.n

    def read(self, indices):
        if 5 in indices:
            self.do()
        return {
            "image": np.zeros((len(indices), 2, 3, 3), np.uint8),
            "label": np.zeros(len(indices), np.int32),
            "mask": np.ones(len(indices), bool),
        }


def kill(number: int):
    return lambda: os.kill(os.getpid(), number)


def exit_with_3():
    os._exit(3)


def no_memory():
    raise MemoryError


def no_room():
    raise OSError(errno.ENOSPC, "No space left on device", "/psm_1234")


def no_semaphore():
    raise OSError(errno.ENOSPC, "No space left on device")


FAILURES = {
    "sigkill": (
        kill(signal.SIGKILL),
        ("SIGKILL, as by the kernel's OOM", "data.workers=1"),
    ),
    "sigbus": (kill(signal.SIGBUS), ("by SIGBUS: /dev/shm (", "batches of 0.0 MB", "shm-size")),
    "sigsegv": (kill(signal.SIGSEGV), ("a data worker was killed by SIGSEGV;",)),
    "exit": (exit_with_3, ("a data worker ended with exit code 3;",)),
    "memory": (no_memory, ("a data worker ran out of memory;", "smaller batches")),
    "room": (no_room, ("is full: 1 workers pass", "--config.data.workers=0")),
    "semaphore": (no_semaphore, ("/dev/shm (", "is full", "--config.data.workers=0")),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fix the reported size of /dev/shm, whatever this machine has."""
    monkeypatch.setattr(workers, "shared_memory", lambda: (64 * 2**20, 1_500_000))


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_worker_is_one_line_with_the_cause_and_remedy(failure):
    """In evaluation; training and `in_memory` read in the same way."""
    do, expected = FAILURES[failure]
    with pytest.raises(UserError) as caught:
        list(data.eval_batches(FailingSource(do), 4, workers=1))
    line = str(caught.value)
    assert caught.value.code == RESUMABLE and "\n" not in line
    assert all(part in line for part in expected), line
    assert ("67.1 MB, 1.5 MB free now" in line) == ("is full" in line)


@pytest.mark.parametrize("read", ["train", "memory"])
def test_a_killed_worker_in_training_or_in_memory(read):
    source = FailingSource(kill(signal.SIGKILL))
    cfg = config.base().data
    cfg.update({"batch": 40, "workers": 2})
    with pytest.raises(UserError, match="a data worker was killed by SIGKILL") as caught:
        if read == "train":
            list(data.train_batches(source, cfg, 0, 0, 4))
        else:
            loader.in_memory(source, 1)
    assert caught.value.code == RESUMABLE


def test_exceptions_in_a_worker_are_raised_unchanged():
    def file_is_gone():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/image.jpg")

    def mistake():
        raise UserError("this image is wrong", 2)

    def defect():
        raise RuntimeError("an odd thing")

    for do, kind, line in (
        (file_is_gone, OSError, "/data/image.jpg"),
        (mistake, UserError, "this image is wrong"),
        (defect, RuntimeError, "an odd thing"),
    ):
        with pytest.raises(kind) as caught:
            list(data.eval_batches(FailingSource(do), 4, workers=1))
        assert str(caught.value).endswith(line if kind is not OSError else f"{line}'")
        assert getattr(caught.value, "code", 2) == 2


def do_nothing():
    """Let example 5 be read like any other."""


def large(n: int = 10_000) -> FailingSource:
    source = FailingSource(do_nothing, n)
    source.size = (100, 100)
    return source


def test_too_little_shared_memory_is_refused(monkeypatch):
    """Batches of 4 x 30,005 bytes, of which a worker and its reader hold six."""
    assert loader.shared_bytes(large(), 4, 10_000, 2) == 12 * 4 * 30_005
    assert loader.shared_bytes(large(), 4, 3, 2) == 3 * 4 * 30_005, "no more than all batches"
    assert loader.shared_bytes(large(), 4, 3, 0) == 0
    exactly = 12 * 4 * 30_005
    monkeypatch.setattr(workers, "shared_memory", lambda: (64 * 2**20, exactly))
    data.check_shared_memory([(large(), 4, 10_000)], 2)
    monkeypatch.setattr(workers, "shared_memory", lambda: (64 * 2**20, exactly - 1))
    for call in (
        lambda: data.check_shared_memory([(large(), 4, 10_000)], 2),
        lambda: list(data.eval_batches(large(), 4, workers=2)),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == RESUMABLE
        assert str(caught.value).startswith(
            "data.workers=2 pass batches of up to 0.1 MB through /dev/shm, 1.4 MB at a time; "
            "it has 67.1 MB, 1.4 MB free: increase it (docker run --shm-size"
        )


def test_training_and_evaluation_share_the_memory(monkeypatch):
    parts = [(large(), 4, 10_000), (large(), 4, 10_000)]
    monkeypatch.setattr(workers, "shared_memory", lambda: (2**30, 24 * 4 * 30_005))
    data.check_shared_memory(parts, 2)
    monkeypatch.setattr(workers, "shared_memory", lambda: (2**30, 24 * 4 * 30_005 - 1))
    with pytest.raises(UserError, match=r"2\.9 MB at a time"):
        data.check_shared_memory(parts, 2)


def test_nothing_is_refused_if_shared_memory_is_unknown(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(workers, "SHARED", str(tmp_path / "none"))  # macOS
    assert workers.shared_memory() is None
    data.check_shared_memory([(large(), 10**6, 10_000)], 2)
    monkeypatch.setattr(workers, "SHARED", str(tmp_path))
    size, free = workers.shared_memory()
    assert size >= free >= 0 and size > 0


def test_training_is_refused_before_the_first_step(jpegs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers, "shared_memory", lambda: (2**20, 2**20))
    words = (
        "steps=9 data.name=folder data.batch=64 data.resolution=224 data.workers=1 eval.split= "
        "eval.final= model.variant=Ti/16 model.depth=1 model.classes=3 log.wandb=False"
    )
    fields = [f"--config.{word}" for word in (*words.split(), f"data.path={jpegs}")]
    workdir = tmp_path / "run"
    code = cli.main(["train", "--config", str(BASE), "--workdir", str(workdir), *fields])
    out, err = capsys.readouterr()
    assert (code, out) == (RESUMABLE, "")
    assert "of up to 9.6 MB through /dev/shm, 57.8 MB at a time; it has 1.0 MB" in err
    assert not workdir.exists()


# The processes of `data pack`


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def crash(number: int) -> int:
    os._exit(4)


def fail(number: int) -> int:
    raise UserError(f"{number} is wrong", 2)


def test_a_pool_returns_the_results_of_its_processes():
    results = dict(workers.parallel_map(abs, [-1, -2, -3], 2))
    assert results == {-1: 1, -2: 2, -3: 3}


@pytest.mark.parametrize(
    "work, items, message",
    [
        (die, [3], "a process was killed by SIGKILL, as by the kernel's OOM killer"),
        (die, list(range(9)), "a process was killed by SIGKILL, as by the kernel's OOM killer"),
        (crash, [1, 2], "a process ended with exit code 4; give"),
    ],
)
def test_a_dead_process_of_a_pool_is_a_one_line_error(work, items, message):
    with pytest.raises(UserError) as caught:
        list(workers.parallel_map(work, items, 2))
    assert caught.value.code == RESUMABLE and str(caught.value).startswith(message)
    assert "--workers" in str(caught.value) and "\n" not in str(caught.value)


def test_exceptions_in_a_pool_are_raised_unchanged():
    with pytest.raises(UserError, match=r"^7 is wrong$") as caught:
        list(workers.parallel_map(fail, [7], 1))
    assert caught.value.code == 2


def test_data_pack_reports_a_dead_process(tmp_path, capsys, monkeypatch):
    for folder in ("train/a", "train/b"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / folder / "1.png")
    monkeypatch.setattr(shards, "write_shard", crash)
    code = cli.main(["data", "pack", f"{tmp_path}/set", f"{tmp_path}/out", "--workers", "1"])
    out, err = capsys.readouterr()
    assert (code, out) == (RESUMABLE, "")
    assert err.startswith("vit-scale: a process ended with exit code 4; give the machine")

"""tracker: rows are averages, speed is the device's, and the loop waits no more than needed."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tracking import BATCH, Clock, loss, rows, tracker
from vit_scale.distributed import multihost
from vit_scale.errors import RESUMABLE


def test_a_row_is_the_average_over_its_interval(cfg, tmp_path):
    with tracker(tmp_path, cfg) as track:
        for step, value in enumerate([1.0, 2.0, 5.0, 7.0], start=1):
            track(step, loss(value))
        assert track.latest["train/loss"] == 1.5
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [(2, 1.5), (4, 6.0)]
    assert track.latest["train/loss"] == 6.0


def test_the_last_incomplete_interval_is_written_at_the_end(cfg, tmp_path):
    with pytest.raises(SystemExit), tracker(tmp_path, cfg, steps=100) as track:
        for step in (1, 2, 3):
            track(step, loss(step))
        raise SystemExit(RESUMABLE)
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [(2, 1.5), (3, 3.0)]


def test_after_a_crash_the_device_is_left_alone(cfg, tmp_path):
    with pytest.raises(RuntimeError, match="on fire"), tracker(tmp_path, cfg) as track:
        track(1, Unreachable())
        raise RuntimeError("on fire")
    assert rows(tmp_path) == []


class Unreachable:
    """Metrics on a device that does not answer."""

    def block_until_ready(self):
        raise AssertionError("waited for")

    def __array__(self, *arguments, **options):
        raise AssertionError("fetched")


class Handle:
    """A metric on the device that notes, on one list, when it is waited for and fetched."""

    def __init__(self, step: int, log: list):
        self.step, self.log = step, log

    def block_until_ready(self):
        self.log.append(("wait", self.step))
        return self

    def __array__(self, *arguments, **options):
        self.log.append(("fetch", self.step))
        return np.float32(self.step)


def test_the_newest_step_is_neither_waited_for_nor_fetched(cfg, tmp_path):
    log, fetches = [], []

    def reduce(values):
        fetches.append([float(value) for value in values])
        return {"loss": np.mean(values)}

    cfg.log.every = 3
    with tracker(tmp_path, cfg, steps=9, reduce=reduce) as track:
        for step in range(1, 10):
            track(step, Handle(step, log))
            assert all(touched < step for _, touched in log)
        assert fetches == [
            [1, 2, 3],
            [4, 5, 6],
        ]  # one fetch an interval, of steps before the newest
    assert fetches == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert [step for kind, step in log if kind == "fetch"] == list(range(1, 10))


def test_the_host_runs_at_most_two_steps_ahead(cfg, tmp_path):
    cfg.log.every = 1000
    log = []
    with tracker(tmp_path, cfg, steps=1000, reduce=lambda values: {}) as track:
        for step in range(1, 8):
            track(step, Handle(step, log))
            waited = max((touched for _, touched in log), default=0)
            assert waited >= step - 2


def test_rows_stay_in_the_order_of_steps(cfg, tmp_path):
    with tracker(tmp_path, cfg) as track:
        track(1, loss(1))
        track(2, loss(1))
        track.scalars(2, {"eval/accuracy": jnp.float32(0.5), "eval/n": 10})
        track(3, loss(1))
        track.scalars(3, {"eval/accuracy": 0.25})
    keys = [(row["step"], "train/loss" in row, row.get("eval/accuracy")) for row in rows(tmp_path)]
    assert keys == [(2, True, None), (2, False, 0.5), (3, False, 0.25), (3, True, None)]
    assert rows(tmp_path)[1]["eval/n"] == 10


# Speed


def test_speed_leaves_out_the_first_step_and_pauses(cfg, tmp_path):
    clock = Clock()
    cfg.log.every = 3
    asked = []

    def mfu(images_per_second):
        asked.append(images_per_second)
        return 0.4

    with tracker(tmp_path, cfg, steps=6, clock=clock, mfu=mfu) as track:
        clock.now += 60  # compilation
        track(1, loss(1))
        clock.now += 2
        track(2, loss(1))  # from here the first step is known to be done
        clock.now += 2
        with track.timer("data"):
            clock.now += 1
        track(3, loss(1))
        with track.timer("eval"):
            clock.now += 1000
        clock.now += 8
        track(4, loss(1))
        assert track.seconds == 1073
    first, second = rows(tmp_path)
    assert first["step_seconds"] == 1.5  # steps 2 and 3 in 3 seconds
    assert first["images_per_second"] == pytest.approx(BATCH / 1.5)
    assert first["data_wait_fraction"] == pytest.approx(1 / 3)
    assert first["mfu"] == 0.4
    assert first["seconds"] == 65
    assert second["step"] == 4
    assert second["step_seconds"] == 8  # without the thousand of the evaluation
    assert second["data_wait_fraction"] == 0
    assert asked == [first["images_per_second"], second["images_per_second"]]
    assert track.images_per_second == pytest.approx(3 * BATCH / 11)


def test_a_first_step_alone_has_no_speed(cfg, tmp_path):
    with tracker(tmp_path, cfg, steps=1) as track:
        track(1, loss(1))
    (row,) = rows(tmp_path)
    assert set(row) == {"step", "time", "train/loss", "seconds"}
    assert track.images_per_second is None


def test_an_unknown_peak_has_no_mfu(cfg, tmp_path):
    clock = Clock()
    with tracker(tmp_path, cfg, clock=clock, mfu=lambda images_per_second: None) as track:
        for step in (1, 2, 3):
            track(step, loss(1))
            clock.now += 1
    assert "images_per_second" in rows(tmp_path)[0]
    assert "mfu" not in rows(tmp_path)[0]


def test_waiting_for_batches_is_counted(cfg, tmp_path):
    clock = Clock()

    def slow():
        for i in range(1, 5):
            clock.now += 3
            yield i

    with tracker(tmp_path, cfg, clock=clock) as track:
        results = []
        for step in track.waiting(slow()):
            clock.now += 1
            track(step, loss(1))
            results.append(step)
    assert results == [1, 2, 3, 4]
    assert rows(tmp_path)[1]["data_wait_fraction"] == 0.75


def test_only_process_zero_writes(cfg, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(multihost, "is_first", lambda: False)
    cfg.log.wandb = cfg.log.tensorboard = True
    workdir = tmp_path / "run"
    with tracker(workdir, cfg, quiet=False) as track:
        track.images("train/images", 1, np.zeros((1, 4, 4, 3), np.uint8))
        for step in (1, 2, 3):
            track(step, loss(step))
        track.scalars(3, {"a": 1})
        assert track.latest["train/loss"] == 1.5  # all see the same numbers, and decide the same
    assert not workdir.exists()
    assert capfd.readouterr() == ("", "")

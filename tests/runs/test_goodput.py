"""goodput: where a run's time went, over several attempts."""

import json

import pytest

from vit_scale.runs import goodput
from vit_scale.runs.goodput import Ledger, duration, summarise


def attempt(began, seen, first, last, **seconds):
    return {
        "began": began, "seen": seen, "start": first, "step": last, "seconds": seconds, "code": 0,
    }  # fmt: skip


def test_all_of_the_time_is_accounted_for():
    attempts = [
        attempt(100, 160, 0, 50, start=5.0, compile=10.0, train=40.0, checkpoint=5.0),
        attempt(170, 240, 30, 100, restore=10.0, train=56.0, eval=4.0),
    ]
    summary = summarise(attempts)
    # 20 of the first attempt's 50 steps were repeated: 16 of its 40 seconds.
    assert summary["recomputed_steps"] == 20
    assert summary["productive"] == pytest.approx(24 + 56)
    assert summary["wall"] == 140 and summary["goodput"] == pytest.approx(80 / 140)
    assert summary["lost"] == pytest.approx(
        {
            "start": 5, "compile": 10, "checkpoint": 5, "restore": 10, "eval": 4,
            "recomputed steps": 16, "between attempts": 10,
        }
    )  # fmt: skip
    assert summary["productive"] + sum(summary["lost"].values()) == pytest.approx(summary["wall"])


def test_an_attempt_whose_steps_were_all_repeated_is_not_productive():
    attempts = [attempt(0, 10, 0, 8, train=10.0), attempt(10, 30, 0, 16, train=20.0)]
    assert summarise(attempts)["productive"] == 20
    later = [*attempts, attempt(30, 40, 4, 12, train=10.0)]  # twelve of the second's are lost
    assert summarise(later)["recomputed_steps"] == 8 + 12


def test_a_ledger_is_stored_and_a_rollback_is_a_new_attempt(tmp_path):
    now, cpu = iter(range(100, 1000)), iter(range(0, 7000, 7))
    ledger = Ledger(tmp_path, clock=lambda: next(now), cpu_clock=lambda: next(cpu))
    ledger.begin_at(4)
    ledger.add("train", 2.0, 10)
    ledger.add("eval", 1.0, 10)
    ledger.add("train", 3.0, 12)
    ledger.begin_at(8)  # back from 12
    ledger.add("train", 1.0, 9)
    ledger.end(42)
    Ledger(tmp_path).end(0)
    first, second, third = goodput.read(tmp_path)
    assert (first["start"], first["step"], first["code"]) == (4, 12, None)
    assert first["seconds"] == {"train": 5.0, "eval": 1.0}
    assert (second["start"], second["step"], second["code"]) == (8, 9, 42)
    assert (third["seconds"], third["code"]) == ({}, 0)
    assert (first["cpu"], second["cpu"]) == (21, 7)
    assert summarise([first, second])["cpu"] == 28
    del first["cpu"]  # an older run's
    assert summarise([first, second])["cpu"] is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempts": 3}'])
def test_a_damaged_ledger_is_ignored(tmp_path, content):
    (tmp_path / goodput.FILE).write_text(content)
    assert goodput.read(tmp_path) == []
    Ledger(tmp_path).end(0)
    assert len(json.loads((tmp_path / goodput.FILE).read_text())["attempts"]) == 1


def test_durations_are_readable():
    texts = {0.26: "0.3 s", 59: "59.0 s", 61: "1 min 1 s", 7322: "2 h 2 min"}
    assert {seconds: duration(seconds) for seconds in texts} == texts

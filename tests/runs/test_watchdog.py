"""watchdog: heartbeats, the exit of a run that hangs, and the name of the host that failed."""

import json
import subprocess
import sys
import threading

import pytest

from vit_scale.config import base
from vit_scale.distributed import multihost
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.runs import goodput, watchdog
from vit_scale.runs.watchdog import Watchdog


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def limits():
    return base().watchdog


@pytest.fixture
def ended(monkeypatch):
    """The (message, code) with which a watchdog ended its process."""
    exits = []

    def end(self, line, code=RESUMABLE):
        exits.append((line, code))
        raise Ended

    monkeypatch.setattr(Watchdog, "exit_process", end)
    return exits


def heartbeat(run, number=0) -> dict:
    return json.loads((run / watchdog.FOLDER / f"{number}.json").read_text())


def test_a_heartbeat_reports_phase_step_and_exit_code(tmp_path, limits):
    with Watchdog(tmp_path, limits) as this:
        assert heartbeat(tmp_path)["phase"] == "start"
        this.begin_at(4)
        with watchdog.phase("train"):
            watchdog.beat(7)
            with watchdog.phase("eval"):
                this.write_heartbeat()
                content = heartbeat(tmp_path)
                assert (content["phase"], content["step"], content["code"]) == ("eval", 7, None)
            this.write_heartbeat()
            assert heartbeat(tmp_path)["phase"] == "train"
    content = heartbeat(tmp_path)
    assert (content["phase"], content["step"], content["code"]) == ("start", 7, 0)
    (attempt,) = goodput.read(tmp_path)
    assert (attempt["start"], attempt["step"], attempt["code"]) == (4, 7, 0)
    assert attempt["seconds"].keys() == {"start", "train", "eval"}


def test_the_final_status_is_written(tmp_path, limits):
    with pytest.raises(ValueError), Watchdog(tmp_path, limits) as this:
        try:
            with this.report_failure():
                raise ValueError("a mistake")
        finally:  # at once, and it stays while the run is cleaned up
            assert heartbeat(tmp_path)["words"] == "a mistake"
            this.write_heartbeat()
    assert (heartbeat(tmp_path)["code"], heartbeat(tmp_path)["words"]) == (1, "a mistake")
    assert goodput.read(tmp_path)[-1]["code"] == 1


def test_a_failure_of_what_is_opened_beside_it_is_no_success(tmp_path, limits):
    with pytest.raises(UserError), Watchdog(tmp_path, limits):
        raise UserError("the disk is full", 42)
    assert (heartbeat(tmp_path)["code"], heartbeat(tmp_path)["words"]) == (42, "the disk is full")
    assert goodput.read(tmp_path)[-1]["code"] == 42


def test_a_thread_survives_any_exception_and_reports_it_once(tmp_path, limits, capsys):
    """Otherwise a later hang would last for ever."""
    this, calls, checked = Watchdog(tmp_path, limits), [], threading.Event()
    this.every = 0.001

    def fail():
        calls.append(1)
        raise KeyError("nobody expected this")

    def check():
        if len(calls) > 3:
            checked.set()

    thread = threading.Thread(target=this._loop, args=(fail, check), daemon=True)
    thread.start()
    assert checked.wait(30), "the checks after the failure still run"
    this._ended.set()
    thread.join(10)
    output = capsys.readouterr().err
    assert output == (
        "vit-scale: error in the watchdog, which keeps running (KeyError: 'nobody expected this')\n"
    )


HANGS = """
import pathlib, sys, threading
from vit_scale.config import base
from vit_scale.runs import watchdog
limits = base().watchdog
limits.step = 0.5
watchdog.LAST_WORDS = 0.5
with watchdog.Watchdog(pathlib.Path(sys.argv[1]), limits) as this:
    with watchdog.phase("train"):
        watchdog.beat(7)
        watchdog.files.write = lambda *arguments: threading.Event().wait()
        threading.Event().wait()
"""


def test_storage_that_hangs_does_not_keep_a_process_alive(tmp_path):
    """Nor its heartbeats, of which the last would be written before it ends."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == RESUMABLE
    assert "in phase train, after step 7 (limit: watchdog.step=0.5 s)" in done.stderr


def test_an_invalid_heartbeat_of_another_host(three_hosts, ended, monkeypatch, capsys):
    """From another version, or damaged: this host's own limits still apply."""
    this, _ = three_hosts
    (this.run / watchdog.FOLDER).mkdir(parents=True, exist_ok=True)
    (this.run / watchdog.FOLDER / "1.json").write_text(json.dumps({"attempt": this.attempt}))
    rounds = iter([False, False, False, True])
    monkeypatch.setattr(this._ended, "wait", lambda seconds: next(rounds))
    this._loop(lambda: this._peers.check(60))
    assert (
        capsys.readouterr().err.count(
            "error in the watchdog, which keeps running (KeyError: 'code')"
        )
        == 1
    )


def test_nothing_is_recorded_outside_of_training(tmp_path):
    with Watchdog(tmp_path, base().watchdog) as this:
        this.enter_phase("train")
    with watchdog.phase("eval"):
        watchdog.beat(3)
    assert (this.step, heartbeat(tmp_path)["phase"]) == (0, "train")


@pytest.mark.parametrize(
    ("phase", "limit"),
    [("train", "step"), ("data", "step"), ("eval", "step"), ("compile", "compile"),
     ("checkpoint", "storage"), ("restore", "storage"), ("start", "storage")],
)  # fmt: skip
def test_each_phase_has_its_limit(tmp_path, limits, ended, monkeypatch, phase, limit):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    limits.update(dict.fromkeys(limits, 0.0))
    this = Watchdog(tmp_path, limits)
    this.enter_phase(phase)
    this.beat(5)
    now[0] = 1e6
    this._check_limit()  # 0 is no limit
    limits[limit] = 60.0
    this.beat(6)
    now[0] += 59
    this._check_limit()
    assert ended == []
    now[0] += 2
    with pytest.raises(Ended):
        this._check_limit()
    assert ended == [
        (
            f"no progress for 61 s in phase {phase}, after step 6 "
            f"(limit: watchdog.{limit}=60 s); all stacks are printed above",
            RESUMABLE,
        )
    ]


@pytest.fixture
def three_hosts(tmp_path, limits, monkeypatch):
    """The watchdog of process 0 of three, and a clock: [seconds]."""
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(multihost, "has_peers", lambda: True)
    monkeypatch.setattr(multihost, "broadcast", lambda value: value)
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 3)
    this = Watchdog(tmp_path, limits)
    (tmp_path / watchdog.FOLDER).mkdir()
    return this, now


def write_peer(this, number, attempt=None, code=None, words="", step=5):
    content = {
        "attempt": attempt or this.attempt, "host": f"worker-{number}", "phase": "train",
        "step": step, "code": code, "words": words,
    }  # fmt: skip
    (this.run / watchdog.FOLDER / f"{number}.json").write_text(json.dumps(content))


def test_a_silent_host_is_named(three_hosts, ended):
    this, now = three_hosts
    for second in range(0, 100, 10):
        now[0] = float(second)
        write_peer(this, 1, step=second)
        if second < 40:
            write_peer(this, 2, step=second)
        if second < 70:
            this._peers.check(30.0)
    with pytest.raises(Ended):
        this._peers.check(30.0)
    ((line, code),) = ended
    assert line.startswith("process 2 (worker-2) has sent no heartbeat for 60 s (last: phase train")
    assert "step 30): it was killed, hangs, or lost its network" in line and code == RESUMABLE


def test_a_heartbeat_of_an_earlier_attempt_does_not_count(three_hosts, ended):
    this, now = three_hosts
    for second in range(5):
        now[0] = 10.0 * second
        write_peer(this, 1, attempt="before", code=1, words="an old mistake", step=second)
        write_peer(this, 2, step=second)
        if second < 4:
            this._peers.check(35.0)
    with pytest.raises(Ended):
        this._peers.check(35.0)
    assert ended[0][0].startswith("process 1 (worker-1) has sent no heartbeat for 40 s")


def test_a_failed_host_ends_its_peers_with_its_exit_code(three_hosts, ended):
    this, _ = three_hosts
    write_peer(this, 1, code=42, words="process 2 (worker-2): a mistake")  # it stopped because of 2
    write_peer(this, 2, code=1, words="a mistake")
    with pytest.raises(Ended):
        this._peers.check(30.0)
    assert ended == [("process 2 (worker-2): a mistake", 1)]


def test_a_host_that_finished_is_not_blamed(three_hosts, ended):
    this, now = three_hosts
    write_peer(this, 1, code=0)
    write_peer(this, 2, code=0)
    this._peers.check(30.0)
    now[0] += 100
    this._peers.check(30.0)
    assert ended == []


def test_a_host_that_stopped_with_all_peers_is_not_blamed(three_hosts, ended):
    """Process 0 ends last: it still writes the metrics of all."""
    this, now = three_hosts
    write_peer(
        this, 1, code=42, words="stopped by SIGTERM after step 7; rerun the same command to resume"
    )
    write_peer(this, 2, code=0)
    this._peers.check(30.0)
    now[0] += 100
    this._peers.check(30.0)
    assert ended == []


def test_a_failed_host_blames_no_other(three_hosts, ended):
    this, _ = three_hosts
    write_peer(this, 1, code=1, words="a mistake")
    this._code = 1
    this._peers.check(30.0)
    assert ended == []


def test_find_cause_names_a_silent_host(three_hosts, ended, monkeypatch):
    this, now = three_hosts
    write_peer(this, 1)
    write_peer(this, 2)

    def beat(seconds):
        now[0] += seconds
        write_peer(this, 1, step=int(10 * now[0]))

    monkeypatch.setattr(watchdog.time, "sleep", beat)
    with pytest.raises(Ended):
        this._peers.find_cause()
    assert ended[0][0].startswith("process 2 (worker-2) has sent no heartbeat for ")

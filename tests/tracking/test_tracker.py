"""What a run wrote is read back from each writer, and the loop is held to what it may wait for."""

import contextlib
import errno
import io
import json
import math
import os
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from clu import metrics as clu_metrics
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.helpers.wandb_offline import OfflineRun
from vit_scale.config import base
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.tracking import (
    Tracker,
    git_state,
    parameter_table,
    publish,
    versions,
    wandb_writer,
    writers,
)

DESCRIPTION = {
    "config": {"seed": 3, "optim": {"lr": 0.5}},
    "git": {"commit": "c0ffee", "dirty": True},
    "devices": {"kind": "abacus", "count": 2},
    "parameters": "head/kernel <4 x 2>",
}
BATCH = 10


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    loss: clu_metrics.Average.from_output("loss")


def loss(value: float) -> TrainMetrics:
    return TrainMetrics.single_from_model_output(loss=jnp.float32(value))


class Clock:
    """Seconds that pass only when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def cfg():
    cfg = base()
    cfg.data.batch = BATCH
    cfg.log.every, cfg.log.wandb, cfg.log.tensorboard = 2, False, False
    return cfg


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """No test may find the key, or the settings, of the person who runs it."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def forgotten():
    """wandb remembers the key that it has found, and the variables that it has read."""
    yield
    wandb.teardown()


def tracker(workdir, cfg, steps=4, start=0, **options) -> Tracker:
    options = {"quiet": True, **options}
    return Tracker(workdir, cfg, "little", steps, start, DESCRIPTION, **options)


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir: Path) -> list[Event]:
    """Of all event files, in the order of their names: TFRecord framing, 8 + 4 + n + 4 bytes."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            found.append(Event.FromString(data[position + 12 : position + 12 + length]))
            position += length + 16
    return found


# The loop


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
        seen = []
        for step in track.waiting(slow()):
            clock.now += 1
            track(step, loss(1))
            seen.append(step)
    assert seen == [1, 2, 3, 4]
    assert rows(tmp_path)[1]["data_wait_fraction"] == 0.75


# JSON lines


def test_resuming_drops_what_the_killed_run_wrote_later(cfg, tmp_path):
    with tracker(tmp_path, cfg, steps=8) as track:
        for step in range(1, 7):
            track(step, loss(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo')  # torn by the kill
    with tracker(tmp_path, cfg, steps=8, start=4) as track:
        for step in range(5, 9):
            track(step, loss(100 + step))
    values = [(row["step"], row["train/loss"]) for row in rows(tmp_path)]
    assert values == [(2, 1.5), (4, 3.5), (6, 105.5), (8, 107.5)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_without_a_checkpoint_starts_over(cfg, tmp_path):
    for _ in range(2):
        with tracker(tmp_path, cfg) as track:
            track.scalars(0, {"eval/accuracy": 0.1})
    assert [row["step"] for row in rows(tmp_path)] == [0]


def test_not_a_number_is_null(cfg, tmp_path):
    with tracker(tmp_path, cfg) as track:
        track.scalars(1, {"a": math.nan, "b": jnp.float32("inf"), "c": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)


def test_every_row_is_on_the_disk_at_once(cfg, tmp_path):
    with tracker(tmp_path, cfg) as track:
        track.scalars(7, {"a": 1})
        assert rows(tmp_path)[0]["step"] == 7


@contextlib.contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line(cfg, tmp_path):
    refused = pytest.raises(UserError, match=r"metrics.*free space")
    with refused as caught, full_disk(64), tracker(tmp_path, cfg) as track:
        track.scalars(1, {f"value{i}": i for i in range(100)})
    assert "\n" not in str(caught.value)


def test_a_workdir_that_cannot_be_made_is_one_line(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir"), tracker(tmp_path / "file" / "run", cfg):
        pass


# TensorBoard


def test_tensorboard_holds_scalars_images_config_and_parameters(cfg, tmp_path):
    cfg.log.tensorboard = True
    with tracker(tmp_path, cfg) as track:
        track.images("train/images", 1, np.full((2, 3, 5, 3), 7, np.uint8))
        track(1, loss(1))
        track(2, loss(2))
        track.scalars(2, {"eval/accuracy": math.nan})
    values = {value.tag: (e.step, value) for e in events(tmp_path) for value in e.summary.value}
    assert values["train/loss"][0] == 2
    assert values["train/loss"][1].simple_value == 1.5
    assert math.isnan(values["eval/accuracy"][1].simple_value)
    step, shown = values["train/images/1"]
    assert (step, shown.image.height, shown.image.width) == (1, 3, 5)
    assert "train/images/2" not in values
    assert b"head/kernel <4 x 2>" in values["parameters/text_summary"][1].tensor.string_val[0]
    assert b'"lr": 0.5' in values["config/text_summary"][1].tensor.string_val[0]
    assert b"c0ffee" in values["config/text_summary"][1].tensor.string_val[0]


def test_a_resumed_run_adds_a_file_and_purges_later_steps(cfg, tmp_path):
    cfg.log.tensorboard = True
    for start in (0, 2):
        with tracker(tmp_path, cfg, start=start) as track:
            track(start + 1, loss(1))
            track(start + 2, loss(1))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [1, 3]  # TensorBoard forgets these steps and later ones of older files


# Weights & Biases


def test_without_a_key_wandb_runs_offline_and_says_how_to_sync(cfg, tmp_path, capfd):
    cfg.log.wandb = True
    workdir = tmp_path / "a run"
    with tracker(workdir, cfg, quiet=False) as track:
        track.images("train/images", 1, np.zeros((2, 4, 4, 3), np.uint8))
        track(1, loss(1))
        track(2, loss(2))
        track.scalars(2, {"eval/accuracy": 0.75})
    run = OfflineRun(workdir)
    row = {k: v for found in run.history if found["_step"] == 2 for k, v in found.items()}
    assert (row["train/loss"], row["eval/accuracy"]) == (1.5, 0.75)
    pictures = next(row["train/images"] for row in run.history if "train/images" in row)
    assert (pictures["count"], pictures["width"]) == (2, 4)
    assert run.config["config"] == {"seed": 3, "optim": {"lr": 0.5}}
    assert run.config["git"] == {"commit": "c0ffee", "dirty": True}
    assert run.config["devices"]["kind"] == "abacus"
    (page,) = (run.folder / "files" / "media" / "html").iterdir()
    assert "head/kernel &lt;4 x 2&gt;" in page.read_text()
    assert (run.run.project, run.run.display_name, run.exit_code) == ("vit_scale", "little", 0)
    output = capfd.readouterr().err
    assert shlex.split(output.splitlines()[-1]) == ["wandb", "sync", str(run.folder)]
    assert "wandb:" not in output


def test_a_resumed_wandb_run_keeps_its_id_and_exits_with_the_code(cfg, tmp_path, capsys):
    cfg.log.wandb = True
    with tracker(tmp_path, cfg, quiet=False) as track:
        track(1, loss(1))
    first = OfflineRun(tmp_path)
    first_id = first.run.run_id
    old = first.folder.rename(tmp_path / "wandb" / f"offline-run-20000101_000000-{first_id}")
    with pytest.raises(SystemExit), tracker(tmp_path, cfg, start=2, quiet=False) as track:
        track(3, loss(1))
        raise SystemExit(RESUMABLE)
    second = OfflineRun(tmp_path, f"offline-run-20[!0]*-{first_id}")
    assert second.exit_code == RESUMABLE
    assert [row["_step"] for row in second.history if "train/loss" in row] == [3]
    line = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(line) == ["wandb", "sync", str(old), str(second.folder)]


def test_pictures_are_added_to_the_page_of_a_finished_run(cfg, tmp_path, capsys):
    """Under the run's own id, and not at its last step, of which Weights & Biases has a row."""
    cfg.log.wandb = True
    with tracker(tmp_path, cfg, quiet=False) as track:
        track(1, loss(1))
    first = OfflineRun(tmp_path)
    old = first.folder.rename(tmp_path / "wandb" / f"offline-run-20000101_0-{first.run.run_id}")
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    publish(tmp_path, "vit_scale", "little", {"inspect/map": picture}, {"inspect/step": 1})
    second = OfflineRun(tmp_path, f"offline-run-20[!0]*-{first.run.run_id}")
    (row,) = second.history
    shown = row["inspect/map"]
    assert (row["inspect/step"], shown["height"], shown["width"]) == (1, 4, 5)
    file = second.folder / "files" / shown["path"]
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    assert second.exit_code == 0 and second.run.project == "vit_scale"
    line = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(line) == ["wandb", "sync", str(old), str(second.folder)]


def test_wandb_mode_decides_where_it_is_set(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cfg.log.wandb = True
    with tracker(tmp_path, cfg, quiet=False) as track:
        track.scalars(1, {"a": 1})
    assert not list((tmp_path / "wandb").glob("offline-run-*"))
    assert "sync" not in capsys.readouterr().err


@pytest.mark.parametrize(("place", "mode"), [("", "offline"), ("variable", None), ("netrc", None)])
def test_a_key_makes_wandb_run_online(cfg, tmp_path, monkeypatch, forgotten, place, mode):
    key, asked = "0" * 40, []
    if place == "variable":
        monkeypatch.setenv("WANDB_API_KEY", key)
    if place == "netrc":
        host = urllib.parse.urlsplit(wandb.Settings().base_url).hostname
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {key}\n")

    def refuse(**options):
        asked.append(options["mode"])
        raise wandb.errors.CommError("no network.")

    monkeypatch.setattr(wandb_writer, "check_reachable", lambda url: None)
    monkeypatch.setattr(wandb, "init", refuse)
    cfg.log.wandb = True
    with tracker(tmp_path, cfg):
        pass
    assert asked == [mode, "offline"], "the second is what is left where the first fails"


# A server that can't be reached, refuses, or is lost: training goes on


NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def outage(monkeypatch, forgotten):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    wandb.teardown()


def told(capsys) -> tuple[list[str], list[str]]:
    """The lines about Weights & Biases, and the words of the last one: the command to upload."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "Weights & Biases" in line], shlex.split(lines[-1])


def test_an_outage_is_said_once_and_the_run_goes_on_offline(
    cfg, tmp_path, outage, monkeypatch, capsys
):
    """Also at a resume; it is the same run. wandb's own patience, 90 s, is never asked."""
    cfg.log.wandb, asked, init = True, [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **o: (asked.append(o["mode"]), init(**o))[1])
    with tracker(tmp_path, cfg, quiet=False) as track:
        track(1, loss(1))
        track(2, loss(2))
    run = OfflineRun(tmp_path)
    first = run.run.run_id
    old = run.folder.rename(tmp_path / "wandb" / f"offline-run-20000101_0-{first}")
    said, command = told(capsys)
    assert [line for line in said if "can't be reached" in line] == [
        f"vit-scale: Weights & Biases: {NOWHERE} can't be reached (Connection refused); run "
        f"{first} goes on offline, and its end prints the line that uploads it"
    ]
    assert command == ["wandb", "sync", str(run.folder)]
    assert [row["_step"] for row in run.history if "train/loss" in row] == [2]
    with tracker(tmp_path, cfg, start=2) as track:  # quiet: what is missing is said all the same
        track(3, loss(3))
        track(4, loss(3))
    second = OfflineRun(tmp_path, f"offline-run-20[!0]*-{first}")
    said, command = told(capsys)
    assert len(said) == 2 and "can't be reached" in said[0]
    assert command == ["wandb", "sync", str(old), str(second.folder)]
    assert asked == ["offline", "offline"]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]


class Online:
    """A run that is online, until its server is lost at `lost`."""

    offline = disabled = False
    url = "https://wandb.example/run"

    def __init__(self, folder: Path, lost: str, **options):
        self.dir, self._lost = str(folder / "wandb" / "run-1-x" / "files"), lost
        self.id, self.config, self.settings = options["id"], self, options["settings"]
        self.logged: list[int] = []

    def update(self, *arguments, **options):
        if self._lost == "config":
            raise wandb.errors.CommError("rate limit exceeded.")

    def log(self, row, step=None):
        if self._lost == "log" and step == 2:
            raise ConnectionResetError("Connection lost")
        self.logged.append(step)

    def finish(self, exit_code):
        if self._lost == "finish":
            raise TimeoutError("Timed out waiting for the upload.")


@pytest.fixture
def online(tmp_path, monkeypatch, forgotten):
    """Gives a function: wandb.init gives an `Online` run that is lost at a certain point."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_writer, "check_reachable", lambda url: None)
    init, made = wandb.init, []

    def begin(lost: str) -> list:
        def begin_online(**options):
            if options["mode"] == "offline":
                return init(**options)
            made.append(Online(tmp_path, lost, **options))
            return made[-1]

        monkeypatch.setattr(wandb, "init", begin_online)
        return made

    return begin


@pytest.mark.parametrize(
    "lost, reason", [("config", "rate limit exceeded"), ("log", "Connection lost")]
)
def test_a_server_that_is_lost_on_the_way(cfg, tmp_path, online, capsys, lost, reason):
    cfg.log.wandb, made = True, online(lost)
    with tracker(tmp_path, cfg, quiet=False) as track:
        for step in (1, 2, 3, 4):
            track(step, loss(step))
        track.scalars(4, {"eval/accuracy": 0.5})
    run = OfflineRun(tmp_path)
    assert run.run.run_id == made[0].id and 2 not in made[0].logged
    losses = {row["_step"]: row["train/loss"] for row in run.history if "train/loss" in row}
    assert losses == {2: 1.5, 4: 3.5}
    said, command = told(capsys)
    assert len([line for line in said if f": {reason}; run {run.run.run_id} goes on" in line]) == 1
    assert command == ["wandb", "sync", str(Path(made[0].dir).parent), str(run.folder)]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 4]


def test_an_upload_that_does_not_end_is_left_to_its_command(cfg, tmp_path, online, capsys):
    cfg.log.wandb, made = True, online("finish")
    with tracker(tmp_path, cfg) as track:
        track.scalars(1, {"a": 1})
    said, command = told(capsys)
    assert len(said) == 2 and "Timed out waiting for the upload; the rest" in said[0]
    assert command == ["wandb", "sync", str(Path(made[0].dir).parent)]
    settings = made[0].settings
    assert settings.finish_timeout_raises and (settings.finish_timeout, settings.init_timeout) == (
        wandb_writer.FINISH,
        wandb_writer.BEGIN,
    )


def test_wandbs_process_is_killed(cfg, tmp_path, forgotten, capsys):
    """The real one. What it had is in one folder, what came after it in another."""
    cfg.log.wandb = True
    wandb.teardown()
    with tracker(tmp_path, cfg, quiet=False) as track:
        track.scalars(1, {"a": 1})
        for pid in children("wandb-core"):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        (first,) = (tmp_path / "wandb").glob("offline-run-*")
        first = first.rename(tmp_path / "wandb" / f"offline-run-20000101_0-{first.name[-8:]}")
        track.scalars(2, {"a": 2})
        track.scalars(3, {"a": 3})
    second = OfflineRun(tmp_path, "offline-run-20[!0]*")
    assert [row["a"] for row in second.history if "a" in row] == [2, 3]
    said, command = told(capsys)
    assert len([line for line in said if "goes on offline" in line]) == 1
    assert command == ["wandb", "sync", str(first), str(second.folder)]


def children(name: str) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = stat.read_text().rpartition(")")
            if name in words[0] and int(words[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def test_a_mode_that_there_is_not_is_refused_at_the_start(cfg, tmp_path, monkeypatch, forgotten):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    cfg.log.wandb = True
    with pytest.raises(UserError, match="set WANDB_MODE=offline") as caught, tracker(tmp_path, cfg):
        pass
    assert "\n" not in str(caught.value)


def test_a_key_that_wandb_refuses_ends_nothing(cfg, tmp_path, monkeypatch, forgotten, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "nonsense")
    cfg.log.wandb = True
    with tracker(tmp_path, cfg) as track:
        track.scalars(1, {"a": 1})
    said, command = told(capsys)
    assert len(said) == 2 and "goes on offline" in said[0] and command[:2] == ["wandb", "sync"]
    assert rows(tmp_path)[0]["a"] == 1


def test_without_wandb_at_all_the_training_goes_on(cfg, tmp_path, monkeypatch, capsys):
    def refuse(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wandb, "init", refuse)
    cfg.log.wandb = True
    with tracker(tmp_path, cfg) as track:
        track.images("train/images", 1, np.zeros((2, 4, 4, 3), np.uint8))
        track.scalars(1, {"a": 1})
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left on device; training goes on without it" in err
    assert rows(tmp_path)[0]["a"] == 1


def test_pictures_of_a_finished_run_still_need_the_server(tmp_path, outage):
    with pytest.raises(UserError, match=r"can't be reached .*; set WANDB_MODE=offline"):
        publish(tmp_path, "vit_scale", "little", {}, {"a": 1})


def test_a_proxy_is_left_to_wandb(monkeypatch):
    with pytest.raises(OSError, match=f"{NOWHERE} can't be reached"):
        wandb_writer.check_reachable(NOWHERE)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    wandb_writer.check_reachable(NOWHERE)


@pytest.mark.parametrize("when", ["start", "scalars", "images"])
def test_tensorboard_ends_no_training(cfg, tmp_path, monkeypatch, capsys, when):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    name = {"start": "__init__", "scalars": "write_scalars", "images": "write_images"}[when]
    monkeypatch.setattr(writers.TensorBoardWriter, name, full)
    cfg.log.tensorboard = True
    with tracker(tmp_path, cfg) as track:
        track.images("train/images", 0, np.zeros((1, 4, 4, 3), np.uint8))
        for step in (1, 2, 3, 4):
            track(step, loss(step))
    said = "vit-scale: TensorBoard: [Errno 28] No space left on device; training goes on without it"
    assert capsys.readouterr().err == f"{said}\n"
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]
    if when != "start":
        values = {e.step for e in events(tmp_path) if e.HasField("summary")}
        assert 4 not in values, "what has failed is not written to again"


def test_a_terminal_that_is_gone_ends_no_training(cfg, tmp_path, monkeypatch):
    """As in `vit-scale train ... 2>&1 | head`."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    with tracker(tmp_path, cfg, quiet=False) as track:
        for step in (1, 2, 3, 4):
            track(step, loss(step))
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]


@pytest.mark.parametrize("on", [False, True])
def test_what_is_off_is_not_imported(tmp_path, on):
    program = f"""
import pathlib, sys
from vit_scale.config import base
from vit_scale.tracking import Tracker
cfg = base()
cfg.log.wandb = cfg.log.tensorboard = {on}
description = {{"config": {{}}, "parameters": ""}}
with Tracker(pathlib.Path(sys.argv[1]), cfg, "n", 1, 0, description) as track:
    track.scalars(1, {{"a": 1}})
print([name in sys.modules for name in ("wandb", "tensorboardX", "tensorflow")])
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == str([on, on, False])


# The terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(cfg, tmp_path, capsys):
    clock = Clock()
    with tracker(tmp_path, cfg, quiet=False, clock=clock, mfu=lambda rate: 0.5) as track:
        for step in (1, 2, 3):
            track(step, loss(2.5))
            clock.now += 2
        track.scalars(3, {"eval/accuracy": 0.75, "eval/n": 10000})
    output = capsys.readouterr()
    first, evaluation, last = output.err.splitlines()
    assert first.startswith("little 2/4  loss 2.5  ")
    assert "images_per_second 5 " in first
    assert "mfu 0.5 " in first
    assert "step_seconds" not in first  # a line shows what a person looks for
    assert first.endswith("seconds_left 4")
    assert evaluation == "little 3/4  eval/accuracy 0.75  eval/n 10000"
    assert last.startswith("little 3/4  loss 2.5")
    assert output.out == ""


def test_a_bar_on_a_terminal(cfg, tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with tracker(tmp_path, cfg, quiet=False, steps=8, start=4) as track:
        for step in (5, 6, 7, 8):
            track(step, loss(2.5))
        track.scalars(8, {"eval/accuracy": 0.75})
    text = screen.getvalue()
    lines = [line.strip() for part in text.split("\n") for line in part.split("\r")]
    assert any("4/8" in line for line in lines)  # the bar begins where the run does
    assert any("8/8" in line and "loss 2.5" in line for line in lines)
    assert "little 8/8  eval/accuracy 0.75" in lines
    assert not any(line.startswith("little 6/8  loss") for line in lines)


def test_quiet_says_nothing(cfg, tmp_path, capfd):
    cfg.log.wandb = True
    with tracker(tmp_path, cfg) as track:
        track(1, loss(1))
    assert capfd.readouterr() == ("", "")


# Other processes


def test_only_process_zero_writes(cfg, tmp_path, capfd):
    cfg.log.wandb = cfg.log.tensorboard = True
    workdir = tmp_path / "run"
    with tracker(workdir, cfg, quiet=False, process=1) as track:
        track.images("train/images", 1, np.zeros((1, 4, 4, 3), np.uint8))
        for step in (1, 2, 3):
            track(step, loss(step))
        track.scalars(3, {"a": 1})
        assert track.latest["train/loss"] == 1.5  # all see the same numbers, and decide the same
    assert not workdir.exists()
    assert capfd.readouterr() == ("", "")


# Provenance


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state(tmp_path):
    assert git_state(tmp_path / "absent") is None
    git(tmp_path, "init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "m")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("a")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_a_package_in_a_repository_that_is_not_its_own_has_no_git_state(tmp_path, monkeypatch):
    """Installed in somebody's project; the same files in a clone of their own have one."""
    git(tmp_path, "init")
    installed = tmp_path / ".venv/lib/python3.11/site-packages/vit_scale"
    beside, inside = tmp_path / "vit_scale", tmp_path / "third_party" / "clone" / "vit_scale"
    for folder in (installed, beside, inside):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (tmp_path / "main.py").write_text("a")
    git(tmp_path, "add", "main.py")
    git(tmp_path, "commit", "-m", "m")
    assert git_state(installed) is None, "in a folder of it"
    assert git_state(beside) is None, "put there by pip install --target, and not tracked"
    git(tmp_path, "add", "-f", str(installed / "__init__.py"))
    git(tmp_path, "commit", "-m", "m")
    assert git_state(installed) is None, "committed, but not as a project"
    git(inside.parent, "init")
    assert git_state(inside) is None, "no commit yet"
    git(inside.parent, "add", "vit_scale")
    git(inside.parent, "commit", "-m", "m")
    own = {"commit": git(inside, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(inside) == own
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # started by a hook of the other
    assert git_state(inside) == own
    link = tmp_path / "link"
    link.symlink_to(inside)
    assert git_state(link) == own


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) is None


def test_versions_name_what_is_installed():
    found = versions()
    assert found["jax"] == jax.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"flax", "optax", "orbax-checkpoint", "grain", "clu"} <= set(found)


def test_parameter_table():
    table = parameter_table({"head": {"kernel": np.zeros((3, 5), np.float32)}})
    assert "head/kernel" in table
    assert "15" in table

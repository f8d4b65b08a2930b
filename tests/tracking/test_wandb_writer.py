"""wandb_writer: online if possible, offline otherwise; it never ends a run."""

import contextlib
import errno
import os
import shlex
import signal
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from tests.helpers.tracking import loss, rows, tracker
from tests.helpers.wandb_offline import OfflineRun
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.tracking import (
    publish,
    wandb_writer,
)


def test_without_a_key_wandb_runs_offline_and_says_how_to_sync(cfg, tmp_path, capfd):
    cfg.log.wandb = True
    workdir = tmp_path / "a run"
    with tracker(workdir, cfg, quiet=False) as track:
        track.images("train/images", 1, np.zeros((2, 4, 4, 3), np.uint8))
        track(1, loss(1))
        track(2, loss(2))
        track.scalars(2, {"eval/accuracy": 0.75})
    run = OfflineRun(workdir)
    row = {k: v for result in run.history if result["_step"] == 2 for k, v in result.items()}
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


def test_rows_of_earlier_steps_are_written_after_the_last_one(cfg, tmp_path):
    """W&B would drop those of a rollback, and an evaluation that a resumed run repeats."""
    cfg.log.wandb = True
    with tracker(tmp_path, cfg) as track:
        for step, accuracy in ((8, 0.75), (3, 0.25), (5, 0.5), (20, 1.0)):
            track.scalars(step, {"eval/accuracy": accuracy})
    history = OfflineRun(tmp_path).history
    measured = [row for row in history if "eval/accuracy" in row]
    written = [(row.get("step", row["_step"]), row["eval/accuracy"]) for row in measured]
    assert written == [(8, 0.75), (3, 0.25), (5, 0.5), (20, 1.0)]


def test_pictures_are_added_to_the_page_of_a_finished_run(cfg, tmp_path, capsys):
    """Under the run's id, after its last step, which has a row in Weights & Biases already."""
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


@pytest.mark.parametrize(("path", "mode"), [("", "offline"), ("variable", None), ("netrc", None)])
def test_a_key_makes_wandb_run_online(cfg, tmp_path, monkeypatch, forgotten, path, mode):
    key, asked = "0" * 40, []
    if path == "variable":
        monkeypatch.setenv("WANDB_API_KEY", key)
    if path == "netrc":
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


# A server that is unreachable, refuses, or is lost: training continues


NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def outage(monkeypatch, forgotten):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    wandb.teardown()


def messages(capsys) -> tuple[list[str], list[str]]:
    """The lines about Weights & Biases, and the last one, the upload command, as arguments."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "Weights & Biases" in line], shlex.split(lines[-1])


def test_an_outage_is_said_once_and_the_run_goes_on_offline(
    cfg, tmp_path, outage, monkeypatch, capsys
):
    """Also when resuming, with the same run id, and without wandb's own timeout of 90 s."""
    cfg.log.wandb, asked, init = True, [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **o: (asked.append(o["mode"]), init(**o))[1])
    with tracker(tmp_path, cfg, quiet=False) as track:
        track(1, loss(1))
        track(2, loss(2))
    run = OfflineRun(tmp_path)
    first = run.run.run_id
    old = run.folder.rename(tmp_path / "wandb" / f"offline-run-20000101_0-{first}")
    printed, command = messages(capsys)
    assert [line for line in printed if "can't be reached" in line] == [
        f"vit-scale: Weights & Biases: {NOWHERE} can't be reached (Connection refused); run "
        f"{first} continues offline, and its end prints the command to upload it"
    ]
    assert command == ["wandb", "sync", str(run.folder)]
    assert [row["_step"] for row in run.history if "train/loss" in row] == [2]
    with tracker(tmp_path, cfg, start=2) as track:  # quiet: what is missing is said all the same
        track(3, loss(3))
        track(4, loss(3))
    second = OfflineRun(tmp_path, f"offline-run-20[!0]*-{first}")
    printed, command = messages(capsys)
    assert len(printed) == 2 and "can't be reached" in printed[0]
    assert command == ["wandb", "sync", str(old), str(second.folder)]
    assert asked == ["offline", "offline"]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]


class Online:
    """A run that is online, until its server is lost at `lost`."""

    offline = disabled = False
    step = 0
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
    """A function that makes wandb.init return an `Online` run that is lost at a given point."""
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


def test_what_a_resumed_run_repeats_is_not_written_twice(cfg, tmp_path, online, monkeypatch):
    """Its rows are the same to the bit; only its evaluation may have been lost."""
    cfg.log.wandb, made = True, online("never")
    monkeypatch.setattr(Online, "step", 100)  # what the server has
    with tracker(tmp_path, cfg) as track:
        track.scalars(40, {"train/loss": 1.0})
        track.scalars(40, {"eval/accuracy": 0.5})
        track.scalars(120, {"train/loss": 0.5})
    assert [step for step in made[0].logged if step] == [101, 120]


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
    printed, command = messages(capsys)
    assert (
        len([line for line in printed if f": {reason}; run {run.run.run_id} continues" in line])
        == 1
    )
    assert command == ["wandb", "sync", str(Path(made[0].dir).parent), str(run.folder)]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 4]


@pytest.mark.parametrize("manager, seconds", [("", 120), *((m, 30) for m in wandb_writer.MANAGED)])
def test_an_upload_that_does_not_end_is_left_to_its_command(
    cfg, tmp_path, online, capsys, monkeypatch, manager, seconds
):
    """Under a manager earlier: a stop leaves two minutes, also for the checkpoint."""
    for name in wandb_writer.MANAGED:
        monkeypatch.delenv(name, raising=False)
    if manager:
        monkeypatch.setenv(manager, "17")
    cfg.log.wandb, made = True, online("finish")
    with tracker(tmp_path, cfg) as track:
        track.scalars(1, {"a": 1})
    printed, command = messages(capsys)
    assert len(printed) == 2 and "Timed out waiting for the upload; the rest" in printed[0]
    assert command == ["wandb", "sync", str(Path(made[0].dir).parent)]
    settings = made[0].settings
    assert settings.finish_timeout_raises
    assert (settings.finish_timeout, settings.init_timeout) == (seconds, wandb_writer.BEGIN)


def test_wandbs_process_is_killed(cfg, tmp_path, forgotten, capsys):
    """The real process. Rows before its death are in one folder, later ones in another."""
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
    printed, command = messages(capsys)
    assert len([line for line in printed if "continues offline" in line]) == 1
    assert command == ["wandb", "sync", str(first), str(second.folder)]


def children(name: str) -> list[int]:
    result = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = stat.read_text().rpartition(")")
            if name in words[0] and int(words[2].split()[1]) == os.getpid():
                result.append(int(stat.parent.name))
    return result


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
    printed, command = messages(capsys)
    assert (
        len(printed) == 2 and "continues offline" in printed[0] and command[:2] == ["wandb", "sync"]
    )
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
    assert err.count("\n") == 1 and "No space left on device; training continues without it" in err
    assert rows(tmp_path)[0]["a"] == 1


def test_pictures_of_a_finished_run_still_need_the_server(tmp_path, outage):
    with pytest.raises(UserError, match=r"can't be reached .*; set WANDB_MODE=offline"):
        publish(tmp_path, "vit_scale", "little", {}, {"a": 1})


def test_a_proxy_is_left_to_wandb(monkeypatch):
    with pytest.raises(OSError, match=f"{NOWHERE} can't be reached"):
        wandb_writer.check_reachable(NOWHERE)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    wandb_writer.check_reachable(NOWHERE)

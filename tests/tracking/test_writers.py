"""writers: the files that each wrote, and failures, which rarely end a run."""

import contextlib
import errno
import io
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from tests.helpers.tracking import Clock, events, loss, rows, tracker
from vit_scale.errors import UserError
from vit_scale.tracking import (
    writers,
)

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
    printed = (
        "vit-scale: TensorBoard: [Errno 28] No space left on device; training continues without it"
    )
    assert capsys.readouterr().err == f"{printed}\n"
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
from vit_scale.tracking import TrackedRun, Tracker
cfg = base()
cfg.log.wandb = cfg.log.tensorboard = {on}
description = {{"name": "n", "config": {{}}, "parameters": ""}}
with Tracker(TrackedRun(pathlib.Path(sys.argv[1]), cfg, description)) as track:
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

"""timm_training: the minutes of another program's training, with a script in timm's place."""

import json
import os
import sys
import time

import pytest

from benchmarks import timm_training
from vit_scale.errors import UserError

SCRIPT = """
import pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
flags |= {word: sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word.startswith("--")}
if flags.get("--opt") == "wrong":
    sys.exit(3)
folder = pathlib.Path(flags["--output"], flags["--experiment"])
(folder / "calls.txt").open("a").write(" ".join(sys.argv[1:]) + "\\n")

def work(seconds):
    begin = time.process_time()
    while time.process_time() < begin + seconds:
        pass

epochs, every = int(flags["--epochs"]), int(flags["--val-interval"])
work(.1)
for epoch in range(int("--resume" in flags), epochs):
    print(f"Train: {epoch} [0/9]", flush=True)
    work(.4)
    if (epoch + 1) % every and epoch + 1 != epochs:
        continue
    print("Test: [0/9]", flush=True)
    work(.2)
    with (folder / "summary.csv").open("a") as file:  # as timm's: a header for each process
        if epoch < 3 or epoch + 1 == epochs:
            file.write("epoch,eval_top1\\n")
        file.write(f"{epoch},{50 + epoch}\\n")
    (folder / "last.pth.tar").touch()
"""


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_training, "POLL", 0.05)
    (tmp_path / "clone" / "timm").mkdir(parents=True)
    (tmp_path / "clone" / "timm" / "version.py").write_text("__version__ = '1.2.3'\n")
    (tmp_path / "clone" / "train.py").write_text(SCRIPT)
    for name in ("a", "b"):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        (tmp_path / "data" / "test" / name / "1.jpeg").touch()
    return ["--clone", str(tmp_path / "clone"), "--data", str(tmp_path / "data"),
            "--out", str(tmp_path / "out")]  # fmt: skip


def test_the_epochs_follow_from_the_minutes_and_stay(places, tmp_path):
    out, command = tmp_path / "out", [*places, "--minutes", "0.05", "--", "--opt", "adamw"]
    timm_training.main(command)
    report = json.loads((out / "report.json").read_text())
    state = json.loads((out / "state.json").read_text())
    assert 0.3 <= state["epoch"] < 0.55 and 0.1 <= state["evaluation"] < 0.4
    train = 3 - state["start"]  # of .05 minutes
    assert report["epochs"] == int(train / (state["epoch"] + state["evaluation"] / 3)) > 3
    assert report["curve"][0] == [3, 0.52]
    assert report["curve"][-1] == [report["epochs"], (49 + report["epochs"]) / 100]
    assert report["eval"] == {"split": "test", "accuracy": report["curve"][-1][1], "n": 2}
    assert 1.5 <= report["cpu"] < 5
    assert (report["minutes"], report["flags"]) == (0.05, ["--opt", "adamw"])
    assert report["version"] == "1.2.3"
    first = (out / "timm" / "run" / "calls.txt").read_text()
    assert "--opt adamw" in first and "--resume" not in first

    with pytest.raises(UserError, match=r"out has a report\.json"):
        timm_training.main(command)
    (out / "report.json").unlink()  # as if it had been stopped after a checkpoint
    timm_training.main(command)
    again = json.loads((out / "report.json").read_text())
    assert again["epochs"] == report["epochs"] and again["cpu"] > report["cpu"]
    assert again["curve"] == report["curve"], (
        "though the file has a second header, and epochs twice"
    )
    assert "--resume" in (out / "timm" / "run" / "calls.txt").read_text()
    assert (out / "timm" / "calibration" / "calls.txt").read_text().count("\n") == 1


def test_a_run_goes_on_with_its_own_flags_alone(places, tmp_path):
    timm_training.main([*places, "--minutes", "0.01", "--", "--opt", "adamw"])
    (tmp_path / "out" / "report.json").unlink()
    for minutes, optimizer in (("0.01", "sgd"), ("0.02", "adamw")):
        with pytest.raises(UserError, match=r"out has a run with other flags or --minutes"):
            timm_training.main([*places, "--minutes", minutes, "--", "--opt", optimizer])


def test_a_script_that_fails_is_reported(places):
    with pytest.raises(UserError, match=r"timm's script failed with 3; see .*log\.txt"):
        timm_training.main([*places, "--minutes", "1", "--", "--opt", "wrong"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_seconds_are_those_of_the_process():
    before = timm_training.cpu_seconds(os.getpid())
    begin = time.process_time()
    while time.process_time() < begin + 0.1:
        pass
    assert timm_training.cpu_seconds(os.getpid()) - before == pytest.approx(0.1, abs=0.08)
    assert timm_training.cpu_seconds(2**22 + 1) == 0

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
(folder / "last.pth.tar").touch()
begin = time.process_time()
while time.process_time() < begin + 0.2:
    pass
rows = "".join(f"{i},{50 + i}\\n" for i in range(int(flags["--epochs"])))
(folder / "summary.csv").write_text("epoch,eval_top1\\n" + rows)
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
    command = [*places, "--minutes", "0.02", "--", "--opt", "adamw"]
    timm_training.main(command)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert state["epoch_cpu"] > 0
    assert report["epochs"] == max(2, int(1.2 / state["epoch_cpu"])), "of .02 minutes"
    assert report["curve"][0] == 0.5 and len(report["curve"]) == report["epochs"]
    assert report["eval"] == {"split": "test", "accuracy": report["curve"][-1], "n": 2}
    assert 0.1 <= report["cpu"] < 5
    assert (report["minutes"], report["flags"]) == (0.02, ["--opt", "adamw"])
    assert report["version"] == "1.2.3"
    first = (tmp_path / "out" / "timm" / "run" / "calls.txt").read_text()
    assert "--opt adamw" in first and "--resume" not in first
    timm_training.main(command)
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert again["epochs"] == report["epochs"] and again["cpu"] > report["cpu"] + 0.1
    assert "--resume" in (tmp_path / "out" / "timm" / "run" / "calls.txt").read_text()
    assert (tmp_path / "out" / "timm" / "calibration" / "calls.txt").read_text().count("\n") == 1


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

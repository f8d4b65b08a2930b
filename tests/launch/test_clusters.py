"""launch/slurm.sbatch against a fake SLURM."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

from tests.helpers.fake_cloud import ROOT, machine, script

# Like srun, run the command once, and on SIGTERM kill the step instead of forwarding the signal.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >>"$LOG"; shift; done
"$@" &
echo $! >"$LOG.step"
trap 'kill -KILL $!' TERM
wait $!
code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
exit $code
"""
TRAINER = """#!/bin/bash
echo "vit-scale $*" >>"$LOG"
echo "key ${KEY:-none} devices ${JAX_LOCAL_DEVICE_IDS:-none}" >>"$LOG"
trap 'echo saved >>"$LOG"; exit 42' TERM
if [[ -n ${WAIT:-} ]]; then touch "$WAIT"; for i in $(seq 400); do sleep 0.05; done; fi
exit "${TRAINER:-0}"
"""


class Slurm:
    def __init__(self, folder: pathlib.Path):
        self.folder, self.root = folder, folder / "a clone"
        self.log, self.bin = folder / "log", folder / "bin"
        for part in (self.root / "launch", self.root / ".venv" / "bin", self.bin):
            part.mkdir(parents=True)
        script(self.root / "launch" / "environment.sh", '#!/bin/bash\necho "env $*" >>"$LOG"\n')
        script(self.root / ".venv" / "bin" / "vit-scale", TRAINER)
        script(self.bin / "srun", SRUN)
        script(self.bin / "scontrol", '#!/bin/bash\necho "scontrol $*" >>"$LOG"\n')

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        environment = {
            "PATH": f"{self.bin}:{machine()}",
            "HOME": str(self.folder),
            "LOG": str(self.log),
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_ID": "7",
            **variables,
        }
        command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *words]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, *words: str, **variables: str) -> tuple[int, str]:
        process = self.start(*words, **variables)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    return Slurm(tmp_path)


def test_slurm_runs_one_task_per_node(slurm):
    file = slurm.folder / ".vit_scale" / "secrets.env"
    file.parent.mkdir()
    file.write_text("KEY='a b'\n")
    assert slurm.run("--config", "x")[0] == 65, "the secrets file is readable by others"
    file.chmod(0o600)
    assert slurm.run("--config", "x", "--workdir", "a b") == (0, "")
    assert slurm.lines() == [
        "env gpu",
        "--kill-on-bad-exit=1",
        "--ntasks-per-node=1",
        "vit-scale train --config x --workdir a b",
        "key a b devices none",
    ]


@pytest.mark.parametrize("gpus, device_ids", [("4", "0,1,2,3"), ("1", "0"), ("0", "none")])
def test_slurm_uses_all_gpus_of_the_node(slurm, gpus, device_ids):
    """By default, JAX would use only the GPU whose index is the process's local ID."""
    assert slurm.run(SLURM_GPUS_ON_NODE=gpus)[0] == 0
    assert slurm.lines()[-1] == f"key none devices {device_ids}"
    assert slurm.run(SLURM_GPUS_ON_NODE=gpus, JAX_LOCAL_DEVICE_IDS="7")[0] == 0
    assert slurm.lines()[-1] == "key none devices 7"


@pytest.mark.parametrize(
    "code, expected, requeued", [(42, 0, True), (1, 1, False), (43, 43, False)]
)
def test_slurm_requeues_resumable_runs(slurm, code, expected, requeued):
    assert slurm.run("--config", "x", TRAINER=str(code))[0] == expected
    assert ("scontrol requeue 7" in slurm.lines()) == requeued


def test_slurm_gives_up_after_a_hundred_requeues(slurm):
    code, err = slurm.run(TRAINER="42", SLURM_RESTART_COUNT="100")
    assert (code, "giving up" in err) == (42, True)
    assert "scontrol requeue 7" not in slurm.lines()


def signalled_pid(slurm: Slurm, process: subprocess.Popen) -> int:
    """Return the PID that SLURM signals: the batch shell's with --signal=B:, else the step's."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    (option,) = re.findall(r"^#SBATCH --signal=(\S+)$", text, re.M)
    assert option.endswith("TERM@120")
    return process.pid if option.startswith("B:") else int((slurm.folder / "log.step").read_text())


@pytest.mark.parametrize("shell_too", [False, True])
def test_slurm_saves_before_the_time_limit(slurm, shell_too):
    """SIGTERM goes where --signal sends it; at the time limit, the shell gets one too."""
    ready = slurm.folder / "ready"
    process = slurm.start("--config", "x", WAIT=str(ready))
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if shell_too:
        os.kill(process.pid, signal.SIGTERM)
    os.kill(signalled_pid(slurm, process), signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert slurm.lines()[-2:] == ["saved", "scontrol requeue 7"]


def test_slurm_must_be_submitted_from_the_repository(slurm):
    code, err = slurm.run(SLURM_SUBMIT_DIR=str(slurm.folder))
    assert code == 64 and "submit from there" in err

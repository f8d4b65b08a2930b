"""launch/slurm.sbatch against a fake SLURM, and the manifests that launch/gke.py renders."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

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


def gke(*more: str) -> subprocess.CompletedProcess:
    arguments = ["--config", "quickstart:pretrain", "--name", "vit", "--image", "I:1"]
    arguments += ["--workdir", "gs://b/vit"]
    command = [sys.executable, str(ROOT / "launch" / "gke.py"), *arguments, *more]
    return subprocess.run(command, capture_output=True, text=True)


def test_jobset_manifest():
    result = gke(
        "--type", "v5e-16", "--num-slices", "2", "--spot", "--secret", "wandb", "--config.seed=1"
    )
    assert result.returncode == 0, result.stderr
    manifest = yaml.safe_load(result.stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 4, 4)
    assert spec["backoffLimit"] == 0
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert rule["onExitCodes"]["values"] == [42, *range(127, 256)]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 150
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert container["command"] == shlex.split(
        "vit-scale train --config quickstart:pretrain --workdir gs://b/vit --config.seed=1"
    )


def test_xpk_command():
    words = shlex.split(gke("--type", "v4-32", "--xpk", "mine").stdout)
    assert words[:5] == ["xpk", "workload", "create", "--cluster", "mine"]
    assert words[words.index("--tpu-type") + 1] == "v4-32"
    assert words[-1] == "vit-scale train --config quickstart:pretrain --workdir gs://b/vit"


@pytest.mark.parametrize("flag", ["--secret", "--service-account"])
def test_flags_that_xpk_lacks_are_refused(flag):
    done = gke("--type", "v4-32", "--xpk", "mine", flag, "x")
    assert (done.returncode, done.stdout) == (64, "") and f"does not support {flag}" in done.stderr


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--type", "v3-32"], 78, "is not supported on GKE"),
        (["--type", "v4-32", "--workdir", "runs/x"], 65, "is on a worker's disk"),
        (["--type", "v4-32", "--config", "vit_tony"], 65, "did you mean vit_tiny"),
    ],
)
def test_mistakes_are_reported_before_rendering(words, code, message):
    result = gke(*words)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (code, "", 1)
    assert message in result.stderr

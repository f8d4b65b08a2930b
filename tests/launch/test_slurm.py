"""launch/slurm.sbatch on a real SLURM of nodes on this machine (tests/helpers/slurm_cluster.py).

The slow tests train for real, on two nodes, and let happen to the training what happens on
clusters; each prints what SLURM says at the end, and the steps of each attempt. The others run a
trainer that only tells how it was started.
"""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.helpers import slurm_cluster
from tests.helpers.fake_cloud import script
from tests.helpers.slurm_cluster import NODES, ROOT, Cluster, wait_until
from vit_scale import checkpoint

SBATCH = ROOT / "launch" / "slurm.sbatch"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
STEPS, EVERY = 100, 5  # of the training, and from checkpoint to checkpoint

# `vit-scale train ...` that takes a second for a step until FREE exists.
PACED = f"""\
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from vit_scale import cli
from vit_scale.runs import watchdog
beat = watchdog.beat
def paced(step=None):
    beat(step)
    if not os.path.exists(os.environ["FREE"]):
        time.sleep(1)
watchdog.beat = paced
sys.exit(cli.main())
"""

# Says how it was started. STEPS and CODES have the last step and the exit code of each attempt; the
# first attempt waits for SIGTERM or for the file FREE if WAIT is set.
TRAINER = """#!/bin/bash
attempt=${SLURM_RESTART_COUNT:-0}
read -ra steps <<<"${STEPS:-}"
read -ra codes <<<"${CODES:-}"
echo "task $SLURM_PROCID of $SLURM_NTASKS, $(nproc) CPUs, devices ${JAX_LOCAL_DEVICE_IDS:-all}," \\
  "key ${KEY:-none}: $*"
if [[ -n ${VIT_SCALE_HEARTBEAT:-} ]]; then
  echo '{"run": "/a run", "attempt": "0a", "step": '"${steps[attempt]:-0}"', "code": null}' \\
    >"$VIT_SCALE_HEARTBEAT"
fi
if [[ -n ${WAIT:-} && $attempt == 0 ]]; then
  trap 'echo saved; exit 42' TERM
  echo $$ >"$FREE.$SLURM_PROCID"
  while [[ ! -e $FREE ]]; do sleep 0.1; done
fi
exit "${codes[attempt]:-0}"
"""


class Clone:
    """A clone whose environment has `trainer` as its vit-scale, and the jobs submitted from it."""

    def __init__(self, cluster: Cluster, folder: pathlib.Path, trainer: str):
        self.cluster, self.root, self.home = cluster, folder / "a clone", folder / "home"
        self.free, self.run = folder / "free", folder / "run"
        for part in (self.root / "launch", self.root / ".venv" / "bin", self.home):
            part.mkdir(parents=True)
        script(self.root / "launch" / "environment.sh", "#!/bin/bash\n")
        script(self.root / ".venv" / "bin" / "vit-scale", trainer)

    def submit(self, *words: str, options: str = "--nodes 2", **variables: str) -> str:
        """Submit a job as a user does; return its number."""
        command = ["sbatch", "--parsable", *options.split(), SBATCH, *words]
        variables |= {"ACCELERATOR": "cpu", "HOME": str(self.home), "FREE": str(self.free)}
        return self.cluster.run(*command, cwd=self.root, **variables).strip()

    def train(self, **options: str) -> str:
        """Submit a training that takes its time, and wait until it has two checkpoints."""
        config = str(ROOT / "tests" / "helpers" / "soak_config.py")
        fields = {"steps": STEPS, "checkpoint.every": EVERY, "eval.every": 0, "eval.final": ""}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        job = self.submit("--config", config, "--workdir", str(self.run), *flags, **options)
        second = self.run / "checkpoints" / str(2 * EVERY)
        wait_until(second.exists, 300, lambda: self.describe(job))
        return job

    def output(self, job: str) -> str:
        """Return what a job has printed, in all attempts."""
        file = self.root / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def describe(self, job: str) -> str:
        return f"{self.cluster.job(job)}\n{self.output(job)}"

    def end(self, job: str) -> tuple[str, str, int]:
        """Wait for the job's end; return its state, exit code (code:signal) and restarts."""

        def is_over() -> bool:
            return self.cluster.job(job)["JobState"] in OVER

        wait_until(is_over, 300, lambda: self.describe(job))
        about = self.cluster.job(job)
        return about["JobState"], about["ExitCode"], int(about["Restarts"])

    def trainer(self, process: int) -> int:
        """Return the PID of a real trainer."""
        return json.loads((self.run / "heartbeats" / f"{process}.json").read_text())["pid"]

    def attempts(self) -> list[tuple[int, int]]:
        """Return the first and the last step of each attempt of a real training."""
        ledger = json.loads((self.run / "goodput.json").read_text())
        return [(attempt["start"], attempt["step"]) for attempt in ledger["attempts"]]

    def restart(self, job: str) -> None:
        """Wait until a job has been requeued once, then let its training go on at full speed."""

        def has_restarted() -> bool:
            return self.cluster.job(job)["Restarts"] == "1"

        wait_until(has_restarted, 300, lambda: self.describe(job))
        self.free.touch()

    def fingerprints(self) -> dict[str, str]:
        """Return those of the last checkpoint's arrays."""
        return checkpoint.read_manifest(self.run / "checkpoints" / str(STEPS))["arrays"]


def test_another_slurm_is_not_even_downloaded(tmp_path, monkeypatch):
    """Its configuration may differ: see slurm_cluster.TESTED."""
    monkeypatch.setattr(slurm_cluster, "CACHE", tmp_path / "cache")
    script(tmp_path / "apt-cache", "#!/bin/sh\necho 'slurmctld:'; echo '  Candidate: 23.11.4-1'\n")
    for tool in ("apt-get", "dpkg"):
        script(tmp_path / tool, f"#!/bin/sh\ntouch {tmp_path}/called\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(pytest.skip.Exception, match=r"SLURM 23\.11\.4: "):
        slurm_cluster.programs()
    assert not (tmp_path / "called").exists()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def clone(cluster, tmp_path) -> Clone:
    """For a trainer that tells how it was started."""
    return Clone(cluster, tmp_path, TRAINER)


@pytest.fixture
def real(cluster, tmp_path) -> Clone:
    return real_clone(cluster, tmp_path)


def real_clone(cluster: Cluster, folder: pathlib.Path) -> Clone:
    """Return a clone for real trainings."""
    (folder / "paced.py").write_text(PACED)
    program = shlex.join([sys.executable, str(folder / "paced.py")])
    return Clone(cluster, folder, f'#!/bin/bash\nexec {program} "$@"\n')


def write_secrets(home: pathlib.Path, content: str, mode: int) -> None:
    file = home / ".vit_scale" / "secrets.env"
    file.parent.mkdir()
    file.write_text(content)
    file.chmod(mode)


@pytest.mark.parametrize(
    "folder, mode, code, message",
    [
        ("elsewhere", 0o600, 64, "submit from there"),
        ("a clone", 0o644, 65, "secrets.env is readable by others; run: chmod 600"),
    ],
)
def test_mistakes_are_refused_in_a_line(tmp_path, folder, mode, code, message):
    """Before anything of SLURM is used."""
    write_secrets(tmp_path, "", mode)
    (tmp_path / "a clone" / "launch").mkdir(parents=True)
    script(tmp_path / "a clone" / "launch" / "environment.sh", "#!/bin/bash\n")
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    variables["SLURM_SUBMIT_DIR"] = str(tmp_path / folder)
    done = subprocess.run([SBATCH], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("slurm: ") and message in line


def test_a_job_has_the_whole_of_each_node(clone):
    write_secrets(clone.home, "KEY='a b'\n", 0o600)
    job = clone.submit("--config", "x", "--workdir", "a b")
    assert clone.end(job) == ("COMPLETED", "0:0", 0)
    assert sorted(clone.output(job).splitlines()) == [
        f"task {number} of 2, 2 CPUs, devices all, key a b: train --config x --workdir a b"
        for number in (0, 1)
    ]
    assert "mem=2000M" in clone.cluster.job(job)["TRES"]


def test_a_job_may_have_a_part_of_a_node(clone):
    part = "--nodes 1 --oversubscribe --cpus-per-task 1 --mem 300"
    job = clone.submit(options=part)
    assert clone.end(job) == ("COMPLETED", "0:0", 0)
    assert clone.output(job) == "task 0 of 1, 1 CPUs, devices all, key none: train\n"
    assert "cpu=1,mem=300M" in clone.cluster.job(job)["TRES"]


@pytest.mark.parametrize("gpus, devices", [("4", "0,1,2,3"), ("1", "0"), ("0", "all")])
def test_all_gpus_of_a_node_are_used(clone, gpus, devices):
    """By default, JAX would use only the GPU whose index is the process's local ID."""
    # SLURM would remove it from the job's environment, as the nodes have none.
    write_secrets(clone.home, f"SLURM_GPUS_ON_NODE={gpus}\n", 0o600)
    job = clone.submit(options="--nodes 1")
    assert clone.end(job) == ("COMPLETED", "0:0", 0)
    assert f"devices {devices}, key" in clone.output(job)


def test_nodes_with_different_gpus_are_refused(clone):
    with clone.cluster.gpus("a100", "a100"):
        assert clone.end(clone.submit(options="--nodes 2 --gres gpu:2")) == ("COMPLETED", "0:0", 0)
    with clone.cluster.gpus("a100", "h100"):
        job = clone.submit(options="--nodes 2 --gres gpu:2")
        assert clone.end(job) == ("FAILED", "65:0", 0)
    (line,) = clone.output(job).splitlines()
    assert "the nodes have different GPUs (gpu:a100; gpu:h100)" in line


@pytest.mark.parametrize("code", [1, 43])
def test_a_failure_that_would_recur_ends_the_job(clone, code):
    job = clone.submit(STEPS="5", CODES=str(code))
    assert clone.end(job) == ("FAILED", f"{code}:0", 0)


def messages(clone: Clone, job: str) -> list[str]:
    return [line for line in clone.output(job).splitlines() if line.startswith("slurm:")]


def test_attempts_without_progress_are_limited(clone):
    job = clone.submit(STEPS="5 5", CODES="134 42", MAX_FAILURES="1")
    assert clone.end(job) == ("FAILED", "42:0", 1)
    assert messages(clone, job) == [
        "slurm: exit code 134 after step 5; requeueing the job",
        "slurm: 1 attempts in a row got no further than step 5; giving up",
    ]
    assert not list((clone.root / ".cache" / "slurm").iterdir())


def test_a_job_outlasts_a_restart_of_the_controller_and_says_that_it_was_not_requeued(clone):
    path = clone.cluster.environment["PATH"]
    fake, real = clone.home / "scontrol", shutil.which("scontrol", path=path)
    fails = '[[ "$*" == "show job "[0-9]* && ! -e $0.asked ]] && touch "$0.asked"'
    fake_requeue = '[[ $1 == requeue ]] && echo "scontrol: no" >&2'
    lines = ["#!/bin/bash", f"{fails} && exit 1", f"{fake_requeue} && exit 1", f'exec {real} "$@"']
    script(fake, "\n".join(lines) + "\n")
    job = clone.submit(STEPS="5", CODES="42", PATH=f"{clone.home}:{path}")
    assert clone.end(job) == ("FAILED", "42:0", 0)
    assert messages(clone, job) == [
        "slurm: exit code 42 after step 5; requeueing the job",
        "slurm: the job could not be requeued (see above); to resume, submit it again",
    ]


@pytest.mark.slow
def test_by_default_a_job_has_three_attempts_to_make_progress(clone):
    assert clone.end(clone.submit(CODES="42 42 42 0")) == ("FAILED", "42:0", 2)
    job = clone.submit(STEPS="3 3 3 4 4 4 5", CODES="42 42 42 42 42 42 0")
    assert clone.end(job) == ("COMPLETED", "0:0", 6)


def test_of_an_array_only_the_resumable_job_is_requeued(clone):
    """The job that starts last has the number of the whole array as its own."""
    trainer = 'echo "$*"; ((SLURM_ARRAY_TASK_ID == 1)) || exit $((SLURM_RESTART_COUNT ? 0 : 42))'
    script(clone.root / ".venv" / "bin" / "vit-scale", f"#!/bin/bash\n{trainer}\n")
    array = clone.submit("--config.seed=%a", "a-%a", options="--nodes 1 --array 1-2")
    assert clone.end(f"{array}_2") == ("COMPLETED", "0:0", 1)
    assert clone.end(f"{array}_1") == ("COMPLETED", "0:0", 0)
    assert clone.cluster.job(f"{array}_2")["JobId"] == array
    assert clone.output(f"{array}_1") == "train --config.seed=1 a-1\n"
    assert clone.output(f"{array}_2").count("train --config.seed=2 a-2\n") == 2


def test_the_vit_scale_of_a_container_is_run(clone):
    """Options, as pyxis's, are srun's; a command, as Apptainer's, starts the trainer."""
    (clone.root / ".venv" / "bin" / "vit-scale").rename(clone.root / "vit-scale")
    script(clone.root / "launch" / "environment.sh", "#!/bin/bash\nexit 1\n")
    job = clone.submit(options="--nodes 1", CONTAINER="--label env PATH=.:/usr/bin:/bin")
    assert clone.end(job) == ("COMPLETED", "0:0", 0)
    assert clone.output(job).startswith("0: task 0 of 1")


def submit_and_wait(clone: Clone, **variables: str) -> tuple[str, int]:
    """Submit a job that waits; return its number and the PID of its second trainer."""
    job = clone.submit(WAIT="1", **variables)
    files = [clone.free.with_name(f"free.{number}") for number in (0, 1)]
    wait_until(lambda: all(file.exists() for file in files), 60, lambda: clone.describe(job))
    return job, int(files[1].read_text())


def test_a_job_that_was_told_to_stop_goes_on(clone):
    """As sbatch --signal, scancel --signal reaches the trainers; the script gets one of its own."""
    job, _ = submit_and_wait(clone)
    clone.cluster.run("scancel", "--batch", "--signal", "TERM", job)
    clone.cluster.run("scancel", "--signal", "TERM", job)
    assert clone.end(job) == ("COMPLETED", "0:0", 1)
    assert clone.output(job).count("saved") == 2
    assert messages(clone, job) == ["slurm: exit code 42 after step 0; requeueing the job"]


def test_a_job_with_a_killed_trainer_goes_on_once_the_others_have_ended(clone):
    job, second = submit_and_wait(clone)
    os.kill(second, signal.SIGKILL)
    time.sleep(2)
    assert (clone.cluster.job(job)["JobState"], messages(clone, job)) == ("RUNNING", [])
    clone.free.touch()
    assert clone.end(job) == ("COMPLETED", "0:0", 1)
    assert messages(clone, job) == ["slurm: exit code 137 after step 0; requeueing the job"]


def test_a_cancelled_job_saves_and_is_not_requeued(clone):
    job, _ = submit_and_wait(clone)
    clone.cluster.run("scancel", job)
    state, _, restarts = clone.end(job)
    assert (state, restarts) == ("CANCELLED", 0)
    wait_until(lambda: clone.output(job).count("saved") == 2, 30, lambda: clone.output(job))
    assert messages(clone, job) == []


def show(done: str, ended: tuple[str, str, int], attempts: list[tuple[int, int]]) -> None:
    """Print a row of the table: what was done, what SLURM says, the steps of each attempt."""
    state, code, restarts = ended
    steps = ", then ".join(f"{first} to {last}" for first, last in attempts)
    print(f"| {done} | {state}, exit code {code}, {restarts} restarts | {steps} |")


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> dict[str, str]:
    """The fingerprints of a training to which nothing happens."""
    clone = real_clone(cluster, tmp_path_factory.mktemp("undisturbed"))
    job = clone.train()
    clone.free.touch()
    ended, attempts = clone.end(job), clone.attempts()
    show("nothing", ended, attempts)
    assert (ended, attempts) == (("COMPLETED", "0:0", 0), [(0, STEPS)])
    return clone.fingerprints()


def kill(clone: Clone, job: str) -> None:
    os.kill(clone.trainer(1), signal.SIGKILL)


def freeze(clone: Clone, job: str) -> None:
    os.kill(clone.trainer(1), signal.SIGSTOP)


def run_out_of_time(clone: Clone, job: str) -> None:
    clone.cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+70seconds")


def preempt(clone: Clone, job: str) -> None:
    options = ["--partition", "high", "--nodes", "2", "--exclusive", "--wrap", "sleep 1"]
    clone.cluster.run("sbatch", *options, cwd=clone.root)


def lose_the_first_node(clone: Clone, job: str) -> None:
    clone.cluster.lose("127.0.0.1")


def lose_the_second_node(clone: Clone, job: str) -> None:
    clone.cluster.lose("127.0.0.2")


def requeue(clone: Clone, job: str) -> None:
    clone.cluster.run("scontrol", "requeue", job)


@pytest.mark.slow
def test_being_preempted_does_not_count_as_a_failure(clone):
    job, _ = submit_and_wait(clone, CODES="0 42 0", MAX_FAILURES="1")
    preempt(clone, job)
    assert clone.end(job) == ("FAILED", "42:0", 1), clone.describe(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    "disturb, saves",
    [
        (kill, False),
        (freeze, False),
        (run_out_of_time, True),
        (preempt, True),
        (lose_the_first_node, False),
        (lose_the_second_node, False),
        (requeue, True),
    ],
)
def test_a_disturbed_training_goes_on(undisturbed, real, disturb, saves):
    """From where it was if it had the time to save, else from its last checkpoint."""
    job = real.train(options="--nodes 2 --signal TERM@60")
    disturb(real, job)
    real.restart(job)
    for node in NODES:
        if not real.cluster.processes("SLURMD_NODENAME", node):
            real.cluster.restore(node)
    ended, ((first, last), (again, end)) = real.end(job), real.attempts()
    show(disturb.__name__, ended, [(first, last), (again, end)])
    assert ended == ("COMPLETED", "0:0", 1)
    assert (first, end) == (0, STEPS) and 2 * EVERY <= last < STEPS
    if saves:
        assert again == last
    else:
        assert again % EVERY == 0 and 2 * EVERY <= again <= last + 1  # what is kept of it lags
    assert real.fingerprints() == undisturbed


@pytest.mark.slow
def test_a_cancelled_job_is_not_requeued(real):
    job = real.train()
    real.cluster.run("scancel", job)
    ended = real.end(job)
    show("scancel", ended, real.attempts())
    assert (ended[0], ended[2]) == ("CANCELLED", 0)


@pytest.mark.slow
def test_a_second_job_in_the_same_folder_is_refused(real):
    part = "--nodes 2 --oversubscribe --cpus-per-task 1 --mem 300"
    first = real.train(options=part)
    second = real.train(options=part)
    refused = real.end(second)
    show("a second job in the folder: it", refused, [])
    assert refused == ("FAILED", "1:0", 0)
    assert "is in use by process" in real.output(second)
    real.free.touch()
    ended, attempts = real.end(first), real.attempts()
    show("a second job in the folder: the first", ended, attempts)
    assert (ended, attempts) == (("COMPLETED", "0:0", 0), [(0, STEPS)])

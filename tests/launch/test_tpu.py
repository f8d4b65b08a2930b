"""launch/tpu_vm.sh without faults: secrets, dry runs, other verbs, and this machine as a pod."""

import ast
import contextlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import threading

import pytest

from tests.helpers.fake_cloud import ROOT, Rig, machine

SENTINEL = "s3cr3t-of-nobody-4711"
LAUNCH = sorted((ROOT / "launch").rglob("*.py"))


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path, timelines=[["ACTIVE"]])
    yield made
    made.close()
    made.check()


class Spy:
    """Watch the command lines of all processes for a text."""

    def __init__(self, text: str):
        self.text, self.seen, self.polls = text.encode(), [], 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.ended.wait(0.02):
            self.polls += 1
            for process in pathlib.Path("/proc").iterdir():
                try:
                    if process.name.isdigit() and self.text in (process / "cmdline").read_bytes():
                        self.seen.append((process / "cmdline").read_bytes())
                except OSError:
                    continue

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()


def files_containing(folder: pathlib.Path, text: str) -> list[pathlib.Path]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return [file for file in files if text.encode() in file.read_bytes()]


@pytest.mark.parametrize("source", ["file", pytest.param("environment", marks=pytest.mark.slow)])
def test_a_secret_reaches_the_trainer_and_nothing_else(rig, source):
    """It appears in no command line, log, journal, bundle or call, and on no disk at the end."""
    rig.trainer_faults({"worker": 0, "step": 2, "do": "leak"})
    more, variables = ["--secret", "WANDB_API_KEY"], {"WANDB_API_KEY": SENTINEL}
    if source == "file":
        file = rig.folder / "secrets.env"
        file.write_text(f"# mine\nWANDB_API_KEY='{SENTINEL}'\n")
        assert rig.run("--env-file", str(file)).code == 65, "it is readable by others"
        file.chmod(0o600)
        more, variables = ["--env-file", str(file)], {}
    rig.inject({"match": "agent.sh secrets", "do": "after", "times": 1})
    with Spy(SENTINEL) as spy:
        code, result, err = rig.run(*more, **variables)
    if source == "file":
        file.unlink()
    assert code == 0, err
    assert [entry["secret"] for entry in rig.starts()] == [True, True]
    assert spy.polls > 10 and spy.seen == []
    assert SENTINEL not in err + json.dumps(result) + json.dumps(rig.calls())
    assert "should not print ****" in err, "secrets that a trainer prints are masked"
    logs = [file for file in files_containing(rig.folder, SENTINEL) if file.name != "train.log"]
    assert logs == [], "only the trainer's own log on the worker may contain what it printed"


@pytest.mark.slow
def test_truncated_secrets_are_refused(rig):
    """A retry by gcloud sends no input: the agent requires the line that ends it."""
    rig.inject({"match": "agent.sh secrets", "do": "before", "times": 99})
    code, _, err = rig.run("--secret", "WANDB_API_KEY", WANDB_API_KEY=SENTINEL)
    assert code == 76 and "arrived incomplete" in err, err
    assert rig.starts() == [] and SENTINEL not in err


def test_bad_secrets_are_refused_before_creation(rig):
    assert "NOPE is not set" in rig.run("--secret", "NOPE").err
    (rig.root / "configs" / "tiny.py").write_text(f"key = '{SENTINEL}'\n")
    ended = rig.run("--secret", "WANDB_API_KEY", WANDB_API_KEY=SENTINEL)
    assert ended.code == 65 and "configs/tiny.py contains the value of a secret" in ended.err
    assert rig.calls("create") == []


def test_a_dry_run_prints_the_commands_of_the_real_run(rig):
    """Each command of a run with one worker is a line of the dry run."""
    rig.hosts = 1
    rig.set(hosts=1)
    flags = [*rig.flags(), "--project", "p", "--orphan", "1h"]
    dry = rig.verb(*flags, "--dry-run", PATH=machine(), WANDB_API_KEY=SENTINEL)
    assert dry.returncode == 0, dry.stderr
    assert rig.calls() == [], "gcloud is not even called"
    assert SENTINEL not in dry.stdout and "WANDB_API_KEY=..." in dry.stdout
    import shlex

    printed = {
        tuple(shlex.split(line.partition(" <<< ")[0])[1:])
        for line in dry.stdout.splitlines()
        if line.startswith("gcloud ")
    }
    rig.inject({"match": "--dry-run", "do": "error:none", "times": 99})  # so gcloud does it all
    assert rig.end(rig.start(*flags, WANDB_API_KEY=SENTINEL)).code == 0
    real = {without_expiry(argv) for argv in rig.calls() if not is_periodic(argv)}
    assert real == {without_expiry(argv) for argv in printed if not is_periodic(argv)}
    assert any("status vit" in " ".join(argv) for argv in printed)


def is_periodic(argv) -> bool:
    """Return whether it is a periodic call, which contains the launcher's ID."""
    return "status vit" in " ".join(argv) or "lease vit" in " ".join(argv)


def without_expiry(argv) -> tuple:
    """Return the command without its expiry time."""
    import re

    return tuple(re.sub(r"expires=\d+", "expires=T", word) for word in argv)


def test_a_dry_run_needs_no_gcloud_and_no_environment(rig):
    """Names are checked here; worker 0 checks the rest."""
    shutil.rmtree(rig.root / ".venv")
    path = rig.folder / "path"
    path.mkdir()
    for tool in ("bash", "dirname", "env", "git", "cat", "cksum", "sed", "mkdir"):
        (path / tool).symlink_to(shutil.which(tool))
    dry = rig.verb(*rig.flags(), "--dry-run", PATH=str(path))
    assert dry.returncode == 0, dry.stderr
    assert dry.stderr == "config tiny not checked here: run launch/environment.sh\n"
    assert not (rig.root / ".venv").exists(), "it installs nothing"
    assert "config tiny, to be checked by worker 0" in dry.stdout
    words = ["--config", "tiny", "--target", "local:2", "--dry-run"]
    assert "config tiny, not checked here" in rig.verb(*words, PATH=str(path)).stdout
    wrong = rig.verb(*rig.flags(), "--dry-run", "--config", "tinny", PATH=str(path))
    assert wrong.returncode == 65 and "did you mean tiny?" in wrong.stderr


@pytest.mark.parametrize(
    "config, name",
    [("tiny", "tiny"), ("tiny:S/16", "tiny-s-16"), ("tiny:S/16,recipe=a", "tiny-s-16-recipe-a")],
)
def test_a_run_is_named_after_its_config_and_argument(rig, config, name):
    """So is its machine, and its folder in the bucket."""
    words = ["--config", config, "--zone", "us-a", "--type", "v4-16", "--bucket", "gs://b"]
    dry = rig.verb(*words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"workdir gs://b/{name} (flag)" in dry.stdout
    assert f"queued-resources describe {name} --zone us-a" in dry.stdout


def old_python() -> str | None:
    installed = sorted(pathlib.Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))
    return str(installed[-1]) if installed else shutil.which("python3.10")


def test_the_launcher_parses_on_python_310():
    for file in LAUNCH:
        ast.parse(file.read_text(), feature_version=(3, 10))


@pytest.mark.skipif(not old_python(), reason="there is no Python 3.10 here")
def test_the_launcher_runs_on_python_310(rig):
    code, _, err = rig.run(PYTHON=old_python())
    assert code == 0, err


@pytest.mark.parametrize(
    "more, code, message",
    [
        (["--config", "tinny"], 65, "unknown config 'tinny'; did you mean tiny?"),
        (["--config", "/etc/hosts.py"], 65, "config file /etc/hosts.py does not exist"),
        (["--config.nonsense=1"], 65, "no config field is named"),
        (["--type", "v9-8"], 78, "unknown accelerator type 'v9-8'; valid: v2-N"),
        (["--type", "v4-12"], 78, "no v4 slice has this size"),
        (["--name", "Vit_1"], 64, "--name 'Vit_1'"),
        (["--zone", ""], 64, "--zone is required"),
        (["--nmae", "x"], 64, "unrecognized arguments: --nmae (did you mean --name?)"),
        (["--workdir", "runs/x"], 65, "workdir runs/x is on a worker's disk, and all hosts must"),
        (["--target", "moon"], 64, "invalid --target moon: use auto"),
        (["--target", "local:0"], 64, "invalid --target local:0: use auto"),
        (["--type", "tpu7x-16"], 78, "only on GKE: launch/gke.py --type tpu7x-16"),
        (["--type", "tpu8x-16"], 78, "only on GKE: launch/gke.py --type tpu8x-16"),
        (
            ["--existing", "--type", "", "--dry-run", "--max-cost", "5"],
            64,
            "--max-cost needs a price",
        ),
        (["--no-queue", "--num-slices", "2"], 64, "--num-slices needs a queued resource"),
        (["--best-effort"], 64, "argument --best-effort: not allowed with argument --spot"),
        (["--gcloud-flag=range"], 64, "'range' is not --NAME or --NAME=VALUE"),
        (["--gcloud-flag=--labels=a=b"], 64, "of a flag that the launcher does not set itself"),
        (["--gcloud-flag=--async"], 64, "of a flag that the launcher does not set itself"),
        (["--worker", "x"], 64, "'x' is not all or a number"),
        (["--on-failure", "keep:soon"], 64, "'keep:soon' is not delete|keep|keep:TIME"),
        (["--grace", "soon"], 64, "'soon' is not a duration"),
        (["--", "optim.lr=1"], 64, "unexpected argument 'optim.lr=1'"),
        (["--nope"], 64, "unrecognized arguments: --nope"),
    ],
)
def test_mistakes_are_one_line_and_bill_nothing(rig, more, code, message):
    ended = rig.run(*more)
    assert (ended.code, len(ended.err.splitlines())) == (code, 1), ended.err
    assert message in ended.err
    assert rig.calls("create") == []


def test_the_best_effort_tier_needs_a_queue(rig):
    words = [word for word in rig.flags() if word != "--spot"]
    ended = rig.verb(*words, "--best-effort", "--no-queue")
    assert ended.returncode == 64 and "--best-effort needs a queued resource" in ended.stderr
    dry = rig.verb(*words, "--best-effort", "--dry-run").stdout
    assert "gcloud alpha compute tpus queued-resources create vit " in dry


def test_local_data_is_refused_or_downloaded(rig):
    ended = rig.run(FAKE_DATA="folder")
    assert ended.code == 65 and "data.path=.data is a folder on this machine" in ended.err
    dry = rig.verb(*rig.flags(), "--dry-run", FAKE_DATA="cifar10")
    assert "setup on each worker: vit-scale data download cifar10 --out .data" in dry.stdout


def test_values_from_tpu_env_name_their_source(rig):
    (rig.root / "launch" / "tpu.env").write_text("ZONE=us-c\nBUCKET=gs://mine/runs\n# TPU_TYPE=x\n")
    dry = rig.verb("--config", "tiny", "--dry-run", TPU_TYPE="v5e-16")
    assert "zone us-c (launch/tpu.env)" in dry.stdout
    assert "type v5litepod-16 ($TPU_TYPE): 16 chips, 4 hosts" in dry.stdout
    assert "workdir gs://mine/runs/tiny (launch/tpu.env)" in dry.stdout


def test_type_is_required_unless_the_vm_exists(rig):
    words = [word for word in rig.flags() if not word.startswith("--type")]
    missing = rig.verb(*words, "--target", "vm")
    assert missing.returncode == 64 and "--type is required" in missing.stderr
    dry = rig.verb(*words, "--existing", "--dry-run", PATH=machine())
    assert dry.returncode == 0, dry.stderr
    assert "type: that of TPU VM vit" in dry.stdout and " create " not in dry.stdout


def test_target_here_counts_the_hosts_own_chips(rig):
    """They take precedence over the flag --devices, which is for local:N."""
    words = ["--config", "tiny", "--target", "here", "--workdir", str(rig.workdir), "--dry-run"]
    file = rig.folder / "asked"
    with tpu_metadata(ACCELERATOR_TYPE="v5e-8", NODE_ID="x") as address:
        rig.verb(*words, GCE_METADATA_HOST=address, FAKE_SHOWN=str(file))
    assert "--devices 8" in file.read_text()


def test_a_missing_target_suggests_two(rig):
    ended = rig.verb("--config", "tiny")
    assert ended.returncode == 64
    assert "--type v4-32 --zone ZONE, or --target local:4" in ended.stderr


def test_status_logs_list_delete(rig):
    rig.run("--on-success", "keep")
    status = json.loads(rig.verb("status", "--name", "vit", "--json").stdout)
    assert status["machine"] == "node READY" and status["attempts"] == 1
    states = [(w["state"], w["code"], w["step"], w["phase"]) for w in status["workers"]]
    assert states == [("ended", "0", 12, "train")] * 2
    logs = rig.verb("logs", "--name", "vit", "--worker", "1").stdout.splitlines()
    assert logs == [f"[w01] worker 1 step {step}" for step in range(1, 13)]
    machines = json.loads(rig.verb("list", "--zones", "us-a,us-b", "--json").stdout)["machines"]
    assert [(m["name"], m["type"], m["state"], m["forgotten"]) for m in machines] == [
        ("vit", "v4-16", "ACTIVE", False)
    ]
    assert rig.verb("gc", "--zone", "us-a", "--yes").stdout.startswith("in use: ")
    assert rig.verb("delete", "--name", "vit").returncode == 64, (
        "it asks for confirmation, but there is no terminal"
    )
    deleted = rig.verb("delete", "--name", "vit", "--yes")
    assert "vit deleted" in deleted.stderr and rig.is_empty()
    assert "TPU vit does not exist" in rig.verb("delete", "--name", "vit", "--yes").stderr
    assert "no machines" in rig.verb("list", "--zone", "us-a").stderr


def test_profile_fetches_the_traces_of_all_workers(rig):
    rig.profile(FAKE_SECONDS="0.4")
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    rig.wait_for(lambda: list(rig.run_folder().glob("a1/w01.log")))
    done = rig.verb("profile", "--name", "vit")
    assert done.returncode == 0, done.stderr
    folder = rig.run_folder() / "profile"
    assert {file.name: file.read_text() for file in folder.rglob("*.pb")} == {
        f"process_{number}.xplane.pb": f"trace of {number}" for number in (0, 1)
    }
    assert done.stdout.endswith(f"xprof --logdir '{folder}'\n")
    assert rig.end(process).code == 0
    idle = rig.verb("profile", "--name", "vit")
    assert idle.returncode == 78 and "has no workers" in idle.stderr


@pytest.mark.slow
def test_logs_follow_a_run(rig):
    rig.profile(FAKE_SECONDS="0.2")
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    rig.wait_for(lambda: list(rig.run_folder().glob("a1/w01.log")))
    logs = rig.verb("logs", "-f", "--name", "vit", "--worker", "1")
    assert rig.end(process).code == 0
    lines = [f"[w01] worker 1 step {step}" for step in range(1, 13)]
    assert logs.stdout.splitlines() == lines[: len(logs.stdout.splitlines())]
    assert len(logs.stdout.splitlines()) > 6


def test_gc_deletes_expired_machines(rig):
    """A killed launcher leaves a machine behind, which expires; gc deletes it and no other."""
    rig.run("--on-success", "keep")
    labels = rig.cloud.nodes["us-a/vit"]["labels"]
    assert labels["managed-by"] == "vit_scale" and labels["owner"] == "unknown"
    labels["expires"] = "1000"
    other = rig.verb(
        *rig.flags(),
        "--name",
        "other",
        "--on-success",
        "keep",
        "--again",
        "--workdir",
        str(rig.elsewhere),
    )
    assert other.returncode == 0, other.stderr
    for file in rig.folder.rglob("sitter"):  # their launchers' leases ended long ago
        file.write_text("me:1:x 5\n")
    assert rig.verb("gc", "--zone", "us-a").returncode == 64, "it asks for confirmation"
    output = rig.verb("gc", "--zone", "us-a", "--expired", "--yes").stdout
    assert output.count("deleted: ") == 1 and output.count("in use: ") == 1
    assert list(rig.cloud.nodes) == ["us-a/other"]


@pytest.mark.slow
def test_stop_without_a_launcher(rig):
    rig.profile(FAKE_SECONDS="0.4")
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    process.kill()
    process.communicate()
    stopped = rig.verb("stop", "--name", "vit", "--grace", "20m")
    assert stopped.returncode == 0, stopped.stderr
    assert rig.is_empty() and (rig.workdir / "checkpoint").exists()


@pytest.mark.slow
def test_ssh_runs_a_command_on_all_workers(rig):
    """Words are quoted as typed; one alone is a line of the worker's shell."""
    rig.run("--on-success", "keep")
    result = rig.verb("ssh", "--name", "vit", "--", "echo", "I  am", "there;")
    assert result.stdout.splitlines() == ["[w00] I  am there;", "[w01] I  am there;"]
    line = rig.verb("ssh", "--name", "vit", "--worker", "1", "--", "echo a; echo b")
    assert line.stdout.splitlines() == ["[w01] a", "[w01] b"]
    assert rig.verb("ssh", "--name", "vit", "--worker", "1", "--", "false").returncode == 75
    none = rig.verb("ssh", "--name", "vit", "--worker", "2", "--", "true")
    assert (none.returncode, "--worker 2: " in none.stderr) == (64, True)
    forward = rig.verb("ssh", "--name", "vit", "-L", "6006:localhost:6006", "--", "echo a")
    assert forward.stdout == "a\n" and "--ssh-flag=-L 6006:localhost:6006" in rig.calls("ssh")[-1]
    assert rig.calls("ssh")[-1][rig.calls("ssh")[-1].index("--worker") + 1] == "0"


def test_an_orphaned_machine_deletes_itself(rig):
    """After training, worker 0 deletes the machine if no launcher renews its lease."""
    process = rig.start(*rig.flags(), "--orphan", "1s")
    rig.wait_for(lambda: len(rig.starts()) == 2 and len(rig.calls("agent.sh reap")) == 1)
    process.kill()
    process.communicate()
    rig.wait_for(lambda: rig.calls("queued-resources delete"))
    rig.wait_for(lambda: not rig.cloud.nodes)


@pytest.mark.slow
def test_detach_runs_in_the_background(rig):
    detached = rig.verb(*rig.flags(), "--detach")
    assert detached.returncode == 0 and "logs -f --name vit" in detached.stdout
    rig.wait_for(lambda: list((rig.root / "runs" / "tpu").glob("*/launcher.log")))
    file = rig.run_folder() / "launcher.log"
    rig.wait_for(lambda: '"result": "done"' in file.read_text())
    assert rig.is_empty()


def test_this_machine_as_a_pod(rig):
    """Without gcloud: the same agent, and a home folder per worker."""
    words = [
        "--config",
        "tiny",
        "--name",
        "vit",
        "--target",
        "local:3",
        "--workdir",
        str(rig.workdir),
    ]
    rig.settings["profile"].clear()
    faults = json.dumps([{"worker": 2, "step": 5, "do": "raise", "attempt": 1}])
    code, result, err = rig.end(rig.start(*words, PATH=machine(), FAKE_FAULTS=faults))
    assert code == 0, err
    assert rig.calls() == [] and result["cloud"] == "none"
    assert rig.attempts() == {1: [0, 1, 2], 2: [0, 1, 2]}
    assert "[w02] exit code 1: image 3 is corrupt" in err


@pytest.mark.slow
def test_gc_keeps_a_machine_that_trains(rig):
    """A label that could not be renewed does not end training."""
    rig.profile(FAKE_SECONDS="0.4")
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    rig.cloud.nodes["us-a/vit"]["labels"]["expires"] = "1000"
    assert rig.verb("gc", "--zone", "us-a", "--yes").stdout.startswith("in use: ")
    assert rig.end(process).code == 0


@contextlib.contextmanager
def tpu_metadata(**values: str):
    """Serve a TPU VM's metadata; yield the address."""
    text = "".join(f"{key}: '{value}'\n" for key, value in values.items()).encode()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}"
        server.shutdown()


def test_target_here_on_a_tpu_vm_with_one_host(rig):
    """The agent works in the user's own home; no gcloud is needed."""
    words = ["--config", "tiny", "--name", "vit", "--target", "here", "--workdir", str(rig.workdir)]
    variables = {**rig.settings["profile"], "PATH": f"{rig.tools}:{machine()}"}
    with tpu_metadata(ACCELERATOR_TYPE="v4-8", NODE_ID="x") as address:
        process = rig.start(*words, **variables, GCE_METADATA_HOST=address)
        code, result, err = rig.end(process)
    assert code == 0, err
    assert (result["cloud"], rig.calls()) == ("none", [])
    assert (rig.folder / ".vit_scale" / "runs" / result["run"] / "a1" / "rc").exists()


@pytest.mark.slow
def test_target_here_on_one_host_uses_the_whole_slice(rig):
    rig.run("--on-success", "keep")
    words = ["--config", "tiny", "--target", "here", "--workdir", str(rig.elsewhere)]
    metadata = {"ACCELERATOR_TYPE": "v4-16", "NODE_ID": "vit", "ZONE": "us-a"}
    with tpu_metadata(**metadata, CONSUMER_PROJECT_ID="p") as address:
        process = rig.start(*words, "--workdir-is-mounted", GCE_METADATA_HOST=address)
        code, _, err = rig.end(process)
    assert code == 0, err
    assert len((rig.elsewhere / "starts.jsonl").read_text().splitlines()) == 2
    assert rig.calls("ssh")[-1].count("--internal-ip") == 1 and rig.calls("delete") == []
    with tpu_metadata(ACCELERATOR_TYPE="v4-16") as address:
        alone = rig.verb(*words, GCE_METADATA_HOST=address)
    assert alone.returncode == 64 and "training on one host hangs" in alone.stderr


def test_doctor(rig):
    good = rig.verb("doctor", "--zone", "us-a", "--type", "v4-16")
    assert "ok   zone us-a offers v4-16" in good.stdout and "ok   account tester" in good.stdout
    wrong = rig.verb("doctor", "--zone", "us-a", "--type", "v5p-8")
    assert wrong.returncode == 77 and "FAIL zone us-a offers v5p-8: it has v4-8" in wrong.stdout
    rig.set(account="")
    assert "gcloud auth login" in rig.verb("doctor", "--zone", "us-a").stdout
    nothing = rig.verb("doctor", PATH="/usr/bin-none:/bin-none:" + str(only_bash(rig)))
    assert nothing.returncode == 77 and "FAIL gcloud: install it" in nothing.stdout


def only_bash(rig: Rig) -> pathlib.Path:
    folder = rig.folder / "only"
    folder.mkdir()
    for tool in ("bash", "dirname", "env"):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


REAL = shutil.which("gcloud")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="there is no gcloud here")
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--no-queue"],
        ["--iap"],
        ["--num-slices", "2"],
        ["--internal-ip", "--valid-until", "6h", "--network", "n"],
    ],
)
def test_the_real_gcloud_accepts_every_flag(rig, tmp_path, more):
    """Without an account, each command exits with 1; for an unknown flag it would be 2."""
    import shlex

    dry = rig.verb(*rig.flags(), "--project", "p", "--dry-run", *more)
    for line in dry.stdout.splitlines():
        if not line.startswith("gcloud "):
            continue
        argv = [REAL, *shlex.split(line.partition(" <<< ")[0])[1:]]
        environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "sdk")}
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert (done.returncode, "active account" in done.stderr) == (1, True), done.stderr

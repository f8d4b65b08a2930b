"""launch/gke.py, by itself and with the real xpk, and the image that it trains in."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from launch import gke
from launch.tpu import accelerators, bundle
from launch.tpu.exit_codes import Stop, Trainer
from tests.helpers.documents import ROOT, blocks, documents
from tests.helpers.fake_cloud import machine, script
from tests.helpers.real_tools import python_of

XPK = "xpk==1.16.0"
BASE = ["--base-image", "BASE:1"]
ARGUMENTS = ["--config", "tiny", "--name", "vit", "--cluster", "mine", "--workdir", "gs://b/vit"]
# Like `vit-scale show --json`: a config of CIFAR-10, or a refusal.
SHOW = """#!/bin/bash
echo "$*" >>"$LOG"
[[ $* != *seed=13* ]] || { echo "vit-scale: seed=13 is unlucky" >&2; exit 1; }
echo '{"config": {"data": {"name": "cifar10", "path": ".data"}, "init": {"source": ""}, \
"objective": "mae"}}'
"""
# Calls of xpk, in its own Python: a command line in JSON a line, its exit code and output likewise.
CALLS = """
import contextlib, io, json, sys
from xpk import main

for line in sys.stdin:
    sys.argv, out = json.loads(line), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main.main() or 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue()]))
"""
TRAINER = """#!/bin/bash
[[ $1 == train ]] || exit 0
trap 'echo saved; exit 42' TERM
echo "$*" >starting
mv starting started
for i in $(seq 600); do sleep 0.05; done
"""


def git(root: pathlib.Path, *words: str) -> None:
    author = ["-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", "-C", str(root), *author, *words], check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> pathlib.Path:
    """A committed clone with one config, where gke.py takes itself to be."""
    root = tmp_path / "a clone"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "tiny.py").write_text("")
    shutil.copy(ROOT / ".dockerignore", root)
    (root / ".gitignore").write_text(".venv\n/log\n/private\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    monkeypatch.setattr(gke, "ROOT", root)
    return root


def words_of(capsys, *more: str) -> list[str]:
    """Return the words of the command that gke.py prints."""
    assert gke.main([*ARGUMENTS, *more]) == 0
    return shlex.split(capsys.readouterr().out)


def test_the_command(clone, capsys):
    more = ["--type", "v5e-16", "--num-slices", "2", "--grace", "3m", "--spot", *BASE]
    words = words_of(capsys, *more, "--config.note=a b; $c", "--", "--zone", "z")
    assert words == [
        *["xpk", "workload", "create", "--cluster", "mine", "--workload", "vit"],
        *["--tpu-type", "v5litepod-16", "--num-slices", "2", "--max-restarts", "100"],
        *["--termination-grace-period-seconds", "210", "--spot"],
        *["--base-docker-image", "BASE:1", "--script-dir", str(clone), "--zone", "z"],
        "--command",
        "vit-scale train --config tiny --workdir gs://b/vit '--config.note=a b; $c'",
    ]


@pytest.mark.parametrize("type_, slices, devices", [("v6e-64", 1, 64), ("tpu7x-16", 2, 32)])
def test_the_config_is_resolved_for_the_slice(clone, capsys, monkeypatch, type_, slices, devices):
    (clone / ".venv" / "bin").mkdir(parents=True)
    script(clone / ".venv" / "bin" / "vit-scale", SHOW)
    monkeypatch.setenv("LOG", str(clone / "log"))
    words = words_of(capsys, "--type", type_, "--num-slices", str(slices), *BASE, "--config.seed=1")
    called = f"show --config tiny --json --devices {devices} --config.seed=1\n"
    assert (clone / "log").read_text() == called
    download, train = words[-1].split(" && ")
    assert download == "vit-scale data download cifar10 --out .data"
    assert train.startswith("vit-scale train --config tiny ")
    assert gke.main([*ARGUMENTS, "--type", type_, *BASE, "--config.seed=13"]) == 65
    assert capsys.readouterr() == ("", "gke: seed=13 is unlucky\n")


def test_without_an_environment_nothing_is_installed(clone, capsys):
    words_of(capsys, "--type", "v6e-64", *BASE)
    assert gke.main([*ARGUMENTS, "--type", "v6e-64", *BASE]) == 0
    assert "not checked here" in capsys.readouterr().err
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("flag", ["--secret", "--service-account"])
def test_flags_of_the_jobset_before_xpk_name_what_replaces_them(clone, capsys, flag):
    assert gke.main([*ARGUMENTS, "--type", "v6e-64", *BASE, flag, "name"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gke: argument {flag}: xpk has no such flag") and ".md" in line


def test_edits_reach_the_container_or_are_refused(clone, capsys):
    image = [*ARGUMENTS, "--type", "v6e-64", "--image", "I:1"]
    assert gke.main(image) == 0
    out, err = capsys.readouterr()
    assert "--docker-image I:1" in out and "--script-dir" not in out
    assert re.search(r"I:1 must have been built from this code, [0-9a-f]{7,}\n", err)
    (clone / "configs" / "tiny.py").write_text("edited")
    assert gke.main(image) == 65
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1) and "I:1 may lack your edits" in err
    assert f"--script-dir {shlex.quote(str(clone))}" in shlex.join(
        words_of(capsys, "--type", "v6e-64", *BASE)
    )


def test_a_config_that_is_not_copied_is_refused(clone, capsys, monkeypatch):
    """xpk copies what git ignores, unlike an image that was built from a commit."""
    monkeypatch.chdir(clone)
    for name in ("private", "shared", "runs"):
        (clone / name).mkdir()
        (clone / name / "mine.py").write_text("")
    common = [*ARGUMENTS, "--type", "v6e-64"]
    for folder in ("shared", "private"):
        assert gke.main([*common, *BASE, "--config", f"{folder}/mine.py"]) == 0
        assert f"--config ./{folder}/mine.py" in capsys.readouterr().out
    assert gke.main([*common, *BASE, "--config", "runs/mine.py"]) == 65
    assert "config runs/mine.py: images may lack what" in capsys.readouterr().err
    assert gke.main([*common, "--image", "I:1", "--config", "private/mine.py"]) == 65
    assert "config private/mine.py: images may lack what" in capsys.readouterr().err


def test_keys_are_not_given_to_xpk(clone, capsys):
    """Unless .dockerignore keeps them from images, or git tracks them."""
    common = [*ARGUMENTS, "--type", "v6e-64"]
    key = '{"type": "service_account", "private_key": "x"}'
    kept = [".env", "a/b.pem", "a/b.pfx", ".ssh/id_rsa", "id_ed25519", "my-credentials.json"]
    for name in [*kept, "runs/x.json", ".venv/lib/cacert.pem", ".data/y.json"]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(key)
    (clone / "tracked.json").write_text(key)
    git(clone, "add", "tracked.json")
    (clone / "data.json").write_text("{}")
    assert gke.main([*common, *BASE]) == 0
    capsys.readouterr()
    for name in ("my-project-0123abcd.json", "private/runs/my-project.json"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(key)
    assert gke.main([*common, *BASE]) == 65
    out, err = capsys.readouterr()
    names = "my-project-0123abcd.json, private/runs/my-project.json"
    assert (out, err) == ("", f"gke: xpk would copy keys, so move them: {names}\n")


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--type", "v3-32", *BASE], 78, "v3-32 is not supported on GKE"),
        (["--type", "v4-32", *BASE, "--workdir", "runs/x"], 65, "is on a worker's disk"),
        (["--type", "v4-32", *BASE, "--config", "tony"], 65, "did you mean tiny"),
        (["--type", "v4-32", *BASE, "--name", "a_b"], 64, "argument --name: 'a_b' is not up to"),
        (["--type", "v4-32", *BASE, "--num-slices", "0"], 64, "--num-slices 0 must be at least 1"),
        (["--type", "v4-32"], 64, "--base-image --image is required"),
        (["--type", "v4-32", *BASE, "--image", "I"], 64, "not allowed with"),
    ],
)
def test_mistakes_are_reported_first(clone, capsys, words, code, message):
    assert gke.main([*ARGUMENTS, *words, "--run"]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


def test_xpk_is_run_with_the_words_of_the_command(clone, capfd, monkeypatch):
    monkeypatch.setenv("PATH", f"{clone}:{machine()}")
    common = ["--type", "v4-32", *BASE, "--config.note=a b"]
    assert gke.main([*ARGUMENTS, *common, "--run"]) == 70
    assert capfd.readouterr().err.splitlines()[-1] == "gke: xpk is not installed: pip install xpk"
    script(clone / "xpk", "#!/bin/bash\nprintf '%s\\n' xpk \"$@\"\nexit 3\n")
    assert gke.main([*ARGUMENTS, *common, "--run"]) == 3
    lines = capfd.readouterr().out.splitlines()
    gke.main([*ARGUMENTS, *common])
    assert lines == shlex.split(capfd.readouterr().out)


# The real xpk


def dry_runs(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Return the exit code and output of each of xpk's dry runs."""
    lines = [json.dumps([*words, "--dry-run", "--project=p", "--zone=z-a"]) for words in commands]
    done = subprocess.run(
        [python_of("xpk", XPK), "-c", CALLS],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "TELEMETRY_ENABLED": "false"},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def dry_run(words: list[str], file: pathlib.Path) -> dict:
    """Return the JobSet that xpk writes to `file`."""
    ((code, out),) = dry_runs([[*words, "--output-manifest-file", str(file)]])
    assert code == 0, out
    return yaml.safe_load(file.read_text())


def pods(jobset: dict) -> tuple[dict, dict]:
    """Return the job of a slice, and the pod of a host."""
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    return spec, spec["template"]["spec"]


@pytest.mark.slow
def test_what_xpk_makes_of_the_command(clone, capsys, tmp_path, monkeypatch):
    """Restarts by exit code, time to save, /dev/shm, locked memory; SIGTERM reaches the trainer."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    script(clone / ".venv" / "bin" / "vit-scale", SHOW)  # its data is downloaded first
    monkeypatch.setenv("LOG", str(clone / "log"))
    more = ["--type", "v6e-64", "--num-slices", "2", "--config.note=a 'b' $c"]
    jobset = dry_run(words_of(capsys, *more, *BASE), tmp_path / "job.yaml")
    job, pod = pods(jobset)
    (container,) = pod["containers"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert sorted(rule["onExitCodes"]["values"]) == [Trainer.RESUMABLE, *range(127, 256)]
    assert pod["terminationGracePeriodSeconds"] == 150
    assert container["securityContext"] == {"privileged": True}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm"]
    assert pod["volumes"] == [{"emptyDir": {"medium": "Memory"}, "name": "dshm-2"}]
    script(tmp_path / "vit-scale", TRAINER)
    monkeypatch.chdir(tmp_path)
    host = subprocess.Popen(
        container["command"], env={"PATH": f"{tmp_path}:{machine()}"}, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    expected = "train --config tiny --workdir gs://b/vit --config.note=a 'b' $c\n"
    assert (tmp_path / "started").read_text() == expected
    host.send_signal(signal.SIGTERM)
    out, _ = host.communicate(timeout=30)
    assert host.returncode == 42 and b"saved" in out


@pytest.mark.slow
def test_the_manual_completes_the_manifest(clone, tmp_path, capsys):
    """docs/distributed.md adds a Secret and a service account, for which xpk has no flags."""
    words = words_of(capsys, "--type", "v6e-64", "--image", "I:1")
    _, pod = pods(dry_run(words, tmp_path / "job.yaml"))
    assert pod["hostNetwork"] is True and pod["serviceAccountName"] is None
    bash = "\n".join(blocks(documents()["docs/distributed.md"], "bash")).replace("\\\n", " ")
    (line,) = [line for line in bash.splitlines() if line.startswith("sed ")]
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    _, pod = pods(yaml.safe_load((tmp_path / "job.yaml").read_text()))
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert container["securityContext"] == {"privileged": True}
    network = (pod["hostNetwork"], pod["dnsPolicy"], pod["serviceAccountName"])
    assert network == (False, "ClusterFirst", "trainer")


def xpk_types() -> list[str]:
    """Return xpk's names of TPU slices by number, such as v6e-64."""
    code = (
        "from xpk.core.system_characteristics import AcceleratorType as kinds, "
        "UserFacingNameToSystemCharacteristics as types\n"
        "print(*(name for name, type_ in types.items() if type_.accelerator_type == kinds.TPU))"
    )
    command = [python_of("xpk", XPK), "-c", code]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if re.fullmatch(r"[a-z0-9]+-[0-9]+", name)]


def known(name: str) -> bool:
    try:
        return accelerators.parse(name).gke is not None
    except Stop:
        return False


def table_types() -> set[str]:
    """Return every type whose shape is in accelerators.json."""
    names = set()
    for generation, row in accelerators.GENERATIONS.items():
        for shape in accelerators.TABLE["topologies"][str(row["dimensions"])]:
            chips = math.prod(map(int, shape.split("x")))
            if chips <= row.get("max_chips", 0):
                names.add(f"{generation}-{chips * row['type_counts_per_chip']}")
    return {name for name in names if known(name)}


@pytest.mark.slow
def test_every_type_that_both_know(clone, capsys, tmp_path):
    theirs = xpk_types()
    both = [name for name in theirs if known(name)]
    assert len(both) > 300
    # xpk has no hosts with 1 and 4 chips of v5e; we do not have tpu7 (not 7x) and single tpu7x.
    assert table_types() - set(theirs) == {"v5litepod-1", "v5litepod-4"}
    refused = {name for name in theirs if name not in both}
    assert {name for name in refused if not name.startswith("tpu7-")} == {"tpu7x-2"}
    commands = [words_of(capsys, "--type", name, "--image", "I:1") for name in both]
    files = [tmp_path / name for name in both]
    runs = dry_runs(
        [
            [*words, "--output-manifest-file", str(file)]
            for words, file in zip(commands, files, strict=True)
        ]
    )
    assert [(name, out) for name, (code, out) in zip(both, runs, strict=True) if code] == []
    different = {}
    for name, file in zip(both, files, strict=True):
        ours, (job, pod) = accelerators.parse(name), pods(yaml.safe_load(file.read_text()))
        chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == ours.gke
        assert job["parallelism"] * chips == ours.chips, name
        if job["parallelism"] != ours.hosts:
            different[name] = (ours.hosts, job["parallelism"])
    # A machine of the Cloud TPU API with all 8; xpk's node pools have two with 4.
    assert different == {"v5litepod-8": (1, 2), "v6e-8": (1, 2)}


# The image

EXCLUDED = [
    *[".git/HEAD", ".venv/bin/python", ".data/x", "runs/vit/report.json", "wandb/x", "site/x"],
    *["launch/tpu.env", ".env", "a/.env.local", "my.pem", "a/b.key", "a/my-credentials-1.json"],
    *["a/b.pfx", "a/id_rsa", "id_ed25519"],
    *["configs/__pycache__/x.pyc", ".cache/x", ".ruff_cache/x", "a/wandb/x"],
]
INCLUDED = ["vit_scale/runs/lock.py", "configs/mine.py", "launch/tpu.env.example", "mine/data.py"]


def test_ignored_files_are_those_of_the_bundle():
    """Neither git's ignored files nor what the launcher keeps from TPU VMs gets into an image."""
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    for name in [*bundle.NEVER, *bundle.OUTPUTS]:
        patterns = (name, f"{name}*", f"**/{name}", f"**/{name}*", f"launch/{name}")
        assert set(patterns) & set(ignored), name
    for name in bundle.KEYS:
        assert {f"**/*{name}", f"**/{name}*"} & set(ignored), name
    for line in (ROOT / ".gitignore").read_text().split():
        name = line.strip("/")
        assert {name, f"**/{name}"} & set(ignored) or name.endswith("_cache"), name


def test_the_files_that_the_image_copies_exist():
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = " ".join(copied).split()
    assert "pyproject.toml" in names and "." in names
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_xpk_copies_what_it_should(tmp_path):
    """xpk reads .dockerignore by itself."""
    for name in [*EXCLUDED, *INCLUDED]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    code = (
        "import sys, tarfile\n"
        "from xpk.core.docker_image import _build_image_archive as archive\n"
        "from xpk.utils.execution_context import set_context\n"
        "set_context(dry_run_value=False, quiet_value=True)\n"
        "print('\\nFILES', *tarfile.open(archive(sys.argv[1])).getnames())\n"
    )
    command = [python_of("xpk", XPK), "-c", code, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    copied = {name.removeprefix("app/") for name in out.splitlines()[-1].split()[1:]}
    assert {name for name in EXCLUDED if name in copied} == set()
    assert set(INCLUDED) <= copied


def buildah(*words: str) -> subprocess.CompletedProcess:
    settings = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}
    environment = {**os.environ, **settings}
    return subprocess.run(["buildah", *words], env=environment, capture_output=True, text=True)


@pytest.fixture
def base_image(tmp_path):
    """python:3.11-slim: pulled or made before, or Debian's Python without a registry of images."""
    if not shutil.which("buildah"):
        pytest.skip("needs buildah")
    image = "python:3.11-slim"
    if buildah("inspect", "--type", "image", image).returncode:
        if not shutil.which("mmdebstrap"):
            pytest.skip(f"needs {image}, or mmdebstrap to make one")
        archive = tmp_path / "base.tar"
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        command = ["mmdebstrap", "--variant=minbase", packages, "bookworm", str(archive)]
        subprocess.run(command, check=True, capture_output=True)
        container = buildah("from", "scratch").stdout.strip()
        assert buildah("add", container, str(archive), "/").returncode == 0
        assert buildah("commit", "--rm", container, image).returncode == 0
    return image


@pytest.mark.slow
def test_the_image_trains(base_image):
    """Build the image for CPUs, with a Python that is at hand, and train in it as its user."""
    certificates = ["-v", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    arguments = ["--build-arg", "PYTHON=3.11", "--build-arg", "ACCELERATOR=cpu"]
    name = "vit_scale:test"
    done = buildah("bud", "--pull-never", *certificates, *arguments, "-t", name, str(ROOT))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    container = buildah("from", "--pull-never", f"localhost/{name}").stdout.strip()
    try:
        files = buildah("run", container, "--", "sh", "-c", "id -un; pwd; ls -a").stdout.split()
        assert files[:2] == ["vit", "/app"]
        assert "vit_scale" in files and not {".git", "site"} & set(files)
        small = ["--config.steps=2", "--config.optim.warmup=0", "--config.data.batch=8"]
        quiet = ["--config.log.wandb=False", "--config.data.fractal.classes=8"]
        quiet += ["--config.model.classes=8"]
        train = ["vit-scale", "train", "--config", "quickstart:pretrain", *small, *quiet]
        done = buildah("run", container, "--", *train, "--workdir", "runs/x")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        report = buildah("run", container, "--", "cat", "runs/x/report.json").stdout
        assert json.loads(report)["step"] == 2
    finally:
        buildah("rm", container)
        buildah("rmi", name)

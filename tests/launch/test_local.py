"""launch/environment.sh and the scripts that build on it, with small fakes of uv and Python.

Nothing is downloaded, except by the slow test, which really installs.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ["bash", "cat", "chmod", "cksum", "cp", "dirname", "echo", "env", "flock", "mkdir", "mv"]
TOOLS += ["rm", "sed", "sleep", "sort", "touch", "uname", "xargs"]

# `uv venv FOLDER` creates FOLDER/bin/python, `uv pip install` FOLDER/bin/vit-scale. Each call is
# logged as a line. FAKE=fail breaks the installation, FAKE=hang never finishes it.
UV = """#!/bin/bash
echo "uv $*" >>"$LOG"
if [[ $1 == venv ]]; then
  folder=${*: -1}
  rm -rf "$folder"; mkdir -p "$folder/bin"
  printf '#!/bin/bash\\nif [[ $1 == -c ]]; then exec "%s" "$@"; fi\\necho "python $*" >>"$LOG"\\n' \
    "$REAL_PYTHON" >"$folder/bin/python"
  chmod +x "$folder/bin/python"
else
  [[ ${FAKE:-} != fail ]] || exit 1
  [[ ${FAKE:-} != hang ]] || sleep 600
  [[ ${FAKE:-} != slow ]] || sleep 1
  bin=$(dirname "$4")
  if [[ $* == *--target* ]]; then mkdir -p "${*: -2:1}"; exit; fi
  printf '#!/bin/bash\\necho "vit-scale $*" >>"$LOG"\\nexit "${TRAINER:-0}"\\n' >"$bin/vit-scale"
  chmod +x "$bin/vit-scale"
fi
"""

# `python3 -m venv FOLDER` copies this script to FOLDER/bin/python; with OLD set, it claims to be
# older than 3.11.
PYTHON = """#!/bin/bash
if [[ -n ${OLD:-} && $1 == -c ]]; then exit 1; fi
if [[ $1 == -c ]]; then exec "$REAL_PYTHON" "$@"; fi
echo "python3 $*" >>"$LOG"
[[ $1 == -m && $2 == venv ]] || exit 0
folder=${*: -1}
mkdir -p "$folder/bin"
cp "$0" "$folder/bin/python"
"""


class Clone:
    """A copy of the scripts in a folder with a space in its name, and a PATH of fakes."""

    def __init__(self, folder: pathlib.Path):
        self.root = folder / "a clone"
        self.log = folder / "log"
        self.bin = folder / "bin"
        for directory in (self.root / "launch", self.bin, folder / "elsewhere"):
            directory.mkdir(parents=True)
        for script in ROOT.glob("launch/*.sh"):
            shutil.copy(script, self.root / "launch")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        for tool in TOOLS:
            os.symlink(shutil.which(tool), self.bin / tool)
        self.elsewhere = folder / "elsewhere"
        self.fake("uv", UV)

    def fake(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        """Start a script from another folder, without the variables of whoever runs the tests."""
        environment = {
            "PATH": str(self.bin),
            "LOG": str(self.log),
            "REAL_PYTHON": sys.executable,
            "ACCELERATOR": "cpu",
            **variables,
        }
        return subprocess.Popen(
            [str(self.root / "launch" / script), *arguments],
            cwd=self.elsewhere,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[str]:
        """Return the lines logged since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def installed_extras(clone: Clone) -> list[str]:
    """Return the extras of each logged installation: "", "[test]" ..."""
    target = f"-e {clone.root}"
    return [line.split(target)[1] for line in clone.calls() if target in line]


def test_first_start_installs_then_trains(clone):
    result = clone.run(
        "local.sh", "--config", "quickstart", "--workdir", "a folder/x", TRAINER="42"
    )
    venv = clone.root / ".venv"
    assert clone.calls() == [
        f"uv venv --quiet --clear --python 3.12 {venv}",
        f"uv pip install --python {venv}/bin/python -c {clone.root}/constraints.txt "
        f"-e {clone.root}",
        "vit-scale train --config quickstart --workdir a folder/x",
    ]
    assert result.returncode == 42, "the trainer's exit code is passed on"
    assert result.stdout == "", "messages of the installation stay out of the trainer's output"


def test_second_start_only_trains(clone):
    clone.run("local.sh", "--config", "quickstart")
    clone.calls()
    result = clone.run("local.sh", "--config", "quickstart")
    assert clone.calls() == ["vit-scale train --config quickstart"]
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(clone, file):
    clone.run("environment.sh")
    clone.calls()
    with (clone.root / file).open("a") as stream:
        stream.write("# changed\n")
    clone.run("environment.sh")
    assert installed_extras(clone) == [""]


def test_moved_repository_is_reinstalled(clone):
    clone.run("environment.sh")
    clone.calls()
    clone.root = clone.root.rename(clone.root.with_name("moved"))
    clone.run("environment.sh")
    assert installed_extras(clone) == [""]


def test_extras_accumulate(clone):
    clone.run("environment.sh")
    clone.run("environment.sh", "test")
    clone.run("environment.sh", "gpu")
    clone.run("environment.sh", "test")
    clone.run("environment.sh")
    assert installed_extras(clone) == ["", "[test]", "[gpu,test]"]


@pytest.mark.parametrize("how", ["fail", "kill"])
def test_interrupted_installation_starts_over(clone, how):
    if how == "fail":
        result = clone.run("environment.sh", FAKE="fail")
        assert result.returncode == 1
        assert "rerun the same command to retry" in result.stderr.splitlines()[-1]
    else:
        process = clone.start("environment.sh", FAKE="hang")
        deadline = time.monotonic() + 30
        while not (clone.log.exists() and "pip install" in clone.log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (clone.root / ".venv" / "vit_scale.stamp").exists()
    clone.calls()
    assert clone.run("environment.sh").returncode == 0
    assert [line.split()[1] for line in clone.calls()] == ["venv", "pip"]


def test_concurrent_starts_install_once(clone):
    processes = [clone.start("local.sh", "--config", name, FAKE="slow") for name in ("one", "two")]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    calls = clone.calls()
    assert sum("pip install" in line for line in calls) == 1
    assert sum("waiting for a concurrent installation" in error for error in errors) == 1
    assert {line for line in calls if line.startswith("vit-scale")} == {
        "vit-scale train --config one",
        "vit-scale train --config two",
    }


def test_without_uv_venv_and_pip_are_used(clone):
    (clone.bin / "uv").unlink()
    clone.fake("python3", PYTHON)
    result = clone.run("environment.sh", "test")
    assert result.returncode == 0, result.stderr
    assert clone.calls() == [
        f"python3 -m venv --clear {clone.root}/.venv",
        f"python3 -m pip install -c {clone.root}/constraints.txt -e {clone.root}[test]",
    ]
    clone.run("environment.sh", "test")
    assert clone.calls() == []


@pytest.mark.parametrize("uv", [False, True])
def test_python_3_12_is_preferred(clone, uv):
    """PYTHON selects another version."""
    if not uv:
        (clone.bin / "uv").unlink()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        clone.fake(name, PYTHON.replace('echo "python3 ', f'echo "{name} '))
    assert clone.run("environment.sh").returncode == 0
    venv = f"{clone.root}/.venv"
    create = f"uv venv --quiet --clear --python python3.12 {venv}"
    assert clone.calls()[0] == (create if uv else f"python3.12 -m venv --clear {venv}")
    shutil.rmtree(venv)
    assert clone.run("environment.sh", PYTHON="python3.11").returncode == 0
    assert "python3.11" in clone.calls()[0]


def test_an_old_python_is_a_one_line_error(clone):
    (clone.bin / "uv").unlink()
    clone.fake("python3", PYTHON)
    result = clone.run("local.sh", "--config", "quickstart", OLD="1")
    (line,) = result.stderr.splitlines()
    assert "no Python 3.11 or later found" in line
    assert result.returncode == 1
    assert not (clone.root / ".venv").exists()


def test_an_old_python_from_the_environment_is_named(clone):
    clone.fake("snake", PYTHON)
    result = clone.run("environment.sh", PYTHON="snake", OLD="1")
    assert result.stderr == "environment: PYTHON=snake is not Python 3.11 or later\n"
    assert result.returncode == 1


@pytest.mark.parametrize(
    "arguments, code, stream", [(["--help"], 0, "stdout"), (["-h"], 0, "stdout"), ([], 2, "stderr")]
)
def test_usage(clone, arguments, code, stream):
    result = clone.run("local.sh", *arguments)
    assert result.returncode == code
    assert getattr(result, stream).startswith("launch/local.sh --config NAME")
    assert clone.calls() == [], "nothing is installed to print a help text"


def test_devices_without_hosts_are_refused(clone):
    result = clone.run("local.sh", "--config", "x", "--devices", "2")
    assert (result.returncode, result.stderr) == (2, "local: --devices needs --hosts N\n")
    assert clone.calls() == []


def test_accelerator_selects_the_extra(clone):
    clone.run("local.sh", "--config", "x", ACCELERATOR="tpu")
    assert installed_extras(clone) == ["[tpu]"]
    result = clone.run("local.sh", "--config", "x", ACCELERATOR="npu")
    assert result.stderr == "local: ACCELERATOR=npu is not cpu, gpu or tpu\n"
    assert result.returncode == 2
    assert clone.calls() == []


@pytest.mark.skipif(
    any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0"))), reason="this machine has a TPU"
)
def test_accelerator_is_detected(clone):
    clone.run("local.sh", "--config", "x", ACCELERATOR="")
    clone.fake("nvidia-smi", "#!/bin/bash\nexit 9\n")
    clone.run("local.sh", "--config", "x", ACCELERATOR="")
    clone.fake("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H200'\n")
    clone.run("local.sh", "--config", "x", ACCELERATOR="")
    assert installed_extras(clone) == ["", "[gpu]"]


@pytest.mark.parametrize("script", ["test.sh", "../.ci/run"])
def test_tests_run_with_their_extra(clone, script):
    (clone.root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone.root / ".ci")
    result = clone.run(script, "-k", "a b")
    assert result.returncode == 0, result.stderr
    _, install, compiler, test = clone.calls()
    assert install.endswith("[test]") and compiler.endswith("libtpu")
    assert test.startswith("python -m pytest") and test.endswith("-k a b")


def test_quick_runs_tests_that_exist(clone):
    result = clone.run("test.sh", "--quick", "-k", "a b")
    assert result.returncode == 0, result.stderr
    *installs, test = clone.calls()
    assert not any("libtpu" in call for call in installs)
    words = test.removesuffix(" -k a b").split()
    names = [word for word in words if word.startswith("tests/")]
    assert len(names) > 5 and words[-1] == names[-1]
    for word in names:
        file, _, name = word.partition("::")
        assert (ROOT / file).exists(), file
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_the_compiler_is_installed_in_its_own_folder(clone):
    """Pinned like everything else, installed once, and reinstalled when the pins change."""
    folder = clone.root / ".venv" / "libtpu"
    for _ in range(2):
        assert clone.run("compiler.sh").returncode == 0
    (install,) = [call for call in clone.calls() if "--target" in call]
    assert "--no-deps -c" in install and "constraints.txt" in install
    assert install.endswith(f"--target {folder}.new libtpu") and (folder / "stamp").exists()
    with (clone.root / "constraints.txt").open("a") as pins:
        pins.write("# new\n")
    clone.run("compiler.sh")
    assert [call for call in clone.calls() if "--target" in call] == [install]
    shutil.rmtree(folder)
    failed = clone.run("compiler.sh", FAKE="fail")
    assert failed.returncode == 1 and not folder.exists()
    assert failed.stderr.splitlines()[-1].startswith("compiler: libtpu was not installed")


@pytest.mark.slow
def test_fresh_clone_installs_and_runs(tmp_path):
    """The README's first command, up to the training itself."""
    clone = tmp_path / "a fresh clone"
    files = ["pyproject.toml", "constraints.txt", "README.md", "LICENSE"]
    for name in ["configs", "launch", "vit_scale"]:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in files:
        shutil.copy(ROOT / name, clone)
    command = [str(clone / "launch" / "local.sh"), "--config", "no_such_config"]
    environment = {**os.environ, "ACCELERATOR": "cpu"}
    first, second = (
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        for _ in range(2)
    )
    assert "installing vit_scale" in first.stderr
    for result in (first, second):
        assert "no config is named 'no_such_config'" in result.stderr.splitlines()[-1]
        assert (result.returncode, result.stdout) == (2, "")
    assert len(second.stderr.splitlines()) == 1, "nothing is installed twice"

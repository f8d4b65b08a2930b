"""Format, lint, types and shell scripts: what a reviewer should never have to mention."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    [*ROOT.glob("launch/**/*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
)


def check(*command) -> None:
    """Run a checker in the repository; its complaints are the test's message."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_lint():
    check(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_format():
    check(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types():
    check(sys.executable, "-m", "mypy")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_script(script):
    assert script.stat().st_mode & 0o111, f"chmod +x {script.relative_to(ROOT)}"
    check("bash", "-n", str(script))
    beside_python = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = beside_python if beside_python.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: launch/environment.sh test"
    check(str(shellcheck), str(script))

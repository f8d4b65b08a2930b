"""provenance: the commit, the versions, the parameters."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from vit_scale.tracking import (
    git_state,
    parameter_table,
    versions,
)


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state(tmp_path):
    assert git_state(tmp_path / "absent") is None
    git(tmp_path, "init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "m")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("a")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_a_package_in_a_repository_that_is_not_its_own_has_no_git_state(tmp_path, monkeypatch):
    """Installed in somebody's project; the same files in a clone of their own have one."""
    git(tmp_path, "init")
    installed = tmp_path / ".venv/lib/python3.11/site-packages/vit_scale"
    beside, inside = tmp_path / "vit_scale", tmp_path / "third_party" / "clone" / "vit_scale"
    for folder in (installed, beside, inside):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (tmp_path / "main.py").write_text("a")
    git(tmp_path, "add", "main.py")
    git(tmp_path, "commit", "-m", "m")
    assert git_state(installed) is None, "in a folder of it"
    assert git_state(beside) is None, "put there by pip install --target, and not tracked"
    git(tmp_path, "add", "-f", str(installed / "__init__.py"))
    git(tmp_path, "commit", "-m", "m")
    assert git_state(installed) is None, "committed, but not as a project"
    git(inside.parent, "init")
    assert git_state(inside) is None, "no commit yet"
    git(inside.parent, "add", "vit_scale")
    git(inside.parent, "commit", "-m", "m")
    own = {"commit": git(inside, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(inside) == own
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # started by a hook of the other
    assert git_state(inside) == own
    link = tmp_path / "link"
    link.symlink_to(inside)
    assert git_state(link) == own


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) is None


def test_versions_name_what_is_installed():
    result = versions()
    assert result["jax"] == jax.__version__
    assert result["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"flax", "optax", "orbax-checkpoint", "grain", "clu"} <= set(result)


def test_parameter_table():
    table = parameter_table({"head": {"kernel": np.zeros((3, 5), np.float32)}})
    assert "head/kernel" in table
    assert "15" in table

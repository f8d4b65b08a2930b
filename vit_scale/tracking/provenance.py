"""Provenance of a run: its commit, the versions of its packages, its parameters."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clu import parameter_overview

# Variables that git sets for hooks, which would select the hook's repository.
HOOK_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "clu", "vit_scale")


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Return {"commit": hash, "dirty": whether tracked files differ} of the repository of `folder`.

    None if `folder` is neither the top of a repository nor directly below it, or is not tracked: a
    package installed inside somebody's repository is not part of it. None without git. Never
    raises.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    here = folder.resolve()
    if not top or Path(top).resolve() not in (here, here.parent):
        return None
    if not _git(folder, "ls-files", "--", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env={k: v for k, v in os.environ.items() if k not in HOOK_VARIABLES},
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def parameter_table(parameters: Mapping[str, Any]) -> str:
    """Format the name, shape, type and size of each leaf of a nested dict, and the total size."""
    return parameter_overview.get_parameter_overview(parameters, include_stats=False)

"""What a run is made of: its commit, the versions of its packages, its parameters."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clu import parameter_overview

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "clu", "vit_scale")


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """{"commit": hash, "dirty": whether tracked files differ}; None without git. Never raises."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Of Python and of what decides a run's numbers; packages not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parameter_table(parameters: Mapping[str, Any]) -> str:
    """The name, shape, type and size of each leaf of a nested dict of arrays, and the total."""
    return parameter_overview.get_parameter_overview(parameters, include_stats=False)

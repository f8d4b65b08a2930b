"""Sweeps by Weights & Biases: their configuration, their registration, and an agent for one.

W&B's server draws the points, and its agents, on any machine, start `vit-scale train` with each.
"""

import ast
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vit_scale.errors import UserError
from vit_scale.storage import files
from vit_scale.tracking.wandb_writer import has_key, refused

FILE, ID = "wandb-sweep.yaml", "wandb-sweep.txt"  # its description, and its id at W&B


def describe_sweep(
    config: str,
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[str]],
    ranges: Mapping[str, Mapping[str, tuple[float, float]]],
    integers: Collection[str],
    measure: str,
    count: int | None,
) -> dict[str, Any]:
    """Return a sweep in W&B's format.

    Args:
      config: name of the config.
      overrides: FIELD=VALUE of all runs.
      grid: values of fields, as they are typed.
      ranges: the lowest and highest of fields, under "uniform" and "log_uniform_values".
      integers: fields that are integers, whose ranges are rounded.
      measure: result on the held-out split to maximise.
      count: number of runs to draw at random; None: all of the grid.
    """
    parameters: dict[str, Any] = {
        f"config.{field}": {"values": [_literal(value) for value in values]}
        for field, values in grid.items()
    }
    for distribution, fields in ranges.items():
        for field, (low, high) in fields.items():
            whole = {"distribution": f"q_{distribution}", "q": 1}
            kind = whole if field in integers else {"distribution": distribution}
            parameters[f"config.{field}"] = {**kind, "min": low, "max": high}
    fixed = [f"--config.{item}" for item in overrides]
    return {
        "program": "vit-scale",
        "command": ["vit-scale", "train", "--config", config, *fixed, "${args}"],
        "method": "random" if count else "grid",
        "metric": {"name": f"eval/{measure}", "goal": "maximize"},
        "parameters": parameters,
        **({"run_cap": count} if count else {}),
    }


def _literal(text: str) -> Any:
    """Return a number or a truth value as such, so that W&B can plot it; anything else as text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) else text


def run_wandb_sweep(content: Mapping[str, Any], folder: Path, project: str) -> None:
    """Write a sweep to FOLDER/wandb-sweep.yaml, register it, and become its agent.

    A sweep that was registered before, from this folder, is continued. Raises UserError where there
    is no API key, where the server refuses, and where FOLDER holds another sweep.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    registered = folder / ID
    if registered.exists() and yaml.safe_load((folder / FILE).read_text()) != content:
        raise UserError(f"{folder} holds another sweep, in {FILE}; use another --workdir")
    file = folder / FILE
    files.write(file, yaml.safe_dump(dict(content), sort_keys=False).encode())
    if not has_key(wandb):
        raise UserError(
            f"{file} is written, and Weights & Biases has no API key to register it: run wandb "
            f"login, then this command again, or `wandb sweep --project {project} {file}`"
        )
    if not registered.exists():
        try:
            sweep = wandb.sweep(dict(content), project=project)
        except Exception as error:
            raise refused(error) from error
        files.write(registered, sweep.encode())
    programs = os.path.dirname(sys.executable)  # vit-scale is there, where the agent looks for it
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    agent = [sys.executable, "-m", "wandb", "agent", "--forward-signals", "--project", project]
    os.execv(sys.executable, [*agent, registered.read_text()])

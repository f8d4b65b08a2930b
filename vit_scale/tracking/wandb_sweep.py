"""Sweeps by Weights & Biases: their configuration, their registration, and an agent for one.

W&B's server draws the points, and its agents, on any machine, start `vit-scale train` with each.
"""

import ast
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vit_scale.errors import RESUMABLE, UserError
from vit_scale.storage import files
from vit_scale.tracking.wandb_writer import has_key, refused

FILE = "wandb-sweep.yaml"


def describe_sweep(
    config: str,
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[str]],
    ranges: Mapping[str, Mapping[str, tuple[float, float]]],
    measure: str,
    count: int | None,
) -> dict[str, Any]:
    """Return a sweep in W&B's format.

    Args:
      config: name of the config.
      overrides: FIELD=VALUE of all runs.
      grid: values of fields, as they are typed.
      ranges: the lowest and highest of fields, under "uniform" and "log_uniform_values".
      measure: result on the held-out split to maximise.
      count: number of runs to draw at random; None: all of the grid.
    """
    parameters: dict[str, Any] = {
        f"config.{field}": {"values": [_literal(value) for value in values]}
        for field, values in grid.items()
    }
    for distribution, fields in ranges.items():
        for field, (low, high) in fields.items():
            parameters[f"config.{field}"] = {
                "distribution": distribution,
                "min": low,
                "max": high,
            }
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
    """Write a sweep to FOLDER/wandb-sweep.yaml, register it, and run an agent until its end.

    Raises UserError where there is no API key, where the server refuses, and where the agent fails.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    files.write(file, yaml.safe_dump(dict(content), sort_keys=False).encode())
    if not has_key(wandb):
        raise UserError(
            f"{file} is written, and Weights & Biases has no API key to register it: run wandb "
            f"login, then `wandb sweep --project {project} {file}` or this command again",
            RESUMABLE,
        )
    try:
        sweep = wandb.sweep(dict(content), project=project)
    except Exception as error:
        raise refused(error) from error
    agent = [sys.executable, "-m", "wandb", "agent", "--forward-signals"]
    done = subprocess.run([*agent, "--project", project, sweep], check=False)
    if done.returncode:
        command = f"wandb agent --project {project} {sweep}"
        raise UserError(f"the agent ended with {done.returncode}; `{command}` resumes it")

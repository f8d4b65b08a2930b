"""Describe a run: what run.json, the checkpoints, the trackers, and report.json say about it."""

import os
import pathlib

import jax
from ml_collections import ConfigDict

from vit_scale import config, data
from vit_scale.models.parameters import count
from vit_scale.runs.resume import comparable
from vit_scale.tracking import Tracker, git_state, parameter_table, versions
from vit_scale.training.setup import Setup
from vit_scale.training.splits import Splits

# Variables that change what is compiled, or how fast it runs.
ENVIRONMENT = ("GLIBC_TUNABLES", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "XLA_FLAGS")

# Fields that may differ between the hosts of a run.
OF_A_HOST = (
    *("data.cache", "data.memory", "data.path", "data.threads", "data.workers"),
    *("distill.teacher", "log.", "watchdog."),
)


def describe(setup: Setup, name: str, splits: Splits) -> dict:
    """Describe a run: the content of run.json, also stored in every checkpoint."""
    sets = {part: data.describe(source) for part, source in splits._asdict().items() if source}
    return {
        "name": name,
        "cwd": os.getcwd(),  # relative paths in the config start here
        "config": config.to_json(setup.cfg),
        "classes": list(splits.train.classes) if setup.cfg.model.classes else [],
        "data": {**sets["train"], "sets": sets},
        "devices": devices(),
        "git": git_state(pathlib.Path(__file__).parent),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "parameters": parameter_table(setup.state.params),
    }


def identity(description: dict, splits: Splits) -> dict:
    """Return what must be equal on all hosts: config, data, and code."""
    fields = config.dotted(comparable(description["config"]))
    same = {name: value for name, value in fields.items() if not name.startswith(OF_A_HOST)}
    for split, source in splits._asdict().items():
        if source:
            same[f"{split} set"] = [*data.describe(source).values(), data.checksum(source)]
    return {**same, **{name: description[name] for name in ("classes", "git", "versions")}}


def devices() -> dict:
    """Return the kind and number of the devices, and the number of hosts."""
    return {
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
    }


def mixture(source: data.Source, cfg: ConfigDict) -> dict[str, dict[str, float]]:
    """Return how often a run visits each example of each set of a mixture, if it is one."""
    if not isinstance(source, data.Mixture):
        return {}
    return {"epochs": dict(source.epochs(cfg.steps, cfg.data.batch))}


def summarise(setup: Setup, splits: Splits, track: Tracker) -> dict:
    """Return the content of report.json except the results."""
    cfg = setup.cfg
    return {
        "step": cfg.steps,
        "parameters": count(setup.state.params),
        "init": cfg.init.source,
        "resolution": list(config.image_size(cfg)),
        "data": data.describe(splits.train),
        **mixture(splits.train, cfg),
        "flops": setup.flops_per_image * cfg.data.batch * cfg.steps,
        "images_per_second": track.images_per_second,
        "seconds": track.seconds,
        "devices": devices(),
        "versions": versions(),
    }

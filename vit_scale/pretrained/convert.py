"""Convert a trained model, such as external weights, to a run folder."""

import copy
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.checkpoint import Checkpoints
from vit_scale.data.targets import CLASS, NONE
from vit_scale.errors import UserError
from vit_scale.models.build import Model, build
from vit_scale.pretrained.adapt import Adaptation, adapt, match_head
from vit_scale.pretrained.hints import Hints, hints_from_config
from vit_scale.pretrained.import_weights import numbered_classes
from vit_scale.pretrained.load import Pretrained, load_model
from vit_scale.runs.run_folder import Run
from vit_scale.storage import paths

SIZE_FIELDS = ("data.resolution", "data.width")


def convert(
    source: str | os.PathLike, out: str | os.PathLike, overrides: Sequence[str] = ()
) -> tuple[Pretrained, list[Adaptation]]:
    """Write the model in `source` to the new run folder `out`, as its checkpoint of step 0.

    The run's config is that of the source; `overrides`, such as "data.resolution=384", change it,
    and the parameters are adapted. Returns the written model and what was done with each parameter.
    Raises UserError if the source can't be loaded or adapted, or `out` is not empty.
    """
    workdir = new_folder(out)
    loaded = load_model(source, convert_hints(overrides))
    notes = tuple(_without_overridden(note, overrides) for note in loaded.notes)
    cfg = config.override(copy.deepcopy(loaded.cfg), overrides)
    if not loaded.classes and not any(item.startswith("model.classes=") for item in overrides):
        raise UserError(f"{source} has no head: set --config.model.classes=N to add one")
    if cfg.lora.rank:
        raise UserError(f"lora.rank={cfg.lora.rank} is of training: a model is converted without")
    if cfg.data.target == NONE:  # of an encoder, which now gets a head
        cfg.data.target = CLASS
    cfg.init.source = loaded.source or str(source)
    count = cfg.model.classes
    classes = loaded.classes if len(loaded.classes) == count else numbered_classes(count)
    model = build(cfg.model, config.image_size(cfg))
    target = _initial_params(model, loaded.cfg, cfg)
    same_classes = match_head(loaded.classes, classes, cfg.init.head) is not None
    params, rows = adapt(loaded.params, target, cfg.init.resample, same_classes)
    converted = Pretrained(cfg, model, params, classes, 0, workdir, notes, loaded.data)
    write_run(workdir, converted, notes)
    return converted, rows


def new_folder(out: str | os.PathLike) -> pathlib.Path:
    """Return `out` as a path. Raises UserError if it is not empty."""
    workdir = paths.parse(out)
    if workdir.is_file() or (workdir.is_dir() and any(workdir.iterdir())):
        raise UserError(f"{workdir} is not empty: give a new folder")
    return workdir


def write_run(workdir: pathlib.Path, model: Pretrained, source: Sequence[str]) -> None:
    """Write a model as a run with a checkpoint of step 0; `source` says where it comes from."""
    description = {
        "name": workdir.name,
        "config": config.to_json(model.cfg),
        "classes": list(model.classes),
        "source": list(source),
        **({"data": model.data} if model.data else {}),
    }
    with Run(workdir, description), Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, {"params": model.params, "ema": None, "opt_state": None}, description)


def convert_hints(overrides: Sequence[str]) -> Hints:
    """Return hints from the overrides.

    An image size is that of the weights, or one to resample to.
    """
    cfg = config.override(config.base(), overrides)
    sized = any(item.partition("=")[0] in SIZE_FIELDS for item in overrides)
    hints = hints_from_config(cfg, cfg.model.heads)
    return hints._replace(requested_size=config.image_size(cfg)) if sized else hints


def _without_overridden(note: str, overrides: Sequence[str]) -> str:
    """A note on assumptions, without the fields that the overrides set."""
    start, colon, rest = note.partition(": ")
    if not start.startswith("assuming"):
        return note
    overridden = tuple(item.partition("=")[0] + "=" for item in overrides)
    return start + colon + ", ".join(x for x in rest.split(", ") if not x.startswith(overridden))


def _initial_params(model: Model, source: ConfigDict, cfg: ConfigDict) -> dict:
    """Parameters for a new head: zero, or random if a new representation layer comes before it."""
    if cfg.model.representation != source.model.representation:
        return jax.jit(model.init)(jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract_params)

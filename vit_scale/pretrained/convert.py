"""Make a run's folder of weights of others: from then on they are a run like any other."""

import copy
import os
from collections.abc import Sequence

import jax
import numpy as np

from vit_scale import config
from vit_scale.checkpoint import Checkpoints
from vit_scale.errors import UserError
from vit_scale.models.build import Model, build
from vit_scale.pretrained.adapt import Adaptation, adapt, match_head
from vit_scale.pretrained.external import numbered
from vit_scale.pretrained.infer_config import hints_from_config
from vit_scale.pretrained.load import Pretrained, load_model
from vit_scale.runs.run_folder import Run
from vit_scale.storage import paths

SIZE = ("data.resolution", "data.width")


def convert(
    source: str | os.PathLike, out: str | os.PathLike, overrides: Sequence[str] = ()
) -> tuple[Pretrained, list[Adaptation]]:
    """Write the model that `source` names to the run folder `out`, as its step 0.

    Its config is what the weights were trained with; `overrides` such as "data.resolution=384"
    change it, and the parameters with it. Returns the model as it was written, and what became of
    each parameter. Raises UserError for what can't be read or doesn't fit, and for a folder that
    holds something already.
    """
    workdir = paths.parse(out)
    if workdir.is_file() or (workdir.is_dir() and any(workdir.iterdir())):
        raise UserError(f"{workdir} is not empty: give a folder that is new")
    asked = config.override(config.base(), overrides)
    sized = any(item.partition("=")[0] in SIZE for item in overrides)
    size = config.image_size(asked) if sized else None
    hints = hints_from_config(asked, asked.model.heads)._replace(requested_size=size)
    given = load_model(source, hints)
    given = given._replace(notes=tuple(_still_assumed(line, overrides) for line in given.notes))
    cfg = config.override(copy.deepcopy(given.cfg), overrides)
    if not given.classes and not any(item.startswith("model.classes=") for item in overrides):
        raise UserError(f"{source} has no head: give --config.model.classes=N for a new one")
    cfg.init.source = str(source)  # the config of the run says where it came from
    count = cfg.model.classes
    classes = given.classes if len(given.classes) == count else numbered(count)
    model = build(cfg.model, config.image_size(cfg))
    target = _fresh(model, cfg.model.representation != given.cfg.model.representation)
    kept = match_head(given.classes, classes, cfg.init.head) is not None
    params, rows = adapt(given.params, target, cfg.init.resample, kept)
    about = {
        "name": workdir.name,
        "config": config.to_json(cfg),
        "classes": list(classes),
        "source": list(given.notes),
        **({"data": given.data} if given.data else {}),
    }
    with Run(workdir, about), Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, {"params": params, "ema": None, "opt_state": None}, about)
    made = Pretrained(cfg, model, params, classes, 0, workdir, given.notes, given.data)
    return made, rows


def _still_assumed(line: str, overrides: Sequence[str]) -> str:
    """A line about what was assumed, without what the overrides say."""
    start, colon, rest = line.partition(": ")
    if not start.startswith("assuming"):
        return line
    said = tuple(item.partition("=")[0] + "=" for item in overrides)
    return start + colon + ", ".join(x for x in rest.split(", ") if not x.startswith(said))


def _fresh(model: Model, drawn: bool) -> dict:
    """Parameters of which only a new head is used, which is zero, unless it has hidden layers."""
    if drawn:
        return jax.jit(model.init)(jax.random.key(0))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

"""Read the model of a run of this project: its folder, or a step's folder in it."""

import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from vit_scale import checkpoint, config, paths
from vit_scale.errors import UserError
from vit_scale.model import Model, build


class Pretrained(NamedTuple):
    """A trained model and what it needs to be used."""

    cfg: ConfigDict
    model: Model
    params: dict
    classes: tuple[str, ...]
    step: int
    path: pathlib.Path


def read(source: str | pathlib.Path) -> Pretrained:
    """The newest checkpoint of the run folder `source`, or `source` itself if it is a step in one.

    Where the run averaged its weights, the average is the model. Raises UserError where there is
    neither, or where it is damaged.
    """
    folder = locate(paths.path(source))
    described = checkpoint.description(folder)
    cfg = config.from_json(described["config"])
    model = build(cfg.model, config.image_size(cfg))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    tree = "ema" if checkpoint.holds_average(folder) else "params"
    params = checkpoint.read(folder, {tree: target})[tree]
    return Pretrained(cfg, model, params, tuple(described["classes"]), int(folder.name), folder)


def locate(source: pathlib.Path) -> pathlib.Path:
    """The checkpoint's folder that `source` means. Raises UserError where it means none."""
    if source.parent.name == checkpoint.FOLDER and source.name.isdigit() and source.is_dir():
        return source
    if not (source / "run.json").is_file():
        raise UserError(
            f"{source} is neither the folder of a run nor a step in it, RUN/checkpoints/STEP"
        )
    steps = checkpoint.steps(source)
    if not steps:
        raise UserError(f"{source} has no finished checkpoint yet: train it first")
    return source / checkpoint.FOLDER / str(steps[-1])

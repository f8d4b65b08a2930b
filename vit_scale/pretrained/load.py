"""Read a trained model: a run of this project, or weights that others' code has saved."""

import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.distributed.mesh import have_cudnn
from vit_scale.errors import UserError, printable
from vit_scale.models.build import Model, build
from vit_scale.pretrained import external, fetch, weight_files
from vit_scale.pretrained.infer_config import NO_HINTS, Hints
from vit_scale.storage import paths


class Pretrained(NamedTuple):
    """A trained model and what it needs to be used.

    `classes` are "0", "1" and so on where nobody named them, and none where there is no head.
    `data` is what it says of the images that it was trained on here, None of weights of others:
    then their config's data block is nothing but defaults.
    `notes` say what weights of others were taken for.
    """

    cfg: ConfigDict
    model: Model
    params: dict
    classes: tuple[str, ...]
    step: int
    path: pathlib.Path
    notes: tuple[str, ...] = ()
    data: dict[str, Any] | None = None

    def print_notes(self) -> None:
        """Print what weights of others were taken for to standard error."""
        for line in self.notes:
            print(f"vit-scale: {printable(line)}", file=sys.stderr)


def load_model(source: str | os.PathLike, hints: Hints = NO_HINTS) -> Pretrained:
    """The model that `source` names.

    That is the newest checkpoint of a run's folder, or RUN/checkpoints/STEP, on disk or in a
    bucket; or weights of others (dialects/): a .npz, .safetensors or PyTorch file, or a folder with
    config.json beside it, on disk, gs:// or https://. Raises UserError where there is none, or
    where it is damaged.
    """
    if place := fetch.weights(source):
        found = external.load(place, hints)
        return Pretrained(
            found.cfg, found.model, found.params, found.classes, 0, place, found.notes
        )
    given = load_run(paths.parse(source))
    fields = {"dialect": hints.format, "tree": hints.tree, "image": hints.trained_size}
    for field, value in fields.items():
        if value:
            raise UserError(
                f"init.{field} is of weights of others, and {source} is a run, which says it "
                "itself: leave it out"
            )
    return given


def load_run(source: pathlib.Path) -> Pretrained:
    """The model of a run. Where it averaged its weights, the average is the model."""
    folder = locate_checkpoint(source)
    described = checkpoint.read_description(folder)
    (first, *_) = jax.local_devices()
    cfg = with_supported_attention(config.from_json(described["config"]), [first])
    cfg.data.path = paths.resolve(cfg.data.path, folder.parent.parent, described.get("cwd", ""))
    model = build(cfg.model, config.image_size(cfg))
    device = jax.sharding.SingleDeviceSharding(first)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    tree = "ema" if checkpoint.has_ema(folder) else "params"
    params = checkpoint.read(folder, {tree: target})[tree]
    return Pretrained(
        cfg,
        model,
        params,
        tuple(described["classes"]),
        int(folder.name),
        folder,
        data=described.get("data"),
    )


def with_supported_attention(cfg: ConfigDict, devices: Sequence[jax.Device]) -> ConfigDict:
    """The config of a trained model for these devices: the same function, computed as they can.

    A run that trained with cuDNN's attention is a model without a GPU too (law 7).
    """
    if not have_cudnn(devices):
        cfg.model.attention = "xla"
    return cfg


def locate_checkpoint(source: pathlib.Path) -> pathlib.Path:
    """The checkpoint's folder that `source` means. Raises UserError where it means none."""
    if source.parent.name == checkpoint.FOLDER and source.name.isdigit() and source.is_dir():
        return source
    if not (source / "run.json").is_file():
        hub = ""
        if not source.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            hub = f"; a model of Hugging Face's hub: hf download {source} --local-dir DIR, then DIR"
        raise UserError(
            f"{source} is neither the folder of a run nor a step in it, RUN/checkpoints/STEP, nor "
            f"weights ({', '.join(weight_files.ENDINGS)}, "
            f"or a folder with {weight_files.MODEL}){hub}"
        )
    steps = checkpoint.finished_steps(source)
    if not steps:
        raise UserError(f"{source} has no finished checkpoint yet: train it first")
    return source / checkpoint.FOLDER / str(steps[-1])

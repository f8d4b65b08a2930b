"""Regression: predict the numbers of an image."""

from collections.abc import Callable

import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import train_images
from vit_scale.config import image_size
from vit_scale.data.targets import VALUE, read_scale
from vit_scale.errors import UserError
from vit_scale.models.build import Model
from vit_scale.training.objectives.losses import make_number_loss
from vit_scale.training.objectives.objective import Objective, example_weights


def regression(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """The config's loss of numbers in units of their standard deviation in the training set.

    The mean over an image's numbers and over the unmasked examples of the global batch. Mixup and
    CutMix mix the numbers. "mae" is measured in the numbers' own units.
    """
    size, number_loss = image_size(cfg), make_number_loss(cfg)
    mean, std = read_scale(cfg)

    def prepare(batch, key):
        scaled = batch | {"target": (batch["target"] - mean) / std}
        images, targets = train_images(scaled, key, cfg.augment, size, cfg.model.classes)
        weight = example_weights(batch["mask"])
        return {"image": images, "target": targets, "mask": batch["mask"], "weight": weight}

    def loss(params, examples, key):
        out = model.train(params, examples["image"], key, examples["mask"])
        losses = number_loss(out.prediction, examples["target"])
        errors = jnp.abs(out.prediction - examples["target"]) * std
        outputs = {
            "loss": losses,
            "mask": examples["mask"],
            "statistics": out.statistics,
            "measures": {"mae": errors.mean(-1)},
        }
        return (losses * examples["weight"]).sum(), outputs

    return Objective(prepare, loss)


def check_regression(cfg: ConfigDict) -> None:
    """Raise UserError for a `regression` block, or a field of the labels, that doesn't fit."""
    block, is_regression = cfg.regression, cfg.objective == "regression"
    if is_regression and cfg.data.target != VALUE:
        raise UserError(
            f"objective=regression learns numbers, and data.target={cfg.data.target}: set "
            "data.target=value"
        )
    if not block.delta > 0:
        raise UserError(f"regression.delta={block.delta} must be above 0")
    if not is_regression:
        return
    if cfg.augment.smoothing:
        raise UserError(
            f"augment.smoothing={cfg.augment.smoothing} is of classes: objective=regression needs 0"
        )
    for name in ("mean", "std"):
        if block[name] and len(block[name]) != cfg.model.classes:
            raise UserError(
                f"regression.{name} has {len(block[name])} numbers, the model "
                f"model.classes={cfg.model.classes}"
            )
    if block.std and min(block.std) <= 0:
        raise UserError(f"regression.std={block.std} must be above 0")

"""What a model is trained for. The loop knows only `prepare` and `loss`, and never forks on which.

`prepare` sees the whole global batch (augmentation mixes neighbours); `loss` may see a part of what
it returned (a micro-batch), and the losses of the parts add up to the loss of the whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_scale.augment import train_images
from vit_scale.config import image_size
from vit_scale.errors import UserError, nearest
from vit_scale.model import Model


class Objective(NamedTuple):
    """Two pure functions, traced inside the step.

    prepare(batch, key) -> examples     a dict of arrays [b, ...] of the global batch
    loss(params, examples, key) -> (scalar, outputs)    outputs: a dict of per-example arrays [b]
    """

    prepare: Callable
    loss: Callable


def make_objective(model: Model, cfg: ConfigDict) -> Objective:
    """The objective of a config. Raises UserError for an unknown one."""
    if cfg.objective not in OBJECTIVES:
        raise UserError(
            f"objective={cfg.objective!r} is unknown; {nearest(cfg.objective, OBJECTIVES)}"
        )
    return OBJECTIVES[cfg.objective](model, cfg)


def classification(model: Model, cfg: ConfigDict) -> Objective:
    """Softmax cross-entropy with the soft targets that augmentation makes, in float32.

    The mean is over the examples whose mask is set, of the whole batch. Outputs: "loss", "correct"
    (the likeliest class is the heaviest target) and "mask".
    """

    size = image_size(cfg)

    def prepare(batch, key):
        images, targets = train_images(batch, key, cfg.augment, size, cfg.model.classes)
        weight = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
        return {"image": images, "target": targets, "mask": batch["mask"], "weight": weight}

    def loss(params, examples, key):
        logits = model.apply(params, examples["image"], key)
        losses = optax.softmax_cross_entropy(logits, examples["target"])
        correct = logits.argmax(-1) == examples["target"].argmax(-1)
        outputs = {"loss": losses, "correct": correct, "mask": examples["mask"]}
        return (losses * examples["weight"]).sum(), outputs

    return Objective(prepare, loss)


OBJECTIVES = {"classification": classification}

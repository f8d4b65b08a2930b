"""Losses of logits against soft targets, and of numbers, by name: one number for each example."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.data.targets import CLASSES
from vit_scale.errors import UserError, nearest

Logits = Float[Array, "b c"]
Loss = Callable[[Logits, Logits], Float[Array, "b"]]  # of logits and targets


def sigmoid(logits: Logits, targets: Logits, weights: Any = 1.0) -> Float[Array, "b"]:
    """Binary cross-entropy of each class, summed (Beyer et al. 2020, arXiv 2006.07159)."""
    return (weights * optax.sigmoid_binary_cross_entropy(logits, targets)).sum(-1)


def binary(logits: Logits, targets: Logits, weights: Any = 1.0) -> Float[Array, "b"]:
    """Mean binary cross-entropy, where every class that has a share of the target is a 1.

    DeiT III's (Touvron et al. 2022): a mixed image shows both of its classes.
    """
    present = (targets > 0).astype(logits.dtype)
    return (weights * optax.sigmoid_binary_cross_entropy(logits, present)).mean(-1)


def make_focal(cfg: ConfigDict) -> Callable:
    """Return the focal loss of each class, summed (Lin et al. 2017); `cfg` is the `focal` block.

    -a (1 - p)^gamma log(p), where p is the probability of what is so, presence or absence, and `a`
    is alpha or 1 - alpha. With a soft target p is the mean of both. With gamma=0 and no alpha it is
    `sigmoid`. There is no softmax form, as (1 - p)^gamma is not defined for a mixture of classes.
    """

    def focal(logits: Logits, targets: Logits, weights: Any = 1.0) -> Float[Array, "b"]:
        losses = optax.losses.sigmoid_focal_loss(
            logits, targets, alpha=cfg.alpha, gamma=float(cfg.gamma)
        )
        return (weights * losses).sum(-1)

    return focal


PER_CLASS = {"sigmoid": sigmoid, "binary": binary}  # whose terms are of one class each
LABELS = ("softmax", *PER_CLASS, "focal")  # losses of classes
NUMBERS = ("mse", "mae", "huber")  # losses of numbers
# Of the objectives that learn from labels.
LOSSES_OF = {"classification": LABELS, "distillation": LABELS, "regression": NUMBERS}


def make_loss(cfg: ConfigDict) -> Loss:
    """Return the loss of classes that a config names, with its class weights.

    Of images with one class each, an example's loss is multiplied by the mean of the weights under
    its target: by the weight of its class, or of both classes of a mixed image by their shares
    (Cui et al. 2019). Of images with several classes, each class's own term is multiplied.
    """
    weights = np.array(cfg.class_weights.weights, np.float32)
    per_class = make_focal(cfg.focal) if cfg.loss == "focal" else PER_CLASS.get(cfg.loss)
    loss: Callable = per_class or optax.softmax_cross_entropy
    if not weights.size:  # also of a config that is only planned
        return loss
    if cfg.data.target == CLASSES:
        return lambda logits, targets: loss(logits, targets, weights)
    return lambda logits, targets: (targets * weights).sum(-1) * loss(logits, targets)


def make_number_loss(cfg: ConfigDict) -> Loss:
    """Return the loss of numbers that a config names: the mean over an image's numbers."""
    losses = {
        "mse": lambda errors: jnp.square(errors),
        "mae": lambda errors: jnp.abs(errors),
        "huber": lambda errors: optax.losses.huber_loss(errors, delta=cfg.regression.delta),
    }
    return lambda predictions, targets: losses[cfg.loss](predictions - targets).mean(-1)


def check_loss(cfg: ConfigDict) -> None:
    """Raise UserError for an unknown loss, or one that doesn't fit the targets or the smoothing."""
    if cfg.loss not in (*LABELS, *NUMBERS):
        raise UserError(f"loss={cfg.loss!r} is unknown; {nearest(cfg.loss, (*LABELS, *NUMBERS))}")
    wanted = LOSSES_OF.get(cfg.objective)
    if wanted and cfg.loss not in wanted:
        raise UserError(f"objective={cfg.objective} has no loss={cfg.loss}: set {_any(wanted)}")
    if wanted and cfg.data.target == CLASSES and cfg.loss == "softmax":
        raise UserError(
            "data.target=classes gives images several classes, and loss=softmax has one an image: "
            f"set {_any(LABELS[1:])}"
        )
    if cfg.loss == "binary" and cfg.augment.smoothing:
        raise UserError(
            f"loss=binary counts every class with a target above 0 as present: "
            f"augment.smoothing={cfg.augment.smoothing} must be 0"
        )
    if not cfg.focal.gamma >= 0:
        raise UserError(f"focal.gamma={cfg.focal.gamma} must be at least 0")
    if cfg.focal.alpha is not None and not 0 < cfg.focal.alpha < 1:
        raise UserError(f"focal.alpha={cfg.focal.alpha} must be above 0 and below 1, or None")


def _any(names: tuple[str, ...]) -> str:
    return f"loss={', '.join(names[:-1])} or {names[-1]}"

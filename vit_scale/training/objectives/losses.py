"""Losses of logits against soft targets, by name: one number for each example."""

import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest

Logits = Float[Array, "b c"]


def sigmoid(logits: Logits, targets: Logits) -> Float[Array, "b"]:
    """Binary cross-entropy of each class, summed (Beyer et al. 2020, arXiv 2006.07159)."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)


def binary(logits: Logits, targets: Logits) -> Float[Array, "b"]:
    """Mean binary cross-entropy, where every class that has a share of the target is a 1.

    DeiT III's (Touvron et al. 2022): a mixed image shows both of its classes.
    """
    present = (targets > 0).astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, present).mean(-1)


LOSSES = {"softmax": optax.softmax_cross_entropy, "sigmoid": sigmoid, "binary": binary}


def check_loss(cfg: ConfigDict) -> None:
    """Raise UserError for an unknown loss, and for one that smoothing would make constant."""
    if cfg.loss not in LOSSES:
        raise UserError(f"loss={cfg.loss!r} is unknown; {nearest(cfg.loss, LOSSES)}")
    if cfg.loss == "binary" and cfg.augment.smoothing:
        raise UserError(
            f"loss=binary counts every class with a target above 0 as present: "
            f"augment.smoothing={cfg.augment.smoothing} must be 0"
        )

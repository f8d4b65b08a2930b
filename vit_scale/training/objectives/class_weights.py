"""Weights of classes in the loss, from how often the training set has each."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest

KINDS = ("none", "balanced", "effective")


def compute_weights(
    counts: Int[np.ndarray, "c"], cfg: ConfigDict, classes: Sequence[str]
) -> Float[np.ndarray, "c"]:
    """Return the weight of each class; `cfg` is the config's class_weights block.

    balanced: n / (c * count), whose mean over the n labels is 1. effective: proportional to
    (1 - beta) / (1 - beta^count), with a sum of c (Cui et al. 2019, arXiv 1901.05555).

    Raises UserError for a class without an example, whose weight would be infinite.
    """
    if (empty := np.flatnonzero(counts == 0)).size:
        raise UserError(
            f"class_weights.kind={cfg.kind}: the training set has no example of "
            f"{classes[empty[0]]!r}, one of {empty.size} such classes of {len(counts)}; add some, "
            "leave these out, or set class_weights.kind=none"
        )
    if cfg.kind == "balanced":
        return counts.sum() / (len(counts) * counts)
    # expm1 and log1p: 1 - beta^count is exact also where beta is almost 1.
    effective = np.expm1(counts * np.log(cfg.beta)) / np.expm1(np.log(cfg.beta))
    return len(counts) / effective / (1 / effective).sum()


def check_class_weights(cfg: ConfigDict) -> None:
    """Raise UserError for class weights that are unknown, or that nothing would use.

    `cfg` is the whole config.
    """
    block = cfg.class_weights
    if block.kind not in KINDS:
        raise UserError(
            f"class_weights.kind={block.kind!r} is unknown; {nearest(block.kind, KINDS)}"
        )
    if not 0 < block.beta < 1:
        raise UserError(f"class_weights.beta={block.beta} must be above 0 and below 1")
    if block.kind == "none":
        if block.weights:
            raise UserError("class_weights.weights needs class_weights.kind=balanced or effective")
        return
    if cfg.objective not in ("classification", "distillation"):
        raise UserError(
            f"class_weights.kind={block.kind} weighs classes, and objective={cfg.objective} has "
            "none: set class_weights.kind=none"
        )
    if cfg.data.mixture:
        raise UserError(
            f"class_weights.kind={block.kind} cannot be combined with data.mixture, whose weights "
            "change how often a class is visited"
        )
    if cfg.data.sampling == "balanced":
        raise UserError(
            f"class_weights.kind={block.kind} would count twice what data.sampling=balanced evens "
            "out: set one of them"
        )
    if block.weights and len(block.weights) != cfg.model.classes:
        raise UserError(
            f"class_weights.weights has {len(block.weights)} weights, the model "
            f"model.classes={cfg.model.classes}"
        )

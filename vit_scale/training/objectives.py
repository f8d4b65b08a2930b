"""What a model is trained for. The loop knows only `prepare` and `loss`, and never forks on which.

`prepare` sees the whole global batch (augmentation mixes neighbours); `loss` may see a part of what
it returned (a micro-batch), and the losses of the parts add up to the loss of the whole.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import train_images
from vit_scale.config import image_size
from vit_scale.errors import UserError, nearest
from vit_scale.models.build import Model, Outputs


class Objective(NamedTuple):
    """Two pure functions, traced inside the step.

    prepare(batch, key) -> examples     a dict of arrays [b, ...] of the global batch
    loss(params, examples, key) -> (scalar, outputs)    outputs: a dict of per-example arrays [b]

    Two things are different for some: `prepare` of a distillation gets the teacher's parameters
    after the key; "statistics" of the outputs is what batch normalisation has measured (or {}).
    """

    prepare: Callable
    loss: Callable


def make_objective(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """The objective of a config. Raises UserError for an unknown one and for values out of range.

    `teacher` is a function (params, images [b, H, W, 3]) -> logits [b, c].
    """
    if cfg.objective not in OBJECTIVES:
        raise UserError(
            f"objective={cfg.objective!r} is unknown; {nearest(cfg.objective, OBJECTIVES)}"
        )
    check(cfg.distill)
    return OBJECTIVES[cfg.objective](model, cfg, teacher)


def classification(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """Softmax cross-entropy with the soft targets that augmentation makes, in float32.

    Of a model with two heads, the mean of their logits is trained, which is what it predicts.
    The mean is over the examples whose mask is set, of the whole batch. Outputs: "loss", "correct"
    (the likeliest class is the heaviest target) and "mask".
    """

    size = image_size(cfg)

    def prepare(batch, key):
        images, targets = train_images(batch, key, cfg.augment, size, cfg.model.classes)
        weight = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
        return {"image": images, "target": targets, "mask": batch["mask"], "weight": weight}

    def loss(params, examples, key):
        out = model.train(params, examples["image"], key, examples["mask"])
        losses = optax.softmax_cross_entropy(out.prediction, examples["target"])
        return measure(losses, out, examples)

    return Objective(prepare, loss)


def distillation(model: Model, cfg: ConfigDict, teacher: Callable | None) -> Objective:
    """Labels and a teacher's logits, of the same augmented pixels (Beyer et al. 2022: consistent).

        (1 - weight) * cross-entropy(logits, targets) + weight * distance(distilled, teacher)

    distance is, with distill.kind=hard, the cross-entropy with the teacher's likeliest class (DeiT,
    Touvron et al. 2021, equation 3), or, soft, temperature^2 * KL(teacher || student), both at the
    temperature (Hinton et al. 2015; DeiT, equation 2). `distilled` are the logits of the
    distillation token where the model has one (model.distilled), else its only logits. "correct" is
    of what the model predicts: the mean of both.
    """
    assert teacher is not None
    plain, t = classification(model, cfg), cfg.distill

    def prepare(batch, key, teacher_params):
        examples = plain.prepare(batch, key)
        return examples | {"teacher": teacher(teacher_params, examples["image"])}

    def distance(logits, taught):
        if t.kind == "hard":
            return optax.softmax_cross_entropy_with_integer_labels(logits, taught.argmax(-1))
        student, taught = (jax.nn.log_softmax(x / t.temperature) for x in (logits, taught))
        return t.temperature**2 * optax.losses.kl_divergence_with_log_targets(student, taught)

    def loss(params, examples, key):
        out = model.train(params, examples["image"], key, examples["mask"])
        losses = (1 - t.weight) * optax.softmax_cross_entropy(out.logits, examples["target"])
        losses += t.weight * distance(out.distilled, examples["teacher"])
        return measure(losses, out, examples)

    return Objective(prepare, loss)


def measure(losses: Float[Array, "b"], out: Outputs, examples: dict) -> tuple[Array, dict]:
    """What `loss` returns, of the loss of each example."""
    outputs = {
        "loss": losses,
        "correct": out.prediction.argmax(-1) == examples["target"].argmax(-1),
        "mask": examples["mask"],
        "statistics": out.statistics,
    }
    return (losses * examples["weight"]).sum(), outputs


OBJECTIVES = {"classification": classification, "distillation": distillation}
KINDS = ("hard", "soft")


def check(cfg: ConfigDict) -> None:
    """Raises UserError for a `distill` block that makes no loss."""
    if cfg.kind not in KINDS:
        raise UserError(f"distill.kind={cfg.kind!r} is unknown; {nearest(cfg.kind, KINDS)}")
    if not 0 < cfg.weight <= 1:
        raise UserError(f"distill.weight={cfg.weight} must be above 0 and at most 1")
    if not 0 < cfg.temperature < math.inf:
        raise UserError(f"distill.temperature={cfg.temperature} must be above 0 and finite")

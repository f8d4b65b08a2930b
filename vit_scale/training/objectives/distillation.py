"""Distillation: learn from labels and from the logits of a teacher."""

import math
from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest
from vit_scale.models.build import Model
from vit_scale.training.objectives.classification import classification
from vit_scale.training.objectives.losses import make_loss
from vit_scale.training.objectives.objective import Objective, reduce_losses

KINDS = ("hard", "soft")


def distillation(model: Model, cfg: ConfigDict, teacher: Callable | None) -> Objective:
    """Learn from labels and from a teacher that sees the same pixels (Beyer et al. 2022).

        (1 - weight) * loss(logits, targets) + weight * distance(distilled, teacher)

    `distance` with distill.kind=hard is the cross-entropy with the teacher's likeliest class (DeiT,
    Touvron et al. 2021, equation 3); with soft it is temperature^2 * KL(teacher || student), both
    at the temperature (Hinton et al. 2015; DeiT, equation 2). `distilled` are the logits of the
    distillation token where the model has one (model.distilled), else its only logits. "correct"
    refers to what the model predicts: the mean of both.
    """
    plain, label_loss, t = classification(model, cfg), make_loss(cfg), cfg.distill

    def teach(examples, context):
        assert teacher is not None
        return examples | {"teacher": teacher(context.teacher, examples["image"])}, None

    def distance(logits, taught):
        if t.kind == "hard":
            return optax.softmax_cross_entropy_with_integer_labels(logits, taught.argmax(-1))
        student, taught = (jax.nn.log_softmax(x / t.temperature) for x in (logits, taught))
        return t.temperature**2 * optax.losses.kl_divergence_with_log_targets(student, taught)

    def loss(params, examples, key):
        out = model.train(params, examples["image"], key, examples["mask"])
        losses = (1 - t.weight) * label_loss(out.logits, examples["target"])
        losses += t.weight * distance(out.distilled, examples["teacher"])
        return reduce_losses(losses, out, examples)

    return Objective(plain.prepare, loss, teach)


def check_distill(cfg: ConfigDict) -> None:
    """Raise UserError for a `distill` block with an unknown or impossible value."""
    if cfg.kind not in KINDS:
        raise UserError(f"distill.kind={cfg.kind!r} is unknown; {nearest(cfg.kind, KINDS)}")
    if not 0 < cfg.weight <= 1:
        raise UserError(f"distill.weight={cfg.weight} must be above 0 and at most 1")
    if not 0 < cfg.temperature < math.inf:
        raise UserError(f"distill.temperature={cfg.temperature} must be above 0 and finite")

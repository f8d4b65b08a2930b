"""Objectives: what a model is trained for, by name.

To add one, put a function (model, cfg, teacher) -> Objective into OBJECTIVES; the training loop
stays as it is.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_scale.data.targets import KINDS
from vit_scale.errors import UserError, nearest
from vit_scale.models.build import Model
from vit_scale.training.objectives.class_weights import check_class_weights
from vit_scale.training.objectives.classification import classification
from vit_scale.training.objectives.distillation import check_distill, distillation
from vit_scale.training.objectives.lejepa import lejepa
from vit_scale.training.objectives.losses import check_loss
from vit_scale.training.objectives.masked_autoencoder import masked_autoencoder
from vit_scale.training.objectives.objective import Context, Objective
from vit_scale.training.objectives.regression import check_regression, regression
from vit_scale.training.objectives.self_distillation import self_distillation
from vit_scale.training.objectives.self_supervised import check_self_supervised, check_unread_blocks

__all__ = ["OBJECTIVES", "SELF_SUPERVISED", "Context", "Objective", "check", "make_objective"]

SELF_SUPERVISED = {"mae": masked_autoencoder, "dino": self_distillation, "lejepa": lejepa}
OBJECTIVES = {
    "classification": classification,
    "distillation": distillation,
    "regression": regression,
    **SELF_SUPERVISED,
}
# What those that learn from labels take as data.target; the others ignore labels.
TARGETS = {"classification": ("class", "classes"), "distillation": ("class",)}


def make_objective(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """Build the objective of a config.

    `teacher` is a function (params, images [b, H, W, 3]) -> logits [b, c], for distillation.
    """
    return OBJECTIVES[cfg.objective](model, cfg, teacher)


def check(cfg: ConfigDict) -> None:
    """Raise UserError for an unknown objective or loss, or a `distill` block that doesn't fit."""
    if cfg.objective not in OBJECTIVES:
        raise UserError(
            f"objective={cfg.objective!r} is unknown; {nearest(cfg.objective, OBJECTIVES)}"
        )
    check_unread_blocks(cfg)
    if cfg.objective in SELF_SUPERVISED:
        check_self_supervised(cfg)
    if cfg.data.target not in KINDS:
        hint = nearest(cfg.data.target, KINDS)
        raise UserError(f"data.target={cfg.data.target!r} is unknown; {hint}")
    if cfg.data.target not in TARGETS.get(cfg.objective, KINDS):
        raise UserError(
            f"data.target={cfg.data.target} needs an objective that learns it; "
            f"objective={cfg.objective} learns {' or '.join(TARGETS[cfg.objective])}"
        )
    check_regression(cfg)
    check_loss(cfg)
    check_class_weights(cfg)
    check_distill(cfg.distill)
    if cfg.objective == "distillation" and not cfg.distill.teacher:
        raise UserError("objective=distillation needs --config.distill.teacher=RUN")
    if cfg.objective != "distillation" and cfg.distill.teacher:
        raise UserError(
            f"distill.teacher={cfg.distill.teacher} has nothing to teach: "
            f"objective={cfg.objective}, not distillation"
        )

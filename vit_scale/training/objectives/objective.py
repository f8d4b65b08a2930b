"""The interface of an objective: what a model is trained for.

The train step knows only `prepare` and `loss`. `prepare` gets the whole global batch (augmentation
mixes neighbours); `loss` may get a micro-batch of what it returned, and the losses of the parts add
up to the loss of the whole.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from vit_scale.models.build import Outputs


class Objective(NamedTuple):
    """Two pure functions, traced inside the train step.

    prepare(batch, key) -> examples     a dict of arrays [b, ...] of the global batch
    loss(params, examples, key) -> (scalar, outputs)    outputs: a dict of per-example arrays [b]

    With a teacher, `prepare` gets the teacher's parameters as third argument. `outputs` has "loss",
    "correct", "mask", and "statistics": what batch normalisation measured, or {}.
    """

    prepare: Callable
    loss: Callable


def reduce_losses(losses: Float[Array, "b"], out: Outputs, examples: dict) -> tuple[Array, dict]:
    """Reduce the loss of each example [b] to what `Objective.loss` returns."""
    outputs = {
        "loss": losses,
        "correct": out.prediction.argmax(-1) == examples["target"].argmax(-1),
        "mask": examples["mask"],
        "statistics": out.statistics,
    }
    return (losses * examples["weight"]).sum(), outputs

"""The interface of an objective: what a model is trained for.

The train step knows nothing else of it. `prepare` gets the whole global batch (augmentation mixes
neighbours); `loss` may get a micro-batch of what it returned, and the losses of the parts add up to
the loss of the whole. An objective may also have a teacher, parameters and state of its own, and a
loss of the whole batch together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_scale.models.build import Outputs


class Context(NamedTuple):
    """What `Objective.teach` may read of the train state."""

    step: Int[Array, ""]  # number of finished steps
    teacher: Any  # the parameters of a distillation's teacher, or the average of the trained ones
    state: Any  # the objective's own


class Objective(NamedTuple):
    """Pure functions, traced inside the train step; only the first two are required.

    prepare(batch, key) -> examples     a dict of arrays [b, ...] of the global batch
    loss(params, examples, key) -> (scalar, outputs)    outputs: a dict of per-example arrays [b]

    `outputs` has "loss", "mask", and "statistics" (what batch normalisation measured, or {}); with
    labels also "correct"; and {name: array [b]} of further "measures" to report. Parameters of its
    own are params[OBJECTIVE] (`models.parameters`).

    teach(examples, context) -> (examples, state)     adds what a teacher makes of the global batch
    coupled(params, embeddings, mask, key) -> (scalar, measures)    a loss that is no mean over
        examples: of outputs["embeddings"] [b, ...] of the whole batch, also where `loss` gets parts
    """

    prepare: Callable
    loss: Callable
    teach: Callable | None = None
    coupled: Callable | None = None
    init: Callable | None = None  # (key) -> parameters of its own, a nested dict
    state: Any = None  # its state before the first step, arrays of numpy; None: it has none
    # (step) -> decay of an average of the parameters, which is the teacher, and is evaluated.
    decay: Callable | None = None
    # (regular expression, steps): parameters that are not updated in the first steps.
    held: tuple[str, int] | None = None
    count_flops: Callable[[], int] | None = None  # of training, per image; None: those of the model


def example_weights(mask: Bool[Array, "b"]) -> Float[Array, "b"]:
    """Return the weights of a mean over the unmasked examples of the global batch."""
    return mask / jnp.maximum(mask.sum(), 1)


def reduce_losses(losses: Float[Array, "b"], out: Outputs, examples: dict) -> tuple[Array, dict]:
    """Reduce the loss of each example [b] to what `Objective.loss` returns."""
    outputs = {
        "loss": losses,
        "correct": out.prediction.argmax(-1) == examples["target"].argmax(-1),
        "mask": examples["mask"],
        "statistics": out.statistics,
    }
    return (losses * examples["weight"]).sum(), outputs

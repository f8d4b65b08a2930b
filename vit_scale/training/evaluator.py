"""Exact evaluation: every example counts once, for every batch size and number of hosts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import eval_images
from vit_scale.config import image_size
from vit_scale.data import Source, are_files, views
from vit_scale.data.targets import VALUE, to_numbers
from vit_scale.distributed.mesh import cpu_options
from vit_scale.distributed.sharding import batch_sharding, shardings
from vit_scale.errors import UserError
from vit_scale.evaluation.batches import evaluate_batches
from vit_scale.models.build import Model
from vit_scale.tracking.metrics import EvalMetrics, to_floats
from vit_scale.training.feature_measure import NearestNeighbours
from vit_scale.training.measures import SUMMARIES, check_memory
from vit_scale.training.validation import check_classes


class Measure(Protocol):
    """What the training loop evaluates: (params, source, selected) -> {"n": ..., main: ..., ...}.

    `params` are the model's; `selected` are the results of the same parameters on the split that
    selects the best checkpoint, None while that one is evaluated. Results are numbers, or lists
    that JSON can hold. Every process calls it, and gets the same.
    """

    main: str  # the result by which the best checkpoint is selected: the higher the better

    def __call__(
        self, params: dict, source: Source, selected: Mapping | None = None
    ) -> dict[str, Any]: ...


def make_measure(cfg: ConfigDict, model: Model, mesh: Mesh, bank: Source | None = None) -> Measure:
    """Return what the checkpoints of a config are measured by; `bank` is that of its splits."""
    if bank is not None:
        return NearestNeighbours(cfg, model, mesh, bank)
    return (EvaluateVectors if cfg.data.target in SUMMARIES else Evaluate)(cfg, model, mesh)


def main_result(cfg: ConfigDict) -> str:
    """Return the name of the result that a config's checkpoints are selected by: the `main`."""
    if cfg.eval.probe:
        return NearestNeighbours.main
    return SUMMARIES[cfg.data.target].main if cfg.data.target in SUMMARIES else Evaluate.main


class Evaluate:
    """Evaluate a model of one class an image.

    (params, source) -> {"n": ..., "accuracy": ..., "balanced_accuracy": ..., "loss": ...}

    Raises UserError for a source with another number of classes than the model, and for one without
    a readable image.
    """

    main = "accuracy"

    def __init__(self, cfg: ConfigDict, model: Model, mesh: Mesh):
        self.cfg, self.mesh = cfg, mesh

        def measure(logits, batch):
            labels = batch["label"] if "target" not in batch else right(logits, batch["target"])
            return EvalMetrics.single_from_model_output(
                logits=logits, labels=labels, mask=batch["mask"]
            )

        self._eval_step = jit_eval_step(cfg, model, mesh, measure)

    def __call__(
        self, params: dict, source: Source, selected: Mapping | None = None
    ) -> dict[str, Any]:
        total = EvalMetrics.empty()
        for part in evaluate(self._eval_step, params, source, self.cfg, self.mesh):
            total = total.merge(part)
            jax.block_until_ready(total)  # else all batches would wait on the device
        result = to_floats(total)
        return _with_readable(result, source)


class EvaluateVectors:
    """Evaluate a model of several classes an image, or of numbers (measures.py).

    (params, source, selected) -> {"n": ..., "mAP": ..., ...} or {"n": ..., "r2": ..., ...}

    Raises UserError as `Evaluate` does, and for a split whose outputs exceed a host's memory.
    """

    def __init__(self, cfg: ConfigDict, model: Model, mesh: Mesh):
        self.cfg, self.mesh = cfg, mesh
        self.main, self._summarise = SUMMARIES[cfg.data.target]

        def gather(outputs, batch):
            made = to_numbers(outputs, cfg) if cfg.data.target == VALUE else outputs
            return made.astype(jnp.float32), batch["target"], batch["mask"]

        self._eval_step = jit_eval_step(cfg, model, mesh, gather)

    def __call__(
        self, params: dict, source: Source, selected: Mapping | None = None
    ) -> dict[str, Any]:
        check_memory(source.name, len(source), self.cfg.model.classes)
        made, targets = (
            np.empty((len(source), self.cfg.model.classes), np.float32) for _ in range(2)
        )
        n = 0
        for part in evaluate(self._eval_step, params, source, self.cfg, self.mesh):
            values, wanted, mask = map(np.asarray, part)
            count = int(mask.sum())
            made[n : n + count], targets[n : n + count] = values[mask], wanted[mask]
            n += count
        _with_readable({"n": n}, source)
        return {"n": n, **self._summarise(made[:n], targets[:n], selected)}


def jit_eval_step(cfg: ConfigDict, model: Model, mesh: Mesh, measure: Callable) -> Callable:
    """Return (params, batch) -> measure(logits, batch), jitted; its results are on every host."""
    _, view = views(cfg, are_files(cfg.data))

    def eval_step(params, batch):
        images = eval_images(batch["image"], cfg.augment, image_size(cfg), view)
        return measure(model.outputs(params, images, cfg.eval.flip), batch)

    return jax.jit(
        eval_step,
        in_shardings=(shardings(model.abstract_params, mesh), batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=cpu_options(mesh),
    )


def evaluate(
    eval_step: Callable, params: dict, source: Source, cfg: ConfigDict, mesh: Mesh
) -> Iterator[Any]:
    """Yield what `eval_step` makes of each batch. Raises UserError for other classes."""
    check_classes(source, cfg)
    yield from evaluate_batches(eval_step, params, source, cfg, mesh, "evaluate")


def _with_readable(result: dict[str, Any], source: Source) -> dict[str, Any]:
    """Return a result. Raises UserError for one of no example."""
    if not result["n"]:
        raise UserError(f"{source.name}: none of its {len(source)} images could be read")
    return result


def right(logits: Float[Array, "b c"], target: Float[Array, "b c"]) -> Int[Array, "b"]:
    """Return the prediction where `target` marks it as right, else a class that it marks."""
    prediction = logits.argmax(-1)
    hit = jnp.take_along_axis(target, prediction[:, None], axis=1)[:, 0] > 0
    return jnp.where(hit, prediction, target.argmax(-1))

"""Metrics of a step, as `clu.metrics` collections that are computed inside `jax.jit`.

Guaranteed: a masked example (corrupt, or padding of the last batch) counts nowhere, whatever its
logits are. Counts are int32, so `n` and accuracy are exact up to 2**31 examples, in any order. Sums
are float32 whatever the model computes in: accurate to 1e-6 over the hundreds of batches of an
evaluation, and over any number with `reduce`, which merges in float64 on the host.

Metrics of global arrays are global: hosts gather nothing.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import Array, Bool, Float, Int, PyTree


def _pytree(cls):
    """Register `cls` as a frozen pytree dataclass, as `flax.struct.dataclass` would."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Count(metrics.Metric):
    """The number of true elements of a boolean array."""

    total: Int[Array, ""]

    @classmethod
    def empty(cls) -> "Count":
        return cls(jnp.int32(0))

    @classmethod
    def from_model_output(cls, counted: Bool[Array, "b"]) -> "Count":
        return cls(counted.sum(dtype=jnp.int32))

    def merge(self, other: "Count") -> "Count":
        return Count(self.total + other.total)

    def compute(self) -> Int[Array, ""]:
        return self.total


@_pytree
class Share(metrics.Metric):
    """The share of true values among unmasked examples, exact: a ratio of two integers."""

    hits: Int[Array, ""]
    count: Int[Array, ""]

    @classmethod
    def empty(cls) -> "Share":
        return cls(jnp.int32(0), jnp.int32(0))

    @classmethod
    def from_model_output(cls, hit: Bool[Array, "b"], mask: Bool[Array, "b"]) -> "Share":
        return cls((hit & mask).sum(dtype=jnp.int32), mask.sum(dtype=jnp.int32))

    def merge(self, other: "Share") -> "Share":
        return Share(self.hits + other.hits, self.count + other.count)

    def compute(self) -> Float[Array, ""]:
        return self.hits / self.count


@_pytree
class ClassRecall(metrics.Metric):
    """The mean of each class's recall (balanced accuracy), over the classes that occur; exact."""

    hits: Int[Array, "c"]
    count: Int[Array, "c"]

    @classmethod
    def empty(cls) -> "ClassRecall":
        return cls(jnp.int32(0), jnp.int32(0))  # of any number of classes

    @classmethod
    def from_model_output(
        cls, labels: Int[Array, "b"], hit: Bool[Array, "b"], mask: Bool[Array, "b"], classes: int
    ) -> "ClassRecall":
        zeros = jnp.zeros(classes, jnp.int32)
        return cls(*(zeros.at[labels].add(one.astype(jnp.int32)) for one in (hit & mask, mask)))

    def merge(self, other: "ClassRecall") -> "ClassRecall":
        return ClassRecall(self.hits + other.hits, self.count + other.count)

    def compute(self) -> Float[Array, ""]:
        seen = self.count > 0
        return (self.hits / (self.count + ~seen)).sum() / seen.sum()


@_pytree
class Measures(metrics.Metric):
    """Means over unmasked examples, by name; of booleans, exact shares."""

    means: dict[str, metrics.Metric]

    @classmethod
    def empty(cls) -> "Measures":
        return cls({})

    @classmethod
    def from_model_output(cls, measured: Mapping[str, Array], mask: Bool[Array, "b"]) -> "Measures":
        return cls(
            {
                name: Share.from_model_output(values, mask)
                if values.dtype == bool
                else metrics.Average.from_model_output(values.astype(jnp.float32), mask)
                for name, values in measured.items()
            }
        )

    def merge(self, other: "Measures") -> "Measures":
        merged = {**self.means, **other.means}
        both = self.means.keys() & other.means.keys()
        return Measures(merged | {name: self.means[name].merge(other.means[name]) for name in both})

    def compute(self) -> dict[str, Any]:
        return {name: mean.compute() for name, mean in self.means.items()}


@_pytree
class TrainMetrics(metrics.Collection):
    """The metrics of one train step, or of several merged.

    Loss, accuracy and other measures are means over unmasked examples; the norms of the gradient
    and of the update, which includes the learning rate, are means over steps; the parameters' norm
    and the learning rate are those of the last step.
    """

    loss: metrics.Average
    measures: Measures  # such as accuracy
    gradient_norm: metrics.Average
    update_norm: metrics.Average
    parameter_norm: metrics.LastValue
    learning_rate: metrics.LastValue
    skipped: Count  # corrupt examples, masked out
    nonfinite: Count  # steps whose loss or gradient was not finite

    @classmethod
    def of_step(
        cls,
        outputs: Mapping[str, Array],
        grads: PyTree,
        change: PyTree,
        params: PyTree,
        learning_rate: float | Float[Array, ""],
        finite: Bool[Array, ""],
    ) -> "TrainMetrics":
        """Compute the metrics of one step.

        Args:
          outputs: per-example "loss" (float) and "mask" (bool), each [b]; with labels "correct"
            (bool), whose mean is the accuracy; {name: [b]} of "measures", if there are others.
          grads: of the mean loss, before clipping.
          change: the update that was added to the parameters.
          params: the parameters before the step.
          learning_rate: of this step.
          finite: whether its loss and gradient are finite.
        """
        loss, mask = outputs["loss"], outputs["mask"]
        measured = {"accuracy": outputs["correct"]} if "correct" in outputs else {}
        measured |= outputs.get("measures", {})
        _check_shapes(loss=loss, mask=mask, **measured)
        return dataclasses.replace(
            cls.empty(),
            loss=metrics.Average.from_model_output(loss.astype(jnp.float32), mask),
            measures=Measures.from_model_output(measured, mask),
            gradient_norm=metrics.Average.from_model_output(norm(grads)),
            update_norm=metrics.Average.from_model_output(norm(change)),
            parameter_norm=metrics.LastValue.from_model_output(norm(params)),
            learning_rate=metrics.LastValue.from_model_output(
                jnp.asarray(learning_rate, jnp.float32)
            ),
            skipped=Count.from_model_output(~mask),
            nonfinite=Count.from_model_output(~finite),
        )


@_pytree
class EvalMetrics(metrics.Collection):
    """Mean cross-entropy, top-1 accuracy, and `n`, the number of examples they average over.

    Balanced accuracy is the mean of the classes' own accuracies.
    """

    loss: metrics.Average
    accuracy: Share
    balanced_accuracy: ClassRecall
    n: Count

    @classmethod
    def single_from_model_output(
        cls, *, logits: Float[Array, "b c"], labels: Int[Array, "b"], mask: Bool[Array, "b"]
    ) -> "EvalMetrics":
        """Compute the metrics of one batch, over the examples whose mask is set."""
        _check_shapes(logits=logits[:, 0], labels=labels, mask=mask)
        log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
        loss = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
        hit = logits.argmax(-1) == labels
        return dataclasses.replace(
            cls.empty(),
            loss=metrics.Average.from_model_output(loss, mask),
            accuracy=Share.from_model_output(hit, mask),
            balanced_accuracy=ClassRecall.from_model_output(labels, hit, mask, logits.shape[1]),
            n=Count.from_model_output(mask),
        )


def norm(tree: PyTree) -> Float[Array, ""]:
    """Return the Euclidean norm of all leaves together, in float32."""
    squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def reduce(collections: Sequence[Any]) -> dict[str, float]:
    """Merge the metrics of several steps on the host, in order, in float64.

    `collections` are one or more of the same class, on the device or fetched. Returns {"loss": 0.5,
    "n": 10000, ...}: floats, and ints for counts. A mean over no examples is nan.
    """
    fetched = jax.tree.map(_widen, jax.device_get(list(collections)))
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, without a warning
        merged = functools.reduce(lambda left, right: left.merge(right), fetched).compute()
    values: dict[str, Any] = {}
    for name, value in merged.items():
        values |= value if isinstance(value, dict) else {name: value}
    return {name: np.asarray(value).item() for name, value in values.items()}


def to_floats(collection: Any) -> dict[str, float]:
    """Return the values of one collection as Python numbers, as `reduce` does."""
    return reduce([collection])


def _widen(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(np.int64 if np.issubdtype(leaf.dtype, np.integer) else np.float64)


def _check_shapes(**arrays: Array) -> None:
    """Raise ValueError for a mask of the wrong shape, which clu would ignore with a warning."""
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["mask"].ndim != 1:
        raise ValueError(
            f"metrics need per-example arrays and a mask, all of shape [b], not {shapes}"
        )
    if arrays["mask"].dtype != bool:
        raise ValueError(f"metrics need a boolean mask, not {arrays['mask'].dtype}")

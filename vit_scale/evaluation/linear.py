"""Linear classifiers on features: multinomial logistic regression, solved by L-BFGS.

The objective is that of sklearn.linear_model.LogisticRegression after a StandardScaler: the mean
cross-entropy plus strength / 2 times the sum of the squared weights, without the intercepts. Its C
is 1 / (strength n). (Of two classes scikit-learn fits one vector instead of two: 2 / (strength n).)

Each feature is shifted and scaled by its mean and deviation over the training examples, so that one
path of strengths serves every model: the features of some are a hundred times as large as those of
others. The strength is chosen on training examples that are held out, of each class a part, and the
classifier is fitted again to all of them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vit_scale.data.orders import permutation
from vit_scale.distributed import preemption
from vit_scale.distributed.mesh import AXES
from vit_scale.distributed.sharding import shard
from vit_scale.errors import UserError
from vit_scale.evaluation.intervals import scored
from vit_scale.runs import watchdog

# From the strongest to the weakest: each solution is the start of the next.
STRENGTHS = tuple(float(10**exponent) for exponent in np.arange(1.0, -6.1, -0.5))
PATIENCE = 3  # weaker strengths that are no better
FOLDS = 5  # that each class's examples are dealt to
TOLERANCE = 1e-6  # of the gradient's largest entry; near the limit of float32
ROUGH = 1e-5  # the same, while a strength is chosen
ITERATIONS = 1000  # at most, of a fit
SEGMENT = 100  # iterations between two heartbeats

Params = dict[str, Array]  # "kernel" [d, c] and "bias" [c]


class Scale(NamedTuple):
    """The mean of each feature and its deviation, 1 where it is constant."""

    mean: Float[np.ndarray, "d"]
    deviation: Float[np.ndarray, "d"]

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        return ((features - self.mean) / self.deviation).astype(np.float32)


def measure_scale(features: Float[np.ndarray, "n d"]) -> Scale:
    mean = features.mean(axis=0, dtype=np.float64)
    deviation = features.std(axis=0, dtype=np.float64)
    constant = deviation <= 1e-6 * np.abs(mean)
    return Scale(mean.astype(np.float32), np.where(constant, 1, deviation).astype(np.float32))


class Fit(NamedTuple):
    """A solution: the parameters, and how it was reached."""

    params: Params
    iterations: int
    converged: bool


class Examples:
    """Standardised training features on the devices of a mesh, split by rows.

    A fit weighs them, so that all folds and the whole have the same arrays and one program.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, "n"],
        classes: int,
        mesh: Mesh,
    ):
        self.n, self.classes, self.mesh = len(features), classes, mesh
        self.scale = measure_scale(features)
        self.features = _on_devices(self.scale(features), mesh)
        self.labels = _on_devices(labels.astype(np.int32), mesh)

    def fit(
        self,
        strength: float,
        weights: Float[np.ndarray, "n"] | None = None,
        start: Params | None = None,
        tolerance: float = TOLERANCE,
    ) -> Fit:
        """Return the solution for the examples of weight 1, from the parameters `start` or zero.

        No weights: all examples. It ends where no entry of the gradient exceeds `tolerance`, or
        after ITERATIONS, not converged.
        """
        chosen = np.ones(self.n) if weights is None else weights
        data = (self.features, self.labels, self._placed(chosen / chosen.sum()))
        width = self.features.shape[1]
        zeros = {"kernel": np.zeros((width, self.classes)), "bias": np.zeros(self.classes)}
        params = start or shard(
            jax.tree.map(np.float32, zeros),
            dict.fromkeys(zeros, NamedSharding(self.mesh, PartitionSpec())),
        )
        begin, advance = _solver(self.mesh)
        state, done, gradient = begin(params), 0, np.inf
        while done < ITERATIONS and gradient > tolerance:
            numbers = np.float32(strength), np.float32(tolerance)
            params, state, steps, gradient = advance(params, state, data, *numbers)
            done, gradient = done + int(steps), float(gradient)
            watchdog.beat()
            preemption.check("while probing")
        return Fit(params, done, gradient <= tolerance)

    def hits(self, params: Params, weights: Float[np.ndarray, "n"]) -> int:
        """Return how many of the examples of weight 1 are classified correctly."""
        return int(_hits(self.mesh)(params, self.features, self.labels, self._placed(weights)))

    def predict(self, params: Params, features: Float[np.ndarray, "m d"]) -> Int[np.ndarray, "m"]:
        """Return the classes of other features, not yet standardised."""
        placed = _on_devices(self.scale(features), self.mesh)
        return np.asarray(_predict(self.mesh)(params, placed))[: len(features)]

    def _placed(self, weights: np.ndarray) -> jax.Array:
        return _on_devices(weights.astype(np.float32), self.mesh)


def _on_devices(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Split rows over all devices, with rows of zeros at the end, which have weight 0."""
    padding = np.zeros((-len(rows) % mesh.size, *rows.shape[1:]), rows.dtype)
    return shard(np.concatenate([rows, padding]), NamedSharding(mesh, PartitionSpec(AXES)))


def _logits(params: Params, features: Float[Array, "n d"]) -> Float[Array, "n c"]:
    product = jnp.matmul(features, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + params["bias"]


@functools.cache
def _solver(mesh: Mesh):
    """Return the compiled (start of the optimizer's state, up to SEGMENT iterations)."""
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=30, initial_guess_strategy="one")
    optimizer = optax.lbfgs(memory_size=10, linesearch=search)

    def advance(params, state, data, strength, tolerance):
        features, labels, weights = data

        def objective(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                _logits(params, features), labels
            )
            return weights @ losses + strength / 2 * jnp.sum(params["kernel"] ** 2)

        value_and_grad = optax.value_and_grad_from_state(objective)

        def step(carry):
            params, state, count, _ = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = optimizer.update(
                grad, state, params, value=value, grad=grad, value_fn=objective
            )
            params = optax.apply_updates(params, updates)
            return params, state, count + 1, _largest(optax.tree.get(state, "grad"))

        def unfinished(carry):
            _, _, count, gradient = carry
            return (count < SEGMENT) & (gradient > tolerance)

        start = params, state, jnp.int32(0), jnp.float32(jnp.inf)
        return jax.lax.while_loop(unfinished, step, start)

    replicated = NamedSharding(mesh, PartitionSpec())
    return (
        jax.jit(optimizer.init, out_shardings=replicated),
        jax.jit(advance, out_shardings=replicated),
    )


def _largest(tree: Any) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


@functools.cache
def _hits(mesh: Mesh):
    def count(params, features, labels, weights):
        right = _logits(params, features).argmax(axis=1) == labels
        return jnp.sum(right & (weights > 0))

    return jax.jit(count, out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _predict(mesh: Mesh):
    def predict(params, features):
        return _logits(params, features).argmax(axis=1)

    return jax.jit(predict, out_shardings=NamedSharding(mesh, PartitionSpec()))


def deal(labels: Int[np.ndarray, "n"], seed: int, folds: int = FOLDS) -> Int[np.ndarray, "n"]:
    """Deal each class's examples to the folds in turn; return the fold of each.

    A class's examples come in an order drawn from the seed and the class. Its first example is in
    the first fold, which so holds out at least one of every class.
    """
    fold = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        fold[own[permutation(len(own), seed, int(label))]] = np.arange(len(own)) % folds
    return fold


def choose_strength(
    examples: Examples, folds: Int[np.ndarray, "n"], held_out: Sequence[int]
) -> tuple[float, float]:
    """Return the strength with the most hits in the folds `held_out` in turn, and their share.

    Of equally good strengths, the strongest is taken. The path ends where PATIENCE weaker ones in a
    row were no better: the weakest take longest to fit.
    """
    starts: dict[int, Params | None] = dict.fromkeys(held_out)
    best, most, worse = STRENGTHS[0], -1, 0
    for strength in STRENGTHS:
        hits = 0
        for fold in held_out:
            fit = examples.fit(strength, folds != fold, starts[fold], ROUGH)
            hits += examples.hits(fit.params, folds == fold)
            starts[fold] = fit.params
        worse += 1
        if hits > most:
            best, most, worse = strength, hits, 0
        if worse == PATIENCE:
            break
    return best, most / int(np.isin(folds, held_out).sum())


def evaluate(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, "m"],
    mesh: Mesh,
    seed: int = 0,
) -> dict:
    """Fit a classifier to training features, and measure it on others.

    A fifth of each class is held out to choose the strength.

    Returns:
      {"accuracy": ..., "n": ..., "interval": ..., "strength": ..., "held_out_accuracy": of that
      strength, "iterations": ..., "converged": ..., "train_n": ...}.

    Raises:
      UserError: no class has two training examples.
    """
    if np.unique(train_labels, return_counts=True)[1].max() < 2:
        raise UserError(
            f"a linear probe holds out a fifth of each class to choose its strength, and the "
            f"{len(train_labels):,} training images are one of each class: give more, or --only knn"
        )
    classes = int(max(train_labels.max(), labels.max())) + 1
    examples = Examples(train, train_labels, classes, mesh)
    strength, held_out = choose_strength(examples, deal(train_labels, seed), held_out=[0])
    fit = examples.fit(strength)
    hits = int((examples.predict(fit.params, test) == labels).sum())
    return scored(hits, len(labels)) | {
        "strength": strength,
        "held_out_accuracy": held_out,
        "iterations": fit.iterations,
        "converged": fit.converged,
        "train_n": examples.n,
    }

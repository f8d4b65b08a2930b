"""The jitted train step: a pure function of the train state and the batch.

Its randomness comes from (seed, step) alone, so a resumed run repeats the uninterrupted one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vit_scale.distributed.mesh import compiler_options
from vit_scale.distributed.sharding import batch_sharding
from vit_scale.models.parameters import parameters, stop_frozen, unite
from vit_scale.tracking.metrics import TrainMetrics, norm
from vit_scale.training.objectives import Context
from vit_scale.training.optimizer import trained, update_ema
from vit_scale.training.setup import Setup
from vit_scale.training.train_state import TrainState


def jit_train_step(setup: Setup) -> jax.stages.Wrapped:
    """Return the jitted step (state, batch) -> (state, TrainMetrics); the old state is donated.

    With a teacher, its parameters are the third argument.
    """
    cfg, objective = setup.cfg, setup.objective
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    is_trained = trained(cfg.optim, setup.state.params)
    abstract = setup.mesh.abstract_mesh

    loss = of_trained(objective.loss, is_trained)
    coupled = objective.coupled and of_trained(objective.coupled, is_trained)

    def train_step(state: TrainState, batch: dict, *teacher) -> tuple[TrainState, TrainMetrics]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        augment_key, model_key = jax.random.split(key)
        if cfg.augment.until < 1:
            batch = {**batch, "late": state.step >= cfg.augment.until * cfg.steps}
        # What runs image by image splits by the mesh.
        with jax.sharding.use_abstract_mesh(abstract), jax.named_scope("augmentation"):
            examples = objective.prepare(batch, augment_key)
        own = state.objective
        if objective.teach:
            context = Context(state.step, teacher[0] if teacher else state.ema, own)
            with jax.named_scope("teacher"):
                examples, own = objective.teach(examples, context)
        rows = state.params, examples, model_key, cfg.optim.accumulate
        grads, outputs = gradients(loss, *rows, coupled)
        grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        params = unite(params, outputs["statistics"])
        decay = objective.decay(state.step) if objective.decay else cfg.optim.ema
        ema = None if state.ema is None else update_ema(state.ema, params, decay)
        new = TrainState(state.step + 1, params, opt_state, ema, own)
        finite = is_finite(outputs, grads)
        if cfg.divergence.skip:
            new = keep_finite(finite, new, state)
        # Norms of the update itself and of the old parameters: any other norm keeps a TPU from
        # updating in place, which costs a third of the optimizer's time and doubles compilation.
        change = jax.tree.map(jnp.subtract, new.params, state.params)
        rate = setup.schedule(state.step)
        before = parameters(state.params)
        metrics = TrainMetrics.of_step(outputs, grads, parameters(change), before, rate, finite)
        return new, metrics

    replicated = NamedSharding(setup.mesh, PartitionSpec())
    teacher = setup.teacher
    taught = (jax.tree.map(lambda leaf: leaf.sharding, teacher.params),) if teacher else ()
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding(setup.mesh), *taught),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(cfg.mesh, setup.mesh),
    )


def of_trained(loss: Callable, is_trained) -> Callable:
    """Return a loss of which no gradient flows to frozen parameters.

    So a linear probe costs a forward pass.
    """

    def of_trained_params(params, *rest):
        return loss(stop_frozen(is_trained, params), *rest)

    return of_trained_params


def is_finite(outputs: dict, grads) -> jax.Array:
    """Return whether every unmasked loss and every gradient is finite."""
    losses = jnp.where(outputs["mask"], outputs["loss"], 0)
    return jnp.isfinite(losses).all() & jnp.isfinite(norm(grads))


def keep_finite(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Return `new` if it is finite, else `old` with the counters of `new`."""

    def choose(a, b):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        # In float32 even for bfloat16: otherwise a TPU makes a separate pass of it.
        chosen = jnp.where(finite, a.astype(jnp.float32), b.astype(jnp.float32))
        return chosen.astype(a.dtype)

    return jax.tree.map(choose, new, old)


def gradients(
    loss: Callable, params, examples: dict, key, parts: int, coupled: Callable | None = None
) -> tuple[Any, dict]:
    """Return the gradients of the global batch's loss, and the outputs per example.

    The batch is processed in `parts` micro-batches. Part i holds the examples i, i + parts, ..., so
    that each device keeps its own examples. `loss` and `coupled` are those of `Objective`.
    """
    losses = Losses(loss, coupled)
    key, coupled_key = (key, None) if coupled is None else jax.random.split(key)
    if parts == 1:
        return jax.grad(_whole, argnums=1, has_aux=True)(losses, params, examples, key, coupled_key)
    shared, slopes = _coupled_gradients(losses, params, examples, key, coupled_key, parts)

    def part_loss(params, part):
        examples, key, slopes = part
        value, outputs = loss(params, examples, key)
        if slopes is not None:  # the chain rule: the coupled loss's gradient to the embeddings
            value += (outputs.pop("embeddings") * slopes).sum()
        return value, outputs

    def add_part(total, part):
        grads, outputs = jax.grad(part_loss, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, total, grads), outputs

    grads, more = shared or (jax.tree.map(jnp.zeros_like, params), None)
    rows = (split(examples, parts), jax.random.split(key, parts), split(slopes, parts))
    grads, outputs = jax.lax.scan(add_part, grads, rows)
    return grads, _with_coupled(unsplit(outputs), more)


class Losses(NamedTuple):
    """`Objective.loss` and `Objective.coupled`, which may be None."""

    loss: Callable
    coupled: Callable | None


def _whole(losses: Losses, params, examples: dict, key, coupled_key) -> tuple[jax.Array, dict]:
    value, outputs = losses.loss(params, examples, key)
    if losses.coupled is None:
        return value, outputs
    embeddings = outputs.pop("embeddings")
    shared, measures = losses.coupled(params, embeddings, examples["mask"], coupled_key)
    return value + shared, _with_coupled(outputs, (shared, measures))


def _coupled_gradients(losses: Losses, params, examples, key, coupled_key, parts: int):
    """Return ((gradients, (loss, measures)), slopes at the embeddings) of the coupled loss.

    The embeddings are computed once more, so that no more than a part's activations are kept (Gao
    et al. 2021, arXiv 2101.06983). Without a coupled loss both are None.
    """
    if losses.coupled is None:
        return None, None

    def embed(_, part):
        return None, losses.loss(params, *part)[1]["embeddings"]

    parted = (split(examples, parts), jax.random.split(key, parts))
    embeddings = unsplit(jax.lax.scan(embed, None, parted)[1])
    coupled = jax.value_and_grad(losses.coupled, argnums=(0, 1), has_aux=True)
    value, (grads, slopes) = coupled(params, embeddings, examples["mask"], coupled_key)
    return (grads, value), slopes


def _with_coupled(outputs: dict, more: tuple[jax.Array, dict] | None) -> dict:
    """Add the coupled loss and its measures, which are of all examples alike, to the outputs."""
    if more is None:
        return outputs
    shared, measures = more
    spread = {name: jnp.full_like(outputs["loss"], value) for name, value in measures.items()}
    of_examples = outputs.get("measures", {})
    return {**outputs, "loss": outputs["loss"] + shared, "measures": of_examples | spread}


def split(tree: Any, parts: int) -> Any:
    """Return arrays [b, ...] as [parts, b / parts, ...]; part i has the rows i, i + parts, ..."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def unsplit(tree: Any) -> Any:
    """Undo `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)

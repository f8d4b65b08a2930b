"""The jitted train step: a pure function of the train state and the batch.

Its randomness comes from (seed, step) alone, so a resumed run repeats the uninterrupted one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vit_scale.distributed.mesh import compiler_options
from vit_scale.distributed.sharding import batch_sharding
from vit_scale.models.parameters import parameters, unite
from vit_scale.tracking.metrics import TrainMetrics, norm
from vit_scale.training.optimizer import apply_updates, trained, update_ema
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

    def loss(params, examples, key):
        # No gradient flows to frozen parameters: a linear probe costs a forward pass.
        frozen = jax.lax.stop_gradient(params)
        params = jax.tree.map(lambda t, x, y: x if t else y, is_trained, params, frozen)
        return objective.loss(params, examples, key)

    def train_step(state: TrainState, batch: dict, *teacher) -> tuple[TrainState, TrainMetrics]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        augment_key, model_key = jax.random.split(key)
        if cfg.augment.until < 1:
            batch = {**batch, "late": state.step >= cfg.augment.until * cfg.steps}
        # What runs image by image splits by the mesh.
        with jax.sharding.use_abstract_mesh(abstract), jax.named_scope("augmentation"):
            examples = objective.prepare(batch, augment_key, *teacher)
        grads, outputs = gradients(loss, state.params, examples, model_key, cfg.optim.accumulate)
        grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
            params = apply_updates(state.params, updates)
        params = unite(params, outputs["statistics"])
        ema = None if state.ema is None else update_ema(state.ema, params, cfg.optim.ema)
        new, finite = TrainState(state.step + 1, params, opt_state, ema), is_finite(outputs, grads)
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


def gradients(loss: Callable, params, examples: dict, key, parts: int) -> tuple[Any, dict]:
    """Return the gradients of the global batch's loss, and the outputs per example.

    The batch is processed in `parts` micro-batches. Part i holds the examples i, i + parts, ..., so
    that each device keeps its own examples.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, examples, key)

    def split(x):
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add_part(total, part):
        grads, outputs = gradient(params, *part)
        return jax.tree.map(jnp.add, total, grads), outputs

    zeros = jax.tree.map(jnp.zeros_like, params)
    keys = jax.random.split(key, parts)
    grads, outputs = jax.lax.scan(add_part, zeros, (jax.tree.map(split, examples), keys))
    return grads, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)

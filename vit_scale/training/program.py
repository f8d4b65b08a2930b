"""What a config comes to: model, optimizer, mesh, and the one jitted training step.

Everything is checked here before anything is allocated or compiled. The step is a pure function of
the state and the batch; its randomness comes from (seed, step) alone (law 1).
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import check as check_augment
from vit_scale.augment.view import view
from vit_scale.config import base, fields, image_size, to_json
from vit_scale.distributed.mesh import (
    AnyMesh,
    abstract_mesh,
    compiler_options,
    devices_of,
    gpu_generation,
    have_cudnn,
    make_mesh,
)
from vit_scale.distributed.sharding import batch_sharding, check_batch, device_bytes, shardings
from vit_scale.errors import UserError
from vit_scale.models import convnets, flops
from vit_scale.models.build import Model, build
from vit_scale.models.parameters import count, is_statistic, named, parameters, with_statistics
from vit_scale.models.position_embeddings import check_method
from vit_scale.tracking.metrics import TrainMetrics, norm
from vit_scale.training import teachers
from vit_scale.training.objectives import Objective, make_objective
from vit_scale.training.optimizer import apply_updates, make_optimizer, trained, update_ema


class TrainState(NamedTuple):
    """Everything that changes from step to step, and nothing else."""

    step: Any  # int32, the number of finished steps
    params: Any  # and, where there is batch normalisation, its running statistics
    opt_state: Any
    ema: Any  # average of the parameters, or None


class Program(NamedTuple):
    """What a config comes to, before anything is allocated or compiled."""

    cfg: ConfigDict
    mesh: Any  # jax.sharding.Mesh, or AbstractMesh where there are no devices
    model: Model
    objective: Objective
    optimizer: Any
    schedule: Callable
    state: TrainState  # of jax.ShapeDtypeStruct, with shardings
    teacher: teachers.Teacher | None = None


def plan_program(cfg: ConfigDict, devices: Sequence[jax.Device] | int | None = None) -> Program:
    """Check everything that can be checked without data, and put the parts together.

    `devices` need not exist: those of a pod that is only compiled for will do, and a number of
    them to see what would lie where. Default: all.

    Raises UserError, with the arithmetic, for a config that can't work (law 8).
    """
    if isinstance(devices, int):
        mesh: AnyMesh = abstract_mesh(cfg.mesh, devices)
    else:
        mesh = make_mesh(cfg.mesh, devices)
    check_batch(cfg.data.batch, mesh, cfg.optim.accumulate)
    check_batch(cfg.eval.batch, mesh)
    check_augment(cfg.augment)
    check_method(cfg.init.resample)
    view(cfg.eval)
    check_counts(cfg)
    compiler_options(cfg.mesh, mesh)
    # Without this the compiler may split the tokens' width as the parameters', not the batch.
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=batch_sharding(mesh))
    model = build(cfg.model, image_size(cfg), place)
    params = jax.eval_shape(model.init, jax.random.key(0))
    check_combination(cfg, params, mesh.shape["tensor"])
    check_attention(cfg, mesh, model)
    teacher = teachers.find(cfg, mesh, place)
    objective = make_objective(model, cfg, teacher.logits if teacher else None)
    if teacher:
        cfg = copy.deepcopy(cfg)
        cfg.distill.checksum = teacher.checksum
    optimizer, schedule = make_optimizer(cfg.optim, cfg.steps, params)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        jax.eval_shape(optimizer.init, params),
        params if cfg.optim.ema else None,
    )
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )
    return Program(cfg, mesh, model, objective, optimizer, schedule, state, teacher)


HOPPER = 9.0  # its compute capability
LOWEST = {
    "steps": 1,
    "data.workers": 0,
    "eval.every": 0,
    "log.every": 1,
    "log.images": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "divergence.patience": 0,
    "divergence.rollbacks": 0,
    "watchdog.compile": 0,
    "watchdog.step": 0,
    "watchdog.storage": 0,
    "watchdog.peer": 0,
}


def check_counts(cfg: ConfigDict) -> None:
    """Raises UserError for a count below the lowest that means something."""
    given = fields(cfg)
    for name, lowest in LOWEST.items():
        if given[name] < lowest:
            raise UserError(f"{name}={given[name]} must be at least {lowest}")


def check_combination(cfg: ConfigDict, params, tensor: int = 1) -> None:
    """Raises UserError for a field that this kind of model can't do, or does not look at.

    `tensor` is the size of the mesh's axis of that name.
    """
    name = cfg.model.variant
    wanted: dict[str, tuple] = {}  # field: the one value that it can have, what else it would do
    if any(is_statistic(leaf) for leaf in named(params)):
        frozen = "would leave frozen layers' batch normalisation measuring"
        cut = "cuts the batch whose statistics batch normalisation takes"
        wanted |= {"optim.accumulate": (1, cut), "optim.freeze": ((), frozen)}
        wanted |= {"optim.train": ("all", frozen)}
    if name in convnets.SIZES:
        wanted |= {"optim.layer_decay": (1.0, "goes by a ViT's blocks")}
        known = ("variant", "classes", "dtype", *convnets.FIELDS)
        wanted |= {
            f"model.{field}": (value, "is of a ViT")
            for field, value in base().model.items()
            if field not in known
        }
        if cfg.optim.name == "muon":
            raise UserError(f"optim.name=muon knows the matrices of a ViT, not those of {name}")
        if tensor > 1:
            raise UserError(
                f"mesh.tensor={tensor} splits attention heads and MLP, of which {name} has none: "
                "set it to 1"
            )
    given = fields(cfg)
    for field, (value, why) in wanted.items():
        if given[field] != value:
            raise UserError(
                f"{field}={given[field]} {why}: with model.variant={name} it must be {value}"
            )


def check_attention(cfg: ConfigDict, mesh: AnyMesh, model: Model) -> None:
    """Raises UserError where cuDNN's attention is wanted and can't run.

    What it needs is what jax.nn.dot_product_attention refuses, once it is traced. A mesh without
    devices is believed to have the newest.
    """
    if cfg.model.attention != "cudnn":
        return
    size, devices = model.shape.size, devices_of(mesh)
    if not have_cudnn(devices):
        raise UserError(
            "model.attention=cudnn needs NVIDIA GPUs of Ampere or later, and the mesh is of "
            f"{len(devices)} x {devices[0].device_kind}: set model.attention=xla"
        )
    if cfg.model.dtype != "bfloat16":
        raise UserError(
            f"model.attention=cudnn needs model.dtype=bfloat16, not {cfg.model.dtype}: "
            "set that, or model.attention=xla"
        )
    width = size.width // size.heads
    most = 256 if all(gpu_generation(device) >= HOPPER for device in devices) else 128
    if width % 8 or width > most:
        raise UserError(
            f"model width {size.width} / {size.heads} heads = {width}: model.attention=cudnn needs "
            f"a multiple of 8, at most {most}; set model.heads, or model.attention=xla"
        )


def jit_train_step(program: Program) -> jax.stages.Wrapped:
    """(state, batch) -> (state, TrainMetrics); the state that goes in is donated.

    With a teacher, its parameters are the third argument.
    """
    cfg, objective = program.cfg, program.objective
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    is_trained = trained(cfg.optim, program.state.params)

    def loss(params, examples, key):
        # Nothing is back-propagated to frozen parameters: a linear probe costs a forward pass.
        frozen = jax.lax.stop_gradient(params)
        params = jax.tree.map(lambda t, x, y: x if t else y, is_trained, params, frozen)
        return objective.loss(params, examples, key)

    def train_step(state: TrainState, batch: dict, *teacher) -> tuple[TrainState, TrainMetrics]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        augment_key, model_key = jax.random.split(key)
        examples = objective.prepare(batch, augment_key, *teacher)
        grads, outputs = gradients(loss, state.params, examples, model_key, cfg.optim.accumulate)
        grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates)
        params = with_statistics(params, outputs["statistics"])
        ema = None if state.ema is None else update_ema(state.ema, params, cfg.optim.ema)
        new, finite = TrainState(state.step + 1, params, opt_state, ema), is_finite(outputs, grads)
        if cfg.divergence.skip:
            new = unless(finite, new, state)
        # Of the change as it was made, and of the old parameters: norms of anything else keep a TPU
        # from updating in place, which is a third of the optimizer's time, and half of compiling.
        change = jax.tree.map(jnp.subtract, new.params, state.params)
        rate = program.schedule(state.step)
        before = parameters(state.params)
        metrics = TrainMetrics.of_step(outputs, grads, parameters(change), before, rate, finite)
        return new, metrics

    replicated = NamedSharding(program.mesh, PartitionSpec())
    teacher = program.teacher
    given = (jax.tree.map(lambda leaf: leaf.sharding, teacher.params),) if teacher else ()
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding(program.mesh), *given),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(cfg.mesh, program.mesh),
    )


def is_finite(outputs: dict, grads) -> jax.Array:
    """Whether the loss of every example that counts, and every gradient, is finite."""
    losses = jnp.where(outputs["mask"], outputs["loss"], 0)
    return jnp.isfinite(losses).all() & jnp.isfinite(norm(grads))


def unless(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """`new`, or, where it is not finite, `old` at the new step: counters go on, values stay."""

    def choose(a, b):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        # In float32 also what is bfloat16: else a TPU makes a pass of its own of it.
        chosen = jnp.where(finite, a.astype(jnp.float32), b.astype(jnp.float32))
        return chosen.astype(a.dtype)

    return jax.tree.map(choose, new, old)


def gradients(loss: Callable, params, examples: dict, key, parts: int) -> tuple[Any, dict]:
    """Gradients of the whole batch's loss, in `parts` micro-batches, and the outputs per example.

    Part i holds the examples i, i + parts, ...: each device keeps the examples that it has.
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


def parameter_layout(program: Program) -> dict:
    """Where each parameter lies, and the bytes that one device holds of the whole state."""
    rows = [
        {
            "parameter": name,
            "shape": " x ".join(map(str, leaf.shape)),
            "spec": ", ".join(axis or "-" for axis in leaf.sharding.spec) or "whole",
            "bytes per device": device_bytes(leaf),
        }
        for name, leaf in named(program.state.params).items()
    ]
    state = program.state._asdict()
    held = {name: device_bytes(state[name]) for name in ("params", "opt_state", "ema")}
    return {"mesh": dict(program.mesh.shape), "parameters": rows, "bytes_per_device": held}


def summary(cfg: ConfigDict) -> dict:
    """What a config comes to, on no particular devices: sizes and costs, and every field.

    Raises UserError for fields that don't go together.
    """
    model = build(cfg.model, image_size(cfg))
    params = jax.eval_shape(model.init, jax.random.key(0))
    check_combination(cfg, params)
    return {
        "parameters": count(params),
        "tokens": model.shape.tokens,
        "flops_per_image": flops.training_flops(model.macs),
        "global_batch": cfg.data.batch,
        "steps": cfg.steps,
        "config": to_json(cfg),
    }

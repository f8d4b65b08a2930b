"""Set up training from a config: mesh, model, objective, optimizer, and the abstract train state.

Nothing is allocated or compiled here. The config is validated first (validation.py).
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vit_scale.config import image_size, to_json
from vit_scale.data import pinned
from vit_scale.distributed.mesh import AnyMesh, abstract_mesh, make_mesh
from vit_scale.distributed.sharding import batch_sharding, device_bytes, shardings
from vit_scale.models import flops
from vit_scale.models.build import Model, build
from vit_scale.models.lora import adapted
from vit_scale.models.parameters import OBJECTIVE, count, named, parameters
from vit_scale.pretrained import with_commit, with_source_model
from vit_scale.runs.resume import resumed_config
from vit_scale.training import objectives
from vit_scale.training.objectives import Objective, make_objective
from vit_scale.training.objectives.crop_encoder import plain_model
from vit_scale.training.objectives.teacher import Teacher, open_teacher, with_checksum
from vit_scale.training.optimizer import check_trained, make_optimizer, trained
from vit_scale.training.train_state import TrainState
from vit_scale.training.validation import check_model, validate

OWN = 0x6F776E  # folded into the key of initialisation, for the objective's parameters


class Setup(NamedTuple):
    """A config's training program, before anything is allocated or compiled."""

    cfg: ConfigDict
    mesh: Any  # jax.sharding.Mesh, or AbstractMesh where there are no devices
    model: Model
    objective: Objective
    optimizer: Any  # optax.GradientTransformation
    schedule: Callable  # (step) -> learning rate
    state: TrainState  # of jax.ShapeDtypeStruct, with shardings
    teacher: Teacher | None = None

    @property
    def flops_per_image(self) -> int:
        """FLOPs of training on one image."""
        return count_training_flops(self.cfg, self.model, self.objective, self.teacher)


def as_trained(cfg: ConfigDict, workdir: str | os.PathLike) -> ConfigDict:
    """Return `cfg` as `workdir` is trained with it, which its run.json records.

    With what a run there began with (`resumed_config`), and with what the config leaves to its
    sources: revisions, a teacher's checksum, an architecture.
    """
    return with_source_model(with_commit(pinned(with_checksum(resumed_config(cfg, workdir)))))


def make_setup(cfg: ConfigDict, devices: Sequence[jax.Device] | int | None = None) -> Setup:
    """Validate `cfg` and build what trains it.

    Args:
      cfg: the full config; it is not changed.
      devices: the devices to train on (default: all). They may be those of a topology that is only
        compiled for; a number of devices is enough to see the shardings.

    Raises:
      UserError: the config can't work, with the arithmetic.
    """
    cfg = with_source_model(cfg)
    if isinstance(devices, int):
        mesh: AnyMesh = abstract_mesh(cfg.mesh, devices)
    else:
        mesh = make_mesh(cfg.mesh, devices)
    validate(cfg, mesh)
    # Without this constraint the compiler may split the width of the tokens like the parameters,
    # instead of the batch.
    constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=batch_sharding(mesh))
    model = adapted(build(cfg.model, image_size(cfg), constrain), cfg.lora)
    teacher = open_teacher(cfg, mesh, constrain)
    objective = make_objective(model, cfg, teacher.logits if teacher else None)
    params = abstract_params(model, objective)
    check_trained(cfg.optim, params)
    optimizer, schedule = make_optimizer(cfg.optim, cfg.steps, params, objective.held)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        jax.eval_shape(optimizer.init, params),
        params if cfg.optim.ema or objective.decay else None,
        jax.eval_shape(lambda: objective.state),
    )
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )
    return Setup(cfg, mesh, model, objective, optimizer, schedule, state, teacher)


def init_params(model: Model, objective: Objective, key: Array) -> dict:
    """Return random parameters of the model, and those of the objective, if it has any."""
    params = model.init(key)
    if objective.init is None:
        return params
    return {**params, OBJECTIVE: objective.init(jax.random.fold_in(key, OWN))}


def abstract_params(model: Model, objective: Objective) -> dict:
    """Return what `init_params` returns, as jax.ShapeDtypeStruct."""
    if objective.init is None:
        return model.abstract_params
    own = jax.eval_shape(objective.init, jax.random.key(0))
    return {**model.abstract_params, OBJECTIVE: own}


def count_training_flops(
    cfg: ConfigDict, model: Model, objective: Objective, teacher: Teacher | None = None
) -> int:
    """Return the FLOPs of training on one image, with a teacher's forward pass if there is one.

    Of objectives with labels, frozen parameters save their share of the backward pass. What the
    optimizer does once a step is not counted.
    """
    taught = 2 * teacher.macs if teacher else 0
    if objective.count_flops:
        return taught + objective.count_flops()
    return taught + flops.training_flops(model.training_macs, _backward_share(cfg, model))


def _backward_share(cfg: ConfigDict, model: Model) -> float:
    """Return the share of the backward pass's MACs that the trained parameters need."""
    if all(parameters(trained(cfg.optim, model.abstract_params))):
        return 1.0
    plain = adapted(plain_model(cfg)[0], cfg.lora)
    params = plain.abstract_params
    everything = jax.tree.map(lambda leaf: True, params)
    nothing = jax.tree.map(lambda leaf: False, params)

    def macs(flags: dict, images: int) -> int:
        pixels = jax.ShapeDtypeStruct((images, *image_size(cfg), 3), jnp.float32)
        return flops.count_gradient_macs(plain.apply, flags, params, pixels)

    def backward(flags: dict) -> int:
        # The difference of two batch sizes leaves out what is done once a step: merging adapters.
        return (macs(flags, 2) - macs(flags, 1)) - (macs(nothing, 2) - macs(nothing, 1))

    return backward(trained(cfg.optim, params)) / backward(everything)


def parameter_layout(setup: Setup) -> dict:
    """Return the sharding of each parameter, and the bytes of the train state on one device."""
    rows = [
        {
            "parameter": name,
            "shape": " x ".join(map(str, leaf.shape)),
            "spec": ", ".join(axis or "-" for axis in leaf.sharding.spec) or "whole",
            "bytes per device": device_bytes(leaf),
        }
        for name, leaf in named(setup.state.params).items()
    ]
    state = setup.state._asdict()
    sizes = {name: device_bytes(state[name]) for name in ("params", "opt_state", "ema")}
    return {"mesh": dict(setup.mesh.shape), "parameters": rows, "bytes_per_device": sizes}


def summary(cfg: ConfigDict) -> dict:
    """Describe a config independently of devices: sizes, costs, and every field.

    A teacher is not read: its forward pass is not in `flops_per_image`.

    Raises UserError for fields that can't be combined.
    """
    cfg = with_source_model(cfg)
    check_model(cfg)
    if cfg.objective in objectives.SELF_SUPERVISED or cfg.objective not in objectives.OBJECTIVES:
        objectives.check(cfg)
    model = adapted(build(cfg.model, image_size(cfg)), cfg.lora)
    objective = make_objective(model, cfg)
    check_trained(cfg.optim, abstract_params(model, objective))
    return {
        "parameters": count(model.abstract_params),
        "tokens": model.shape.tokens,
        "flops_per_image": count_training_flops(cfg, model, objective),
        "global_batch": cfg.data.batch,
        "steps": cfg.steps,
        "config": to_json(cfg),
    }

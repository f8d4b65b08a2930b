"""Compile the training step that `train` would run, for a slice that is not there.

`python -m vit_scale.plan.step` is one compilation in a process of its own: it reads a request, one
line of JSON, and prints what it found as another. So the compiler's environment is set before it
is loaded, its log is on standard error, and its memory is given back.

    {"config": "vit_large_imagenet", "overrides": ["optim.lr=1e-3"], "topology": "v5e:16x16",
     "slices": 1}
"""

import json
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.data import delivered_size
from vit_scale.distributed.sharding import batch_sharding, device_bytes
from vit_scale.errors import UserError
from vit_scale.plan import topology
from vit_scale.plan.estimate import by_kind, parts
from vit_scale.plan.hlo import Program as Hlo
from vit_scale.training.setup import Setup, make_setup, training_flops
from vit_scale.training.train_step import jit_train_step


def compile_step(cfg: ConfigDict, where: topology.Topology) -> dict:
    """What the step of `cfg` needs and, where it fits, is predicted to take; bytes per device.

    Raises UserError for a config that can't work on so many devices.
    """
    devices = topology.devices(where)
    setup = make_setup(cfg, devices)
    found = describe(setup, where)
    start = time.monotonic()
    try:
        step, teacher = jit_train_step(setup), setup.teacher
        given = () if teacher is None else (teacher.params,)
        compiled = step.lower(setup.state, batch_shapes(setup), *given).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"the compiler fails: {str(error).splitlines()[0]}") from error
        return found | {"fits": False, "peak_bytes": needed_bytes(str(error))}
    memory: Any = compiled.memory_analysis()
    cost = Hlo(compiled.as_text() or "").cost()
    return found | {
        "fits": True,
        "peak_bytes": memory.peak_memory_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "compile_seconds": time.monotonic() - start,
        **parts(cost, where),
        "collectives": by_kind(cost.collectives),
        "unpriced_kernels": cost.unpriced,
    }


def describe(setup: Setup, where: topology.Topology) -> dict:
    """What is known before anything is compiled."""
    cfg, state = setup.cfg, setup.state
    return {
        "topology": where.name,
        "slices": where.slices,
        "chips": where.chips,
        "devices": where.devices,
        "device_kind": setup.mesh.devices.flat[0].device_kind,
        "mesh": dict(setup.mesh.shape),
        "global_batch": cfg.data.batch,
        "steps": cfg.steps,
        "flops_per_step": cfg.data.batch * training_flops(setup.model, cfg.model.classes),
        "hbm_bytes": int(where.tpu.hbm_gib * topology.GIB),
        "parameter_bytes": device_bytes(state.params),
        "optimizer_bytes": device_bytes(state.opt_state),
        "ema_bytes": device_bytes(state.ema),
    }


def batch_shapes(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch as the data pipeline delivers it: uint8, at the stored size."""
    cfg, sharding = setup.cfg, batch_sharding(setup.mesh)
    size = cfg.data.batch

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {
        "image": array((size, *delivered_size(cfg.data), 3), jnp.uint8),
        "label": array((size,), jnp.int32),
        "mask": array((size,), jnp.bool_),
    }


def needed_bytes(message: str) -> int | None:
    """What the compiler says a program needs that exceeds a device's memory."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of", message)
    return int(float(found[1]) * units[found[2]]) if found else None


def main() -> None:
    request = json.loads(sys.stdin.readline())
    try:
        cfg = config.load(request["config"], request["overrides"])
        answer = compile_step(cfg, topology.parse(request["topology"], request["slices"]))
    except UserError as error:
        answer = {"error": str(error), "code": error.code}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

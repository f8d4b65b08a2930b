"""Compile the train step that `train` would run, for a slice that need not exist.

`python -m vit_scale.plan.step` compiles once, in a process of its own, so that the compiler's
environment is set before libtpu is loaded and its memory is freed afterwards. It reads a request,
one line of JSON, and prints its result as another; the compiler logs to standard error.

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
from vit_scale.augment.random_crop import MultiCrop, file_crop
from vit_scale.data import are_files, delivered_size
from vit_scale.data.targets import CLASSES, VALUE
from vit_scale.distributed.sharding import batch_sharding, device_bytes
from vit_scale.errors import UserError
from vit_scale.plan import topology
from vit_scale.plan.estimate import by_kind, parts
from vit_scale.plan.hlo import Program as Hlo
from vit_scale.training.setup import Setup, make_setup
from vit_scale.training.train_step import jit_train_step


def compile_step(cfg: ConfigDict, where: topology.Topology) -> dict:
    """Compile the step of `cfg`; return its memory per device and, if it fits, its predicted times.

    Raises UserError for a config that can't work on that many devices.
    """
    devices = topology.devices(where)
    setup = make_setup(cfg, devices)
    description = describe(setup, where)
    start = time.monotonic()
    try:
        step, teacher = jit_train_step(setup), setup.teacher
        teacher_params = () if teacher is None else (teacher.params,)
        compiled = step.lower(setup.state, batch_shapes(setup), *teacher_params).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"the compiler failed: {str(error).splitlines()[0]}") from error
        return description | {"fits": False, "peak_bytes": needed_bytes(str(error))}
    memory: Any = compiled.memory_analysis()
    cost = Hlo(compiled.as_text() or "").cost()
    return description | {
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
    """Return what is known of a step before it is compiled."""
    cfg, state = setup.cfg, setup.state
    return {
        "topology": where.name,
        "slices": where.slices,
        "chips": where.chips,
        "devices": where.devices,
        "hosts": len({device.process_index for device in setup.mesh.devices.flat}),
        "device_kind": setup.mesh.devices.flat[0].device_kind,
        "mesh": dict(setup.mesh.shape),
        "global_batch": cfg.data.batch,
        "decodes": are_files(cfg.data) and not cfg.data.memory,
        "steps": cfg.steps,
        "flops_per_step": cfg.data.batch * setup.flops_per_image,
        "hbm_bytes": int(where.tpu.hbm_gib * topology.GIB),
        "parameter_bytes": device_bytes(state.params),
        "optimizer_bytes": device_bytes(state.opt_state),
        "ema_bytes": device_bytes(state.ema),
    }


def batch_shapes(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global batch as the data pipeline delivers it: uint8 images."""
    cfg, sharding = setup.cfg, batch_sharding(setup.mesh)
    size = cfg.data.batch

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    multi = file_crop(cfg)
    several = (multi.globals,) if isinstance(multi, MultiCrop) else ()
    shapes = {
        "image": array((size, *several, *delivered_size(cfg.data), 3), jnp.uint8),
        "label": array((size,), jnp.int32),
        "mask": array((size,), jnp.bool_),
    }
    if isinstance(multi, MultiCrop) and multi.locals:
        shapes["local"] = array((size, multi.locals, *multi.local_size, 3), jnp.uint8)
    if cfg.data.target in (CLASSES, VALUE):
        shapes["target"] = array((size, cfg.model.classes), jnp.float32)
    return shapes


def needed_bytes(message: str) -> int | None:
    """Parse the memory that a program needs from the compiler's out-of-memory error."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    size = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    size = size or re.search(r"Used ([\d.]+)([KMGT]) of", message)
    return int(float(size[1]) * units[size[2]]) if size else None


def main() -> None:
    request = json.loads(sys.stdin.readline())
    try:
        cfg = config.load(request["config"], request["overrides"])
        result = compile_step(cfg, topology.parse(request["topology"], request["slices"]))
    except UserError as error:
        result = {"error": str(error), "code": error.code}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

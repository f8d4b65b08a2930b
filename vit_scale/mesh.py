"""Which device holds what: the mesh, and one table from parameter names to mesh axes.

The model knows nothing of devices. `shardings` gives every leaf of a parameter tree, and of any
tree whose paths end with parameter names (optimizer state, EMA), its place; XLA inserts the
communication.

    data     devices that split the batch and each hold all parameters
    fsdp     devices that split the batch, and the parameters with them
    tensor   devices that split attention heads and MLP
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from vit_scale.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# The end of a parameter's name -> the mesh axis of each of its dimensions. What is not listed
# (norms, [CLS], probe, biases of width d, scalars) is small, and whole on every device.
RULES = {
    r"(qkv|kv)/kernel": ("fsdp", None, "tensor", None),  # d 3 k e
    r"(qkv|kv)/bias": (None, "tensor", None),  # 3 k e
    r"query/kernel": ("fsdp", "tensor", None),  # d k e
    r"query/bias": ("tensor", None),  # k e
    r"out/kernel": ("tensor", None, "fsdp"),  # k e d
    r"mlp/up/kernel": ("fsdp", "tensor"),  # d f
    r"mlp/up/bias": ("tensor",),  # f
    r"mlp/down/kernel": ("tensor", "fsdp"),  # f d
    r"embed/kernel": (None, None, None, "fsdp"),  # p p 3 d
    r"posemb": (None, None, "fsdp"),  # h w d
    r"head/kernel": ("fsdp", None),  # d c
}


def make_mesh(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a `mesh` block over `devices` (default: all), with axes data, fsdp and tensor.

    Raises:
      UserError: the sizes don't multiply to the number of devices, with the product.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: cfg[axis] for axis in AXES}
    product = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {product}: a size is at least 1, or -1 for the rest of the devices")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise UserError(f"mesh {product}: only one size can be -1, the rest of the devices")
    given = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % given:
        raise UserError(f"mesh {product}: {len(devices)} devices are not divisible by {given}")
    if not rest and given != len(devices):
        raise UserError(f"mesh {product} = {given} devices, but there are {len(devices)}")
    sizes |= dict.fromkeys(rest, len(devices) // given)
    # Auto: the compiler propagates shardings. The default would ask the model to state them.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """A NamedSharding for each leaf of parameters, optimizer state or EMA (arrays or their shapes).

    A leaf is known by the end of its path. Neither a leading layer axis (stacked blocks) is split,
    nor a dimension that its mesh axis doesn't divide: 3 heads over tensor=2 are whole everywhere.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def partition(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The mesh axis of each dimension of one leaf; `sizes` are the mesh's."""
    for pattern, axes in RULES.items():
        stacked = len(shape) - len(axes)
        # State of another rank under a parameter's name is no copy of it: leave that whole.
        if stacked in (0, 1) and re.search(rf"(^|/){pattern}$", name):
            axes = (None,) * stacked + axes
            fits = [
                axis if axis and sizes[axis] > 1 and size % sizes[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            while (
                fits and fits[-1] is None
            ):  # jax compares P("fsdp") and P("fsdp", None) as unequal
                fits.pop()
            return PartitionSpec(*fits)
    return PartitionSpec()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [b, ...]: the batch is split over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless each device gets as many images of each micro-batch as the others."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if batch < 1 or batch % (data * fsdp):
        raise UserError(
            f"global batch {batch} is not divisible by {data * fsdp} data shards "
            f"({data} data x {fsdp} fsdp)"
        )
    if batch % (data * fsdp * accumulate):
        raise UserError(
            f"global batch {batch} is not divisible by {data * fsdp * accumulate} = "
            f"{accumulate} micro-batches x {data} data x {fsdp} fsdp"
        )


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [b, ...] on the devices, from this process's contiguous part of each."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()
    }

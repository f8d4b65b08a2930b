"""Sharding rules: one table from parameter names to mesh axes, and arrays sharded by it.

The model knows nothing of devices. `shardings` gives a NamedSharding to every leaf of a parameter
tree, and of any tree whose paths end with parameter names (optimizer state, EMA); XLA inserts the
communication.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from vit_scale.distributed.mesh import AnyMesh
from vit_scale.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))

# The end of a parameter's name -> the mesh axis of each of its dimensions. Whatever is not listed
# (norms, [CLS], probe, biases of width d, scalars) is small, and replicated.
RULES = {
    r"(query|key|value)/kernel": ("fsdp", "tensor", None),  # d k e
    r"(query|key|value)/bias": ("tensor", None),  # k e
    r"out/kernel": ("tensor", None, "fsdp"),  # k e d
    r"mlp/(up|gate)/kernel": ("fsdp", "tensor"),  # d f
    r"mlp/(up|gate)/bias": ("tensor",),  # f
    r"mlp/down/kernel": ("tensor", "fsdp"),  # f d
    r"attention/frequencies": (None, "tensor", None),  # 2 k e/2
    r"attention/norm/(scale|bias)": ("tensor",),  # d: the heads one after another
    r"mlp/norm/(scale|bias)": ("tensor",),  # f
    # Of adapters, whose product is split like the kernel without any communication.
    r"(query|key|value|mlp/(up|gate))/lora_a": ("fsdp", None),  # d r
    r"(query|key|value)/lora_b": (None, "tensor", None),  # r k e
    r"out/lora_a": ("tensor", None, None),  # k e r
    r"mlp/(up|gate)/lora_b": (None, "tensor"),  # r f
    r"mlp/down/lora_a": ("tensor", None),  # f r
    r"(out|mlp/down)/lora_b": (None, "fsdp"),  # r d
    r"embed/kernel": (None, None, None, "fsdp"),  # p p 3 d
    r"posemb": (None, None, "fsdp"),  # h w d
    r"(head(_dist)?|representation)/kernel": ("fsdp", None),  # d c
    r"(\w*conv\d*|convs/\d+)/kernel": (None, None, None, "fsdp"),  # p p i o
    r"dense/\d+/kernel": ("fsdp", None),  # i o
    # Of objectives: a decoder's first and last layer, and the layers of projection heads.
    r"(project|predict)/kernel": ("fsdp", None),  # d w, w p
    r"layers/\d+/kernel": ("fsdp", None),  # i o
    r"prototypes/kernel": ("fsdp", "tensor"),  # w c
}


def shardings(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """Return a NamedSharding for each leaf of parameters, optimizer state or EMA.

    The end of a leaf's path selects its rule; leaves are arrays or their shapes. Neither a leading
    layer axis (stacked blocks) is split, nor a dimension that its mesh axis doesn't divide. Then
    fsdp takes the longest other dimension that it divides; tensor splits whole heads or nothing
    (3 heads over tensor=2 are replicated).
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def partition_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Return the mesh axis of each dimension of the leaf `name`; `sizes` are the mesh's."""
    for pattern, axes in RULES.items():
        stacked = len(shape) - len(axes)
        # State of another rank under a parameter's name is not shaped like it: replicate that.
        if stacked in (0, 1) and re.search(rf"(^|/){pattern}$", name):
            divisible = divisible_axes(axes, shape[stacked:], sizes)
            return PartitionSpec(*(None,) * stacked, *divisible) if divisible else PartitionSpec()
    return PartitionSpec()


def divisible_axes(
    axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> list[str | None]:
    """Return `axes` without those of size 1 and those that don't divide their dimension."""
    divisible = [
        axis if axis and sizes[axis] > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    if "fsdp" in axes and "fsdp" not in divisible and sizes["fsdp"] > 1:
        free = [
            i for i, axis in enumerate(divisible) if axis is None and shape[i] % sizes["fsdp"] == 0
        ]
        if free:
            divisible[max(free, key=lambda i: shape[i])] = "fsdp"
    while divisible and divisible[-1] is None:  # jax: P("fsdp") != P("fsdp", None)
        divisible.pop()
    return divisible


def device_bytes(tree: PyTree) -> int:
    """Return the bytes of `tree`, of sharded arrays or shapes, that each device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def shard(tree: PyTree, targets: PyTree) -> PyTree:
    """Put `tree`, which every host holds whole, on the devices with the shardings `targets`.

    Each device receives its own part only; a leaf that has its sharding already is returned as is.
    """

    def put(leaf, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, targets)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Return the sharding of arrays [b, ...]: the batch is split over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def check_batch(field: str, batch: int, mesh: AnyMesh, accumulate: int = 1) -> None:
    """Raise UserError unless each micro-batch divides evenly over the mesh.

    `field` is the config's, and `batch` its value: images of a global batch.
    """
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if batch < 1:
        raise UserError(f"{field}={batch} must be at least 1")
    if batch % (data * fsdp):
        raise UserError(
            f"{field}={batch} is not divisible by {data * fsdp} data shards "
            f"({data} data x {fsdp} fsdp)"
        )
    if batch % (data * fsdp * accumulate):
        raise UserError(
            f"{field}={batch} is not divisible by {data * fsdp * accumulate} = "
            f"{accumulate} micro-batches x {data} data x {fsdp} fsdp"
        )


def batch_rows(batch: int, mesh: Mesh) -> Int[np.ndarray, "n"]:
    """Return the rows of a global batch that this process's devices hold, in rising order.

    Hosts that differ only on the tensor axis hold the same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    parts = {index[0].indices(batch) for index in indices.values() if index}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def shard_batch(local: Mapping[str, Any], mesh: Mesh, size: int) -> dict[str, jax.Array]:
    """Return global arrays [size, ...] on the devices, from this process's `batch_rows` of each."""
    sharding, rows = batch_sharding(mesh), batch_rows(size, mesh)

    def put(part: np.ndarray) -> jax.Array:
        def device_part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index
            first, last, _ = index[0].indices(size)
            return part[np.searchsorted(rows, first) : np.searchsorted(rows, last)]

        return jax.make_array_from_callback((size, *part.shape[1:]), sharding, device_part)

    return {name: put(part) for name, part in local.items()}

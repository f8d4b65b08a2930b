"""Which device holds what: the mesh, and one table from parameter names to mesh axes.

The model knows nothing of devices. `shardings` gives every leaf of a parameter tree, and of any
tree whose paths end with parameter names (optimizer state, EMA), its place; XLA inserts the
communication.

    data     devices that split the batch and each hold all parameters
    fsdp     devices that split the batch, and the parameters with them
    tensor   devices that split attention heads and MLP

Each axis is so many devices of a slice, whose links (ICI) are fast, times so many slices (DCN).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree
from ml_collections import ConfigDict

from vit_scale.errors import UserError

AXES = ("data", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh
# Auto: the compiler propagates shardings. Explicit would ask the model to state them.
AUTO = (AxisType.Auto,) * len(AXES)
BATCH = PartitionSpec(("data", "fsdp"))
CUDNN = 8.0  # the compute capability from which on cuDNN's attention runs: Ampere

# The end of a parameter's name -> the mesh axis of each of its dimensions. What is not listed
# (norms, [CLS], probe, biases of width d, scalars) is small, and whole on every device.
RULES = {
    r"(query|key|value)/kernel": ("fsdp", "tensor", None),  # d k e
    r"(query|key|value)/bias": ("tensor", None),  # k e
    r"out/kernel": ("tensor", None, "fsdp"),  # k e d
    r"mlp/up/kernel": ("fsdp", "tensor"),  # d f
    r"mlp/up/bias": ("tensor",),  # f
    r"mlp/down/kernel": ("tensor", "fsdp"),  # f d
    r"embed/kernel": (None, None, None, "fsdp"),  # p p 3 d
    r"posemb": (None, None, "fsdp"),  # h w d
    r"(head(_dist)?|representation)/kernel": ("fsdp", None),  # d c
    r"(\w*conv\d*|convs/\d+)/kernel": (None, None, None, "fsdp"),  # p p i o
    r"dense/\d+/kernel": ("fsdp", None),  # i o
}


def make_mesh(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a `mesh` block over `devices` (default: all), with axes data, fsdp and tensor.

    An axis has `cfg[axis]` devices of each slice times `cfg["slices_" + axis]` slices; neighbours
    on an axis are neighbours in a slice first, whose links are fast.

    Raises:
      UserError: the sizes don't multiply to the number of devices, with the product.
    """
    devices = jax.devices() if devices is None else devices
    slices, by_process = count_slices(devices, cfg)
    inside, across = axis_sizes(cfg, len(devices), slices)
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:
        array = mesh_utils.create_hybrid_device_mesh(
            inside, across, process_is_granule=by_process, **options
        )
    else:
        array = mesh_utils.create_device_mesh(inside, **options)
    return Mesh(array, AXES, axis_types=AUTO)


def abstract_mesh(cfg: ConfigDict, devices: int) -> AbstractMesh:
    """What `make_mesh` makes of so many devices: says where everything would lie, without any."""
    slices = math.prod(max(cfg[f"slices_{axis}"], 1) for axis in AXES)
    inside, across = axis_sizes(cfg, devices, slices)
    return AbstractMesh(
        tuple(map(math.prod, zip(inside, across, strict=True))), AXES, axis_types=AUTO
    )


def devices_of(mesh: AnyMesh) -> tuple[jax.Device, ...]:
    """The devices of a mesh, none of one that has none."""
    return () if isinstance(mesh, AbstractMesh) else tuple(mesh.devices.flat)


def gpu_generation(device: jax.Device) -> float:
    """The compute capability of an NVIDIA GPU, such as 8.0 of an A100; 0 of what is none."""
    text = str(getattr(device, "compute_capability", "")) if device.platform == "gpu" else ""
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else 0.0


def have_cudnn(devices: Iterable[jax.Device]) -> bool:
    """Whether cuDNN's attention (model.attention=cudnn) runs on all of them."""
    return all(gpu_generation(device) >= CUDNN for device in devices)


def count_slices(devices: Sequence[jax.Device], cfg: ConfigDict) -> tuple[int, bool]:
    """How many groups of devices the slow network joins, and whether each is one process.

    TPUs say which slice they are of. Elsewhere all are one slice, unless the config splits an axis
    over slices: then each process (a machine with GPUs) is one.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 or all(cfg[f"slices_{axis}"] in (1, -1) for axis in AXES):
        return len(slices), False
    return len({device.process_index for device in devices}), True


def axis_sizes(
    cfg: ConfigDict, devices: int, slices: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each axis: its devices in a slice, and its slices. Raises UserError with the products."""
    across = resolve("slices", {axis: cfg[f"slices_{axis}"] for axis in AXES}, slices)
    if devices % slices:
        raise UserError(f"{devices} devices can't be {slices} slices of the same size")
    inside = resolve("devices", {axis: cfg[axis] for axis in AXES}, devices // slices)
    return tuple(inside.values()), tuple(across.values())


def resolve(what: str, sizes: Mapping[str, int], there: int) -> dict[str, int]:
    """`sizes` of the axes with -1 replaced by what is left of `there` devices or slices.

    Raises UserError, with the product, where they don't multiply to it.
    """
    name = "mesh" if what == "devices" else f"mesh {what}"
    product = f"{name} " + " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{product}: a size is at least 1, or -1 for the rest of the {what}")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise UserError(f"{product}: only one size can be -1, the rest of the {what}")
    given = math.prod(size for size in sizes.values() if size != -1)
    if rest and there % given:
        raise UserError(f"{product}: {there} {what} are not divisible by {given}")
    if not rest and given != there:
        raise UserError(f"{product} = {given} {what}, but there are {there}")
    return {**sizes, **dict.fromkeys(rest, there // given)}


def shardings(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """A NamedSharding for each leaf of parameters, optimizer state or EMA (arrays or their shapes).

    A leaf is known by the end of its path. Neither a leading layer axis (stacked blocks) is split,
    nor a dimension that its mesh axis doesn't divide. Then fsdp takes the longest other dimension
    that it divides; tensor splits whole heads or nothing (3 heads over tensor=2 are whole).
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
            fits = fit(axes, shape[stacked:], sizes)
            return PartitionSpec(*(None,) * stacked, *fits) if fits else PartitionSpec()
    return PartitionSpec()


def fit(
    axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> list[str | None]:
    """`axes` without those that have one device or don't divide their dimension of `shape`."""
    fits = [
        axis if axis and sizes[axis] > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    if "fsdp" in axes and "fsdp" not in fits and sizes["fsdp"] > 1:
        free = [i for i, axis in enumerate(fits) if axis is None and shape[i] % sizes["fsdp"] == 0]
        if free:
            fits[max(free, key=lambda i: shape[i])] = "fsdp"
    while fits and fits[-1] is None:  # jax compares P("fsdp") and P("fsdp", None) as unequal
        fits.pop()
    return fits


def device_bytes(tree: PyTree) -> int:
    """Bytes that each device holds of a tree of placed arrays or of their shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def place(tree: PyTree, places: PyTree) -> PyTree:
    """`tree`, whole on every host, as arrays with the shardings `places`.

    A device is sent its part, and what lies in its place already stays there.
    """

    def put(leaf, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, places)


def compiler_options(cfg: ConfigDict, mesh: AnyMesh) -> dict[str, str] | None:
    """The options of a `mesh` block for the compiler of a mesh of TPUs; None for other devices.

    Raises UserError for one that is not FLAG=VALUE.
    """
    for option in cfg.compiler:
        if not re.fullmatch(r"\w+=\S+", option):
            raise UserError(f"mesh.compiler: {option!r} is not FLAG=VALUE, such as xla_flag=true")
    if isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "tpu":
        return None
    return dict(option.split("=", 1) for option in cfg.compiler)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Of arrays [b, ...]: the batch is split over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def check_batch(batch: int, mesh: AnyMesh, accumulate: int = 1) -> None:
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


def batch_rows(batch: int, mesh: Mesh) -> Int[np.ndarray, "n"]:
    """The rows of a global batch that this process's devices hold, rising; all of them on one host.

    Hosts that differ only on the tensor axis hold the same rows.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    parts = {index[0].indices(batch) for index in places.values() if index}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def put_batch(batch: Mapping[str, Any], mesh: Mesh, size: int) -> dict[str, jax.Array]:
    """Global arrays [size, ...] on the devices, from this process's `batch_rows` of each."""
    sharding, rows = batch_sharding(mesh), batch_rows(size, mesh)

    def put(part: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index
            first, last, _ = index[0].indices(size)
            return part[np.searchsorted(rows, first) : np.searchsorted(rows, last)]

        return jax.make_array_from_callback((size, *part.shape[1:]), sharding, shard)

    return {name: put(part) for name, part in batch.items()}

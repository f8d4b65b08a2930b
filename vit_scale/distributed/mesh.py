"""The device mesh: its axes, their sizes, and the compiler's options.

    data     devices that split the batch and each hold all parameters
    fsdp     devices that split the batch, and the parameters with them
    tensor   devices that split attention heads and MLP

Each axis is a number of devices in a slice, which fast links (ICI) join, times a number of slices,
which the data centre's network (DCN) joins.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from vit_scale.distributed import multihost
from vit_scale.errors import UserError

AXES = ("data", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh
# Auto: the compiler propagates shardings. Explicit would ask the model to state them.
AUTO = (AxisType.Auto,) * len(AXES)
CUDNN = 8.0  # lowest compute capability that runs cuDNN's attention: Ampere


def make_mesh(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the mesh of a config's `mesh` block over `devices` (default: all of them).

    An axis spans `cfg[axis]` devices of each slice times `cfg["slices_" + axis]` slices. Neighbours
    on an axis are in the same slice wherever possible, because links within a slice are fast.

    Raises UserError, with the product, where the sizes don't multiply to the number of devices.
    """
    devices = multihost.open_devices() if devices is None else devices
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
    """Build the mesh that `make_mesh` would build of `devices` devices, without having any."""
    slices = math.prod(max(cfg[f"slices_{axis}"], 1) for axis in AXES)
    inside, across = axis_sizes(cfg, devices, slices)
    return AbstractMesh(
        tuple(map(math.prod, zip(inside, across, strict=True))), AXES, axis_types=AUTO
    )


def devices_of(mesh: AnyMesh) -> tuple[jax.Device, ...]:
    """Return the devices of a mesh; an abstract mesh has none."""
    return () if isinstance(mesh, AbstractMesh) else tuple(mesh.devices.flat)


def gpu_generation(device: jax.Device) -> float:
    """Return an NVIDIA GPU's compute capability (8.0 for an A100), and 0 for any other device."""
    text = str(getattr(device, "compute_capability", "")) if device.platform == "gpu" else ""
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else 0.0


def have_cudnn(devices: Iterable[jax.Device]) -> bool:
    """Tell whether cuDNN's attention (model.attention=cudnn) runs on all of `devices`."""
    return all(gpu_generation(device) >= CUDNN for device in devices)


def count_slices(devices: Sequence[jax.Device], cfg: ConfigDict) -> tuple[int, bool]:
    """Return the number of slices, and whether a slice is one process.

    A TPU device knows its slice. Other devices form one slice, unless the config splits an axis
    over slices: then each process, such as a machine with GPUs, is a slice.
    """
    known = devices[0].platform == "tpu"
    slices = {getattr(device, "slice_index", 0) if known else 0 for device in devices}
    if len(slices) > 1 or all(cfg[f"slices_{axis}"] in (1, -1) for axis in AXES):
        return len(slices), False
    return len({device.process_index for device in devices}), True


def axis_sizes(
    cfg: ConfigDict, devices: int, slices: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the devices per slice and the number of slices along each axis.

    Raises UserError where they don't multiply to `devices` and `slices`.
    """
    across = resolve_sizes("slices", {axis: cfg[f"slices_{axis}"] for axis in AXES}, slices)
    if devices % slices:
        raise UserError(f"{devices} devices cannot be divided into {slices} equal slices")
    inside = resolve_sizes("devices", {axis: cfg[axis] for axis in AXES}, devices // slices)
    return tuple(inside.values()), tuple(across.values())


def resolve_sizes(unit: str, sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Return `sizes` with -1 replaced by what the other axes leave of `total`.

    `unit` is "devices" or "slices". Raises UserError where the sizes don't multiply to `total`.
    """
    name = "mesh" if unit == "devices" else f"mesh {unit}"
    product = f"{name} " + " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{product}: every size must be at least 1, or -1 for all other {unit}")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise UserError(f"{product}: only one size can be -1, which stands for all other {unit}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if rest and total % fixed:
        raise UserError(f"{product}: {total} {unit} are not divisible by {fixed}")
    if not rest and fixed != total:
        raise UserError(f"{product} = {fixed} {unit}, but there are {total}")
    return {**sizes, **dict.fromkeys(rest, total // fixed)}


def compiler_options(cfg: ConfigDict, mesh: AnyMesh) -> dict[str, Any] | None:
    """Return options for XLA's compiler: on a TPU `mesh.compiler`, on a CPU `cpu_options`.

    Raises UserError for an entry that is not FLAG=VALUE.
    """
    for option in cfg.compiler:
        if not re.fullmatch(r"\w+=\S+", option):
            raise UserError(f"mesh.compiler: {option!r} is not FLAG=VALUE, such as xla_flag=true")
    if platform(mesh) != "tpu":
        return cpu_options(mesh)
    return dict(option.split("=", 1) for option in cfg.compiler)


def cpu_options(mesh: AnyMesh) -> dict[str, int] | None:
    """Return the compiler's options on a CPU, and None on other devices.

    At level 1 initialisation compiles in half the time and a step in four fifths; neither runs
    slower. Matrix products are the library's, and other loops are vectorised at this level too.
    """
    if platform(mesh) != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return None
    return {"xla_backend_optimization_level": 1}


def platform(mesh: AnyMesh) -> str:
    """Return "cpu", "gpu" or "tpu"; "" for an abstract mesh."""
    return "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform

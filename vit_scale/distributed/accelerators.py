"""TPUs and GPUs: accelerators.json, the one table of them, and model FLOPs utilization (MFU).

Peaks are dense bfloat16 FLOP/s of one device, as jax counts devices, from vendors' data sheets.
`device_kind` is a regular expression searched in `jax.Device.device_kind`; the first match decides.
A slice of a GPU (MIG) has no published peak. HBM is what the compiler leaves a program; clocks are
nominal, and that of tpu7x is inferred from its peak; bandwidths and vCPUs are from Google's
documentation.
The launcher reads the rest: host sizes, software, GKE's names and prices.
"""

import json
import math
import pathlib
import re
from typing import Any, NamedTuple

TABLE = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
PEAKS: dict[str, float | None] = {
    row["device_kind"]: row["peak_flops"]
    for row in (*TABLE["gpus"], *TABLE["tpus"].values())
    if "device_kind" in row
}


class Tpu(NamedTuple):
    """A TPU generation. Bandwidths are one way, of one device, over all its links together."""

    accelerator_type: str  # prefix of Cloud TPU accelerator types, such as v5litepod in v5litepod-8
    type_counts_per_chip: int  # what a type's number counts: 1 a chip (chips) or 2 (TensorCores)
    devices_per_chip: int  # as jax counts them
    max_chips: int  # of one slice
    hbm_gib: float  # of a device, as left to a program
    clock_hz: float  # of the TensorCore
    ici_bytes_per_second: float  # between chips of a slice
    dcn_bytes_per_second: float  # between slices
    vcpus_per_chip: int  # of a host with four chips
    topologies: dict[int, str]  # chips -> the shape of a slice of that size, such as 4x4
    compiler_options: dict[str, Any]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Tpu":
        shapes = TABLE["topologies"][str(row["dimensions"])]
        topologies = {math.prod(map(int, shape.split("x"))): shape for shape in shapes}
        defaults = {"topologies": topologies, "compiler_options": {}}
        values = {**defaults, **row}
        return cls(**{name: values[name] for name in cls._fields})


# The generations that libtpu compiles for.
TPUS = {name: Tpu.from_row(row) for name, row in TABLE["tpus"].items() if "hbm_gib" in row}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None if unknown, as for a CPU."""
    return next((peak for kind, peak in PEAKS.items() if re.search(kind, device_kind)), None)


def mfu(
    images_per_second: float, flops_per_image: float, devices: int, device_kind: str
) -> float | None:
    """Model FLOPs utilization of all devices, 0 to 1; None if their peak is unknown.

    Args:
      images_per_second: over all devices.
      flops_per_image: of a training step while training.
      devices: `jax.device_count()`.
      device_kind: `jax.Device.device_kind`, the same for all.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else images_per_second * flops_per_image / (devices * peak)

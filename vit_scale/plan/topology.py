"""TPU slices by name: what a slice is made of, and its devices, which need not exist.

One row of `FAMILIES` is one kind of chip. HBM is what the compiler leaves a program of each device,
as jax counts devices; clocks are nominal; bandwidths are those of Google's documentation.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from vit_scale.errors import USAGE, UserError

GIB = 2**30

# Chips -> the shape that Google Cloud gives so many.
FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}


class Family(NamedTuple):
    """A kind of chip. Bandwidths are one way, of a device, over all its links together."""

    accelerator: str  # of Google Cloud's accelerator types, ACCELERATOR-NUMBER
    counted: int  # what that number counts, per chip: 1 (chips) or 2 (TensorCores)
    per_chip: int  # devices of a chip, as jax counts them
    most: int  # chips of the largest slice
    shapes: dict[int, str]
    hbm: float  # GiB of a device that a program may use
    clock: float  # Hz of the TensorCore
    ici: float  # bytes/s between chips of a slice
    dcn: float  # bytes/s between slices
    options: dict[str, Any] = {}  # noqa: RUF012  (how the compiler is to see the chip)


FAMILIES = {
    "v4": Family(
        "v4", 2, 1, 4096, CUBES, 31.75, 1.05e9, 300e9, 6.25e9,
        {"chip_config_name": "megacore_dense"},  # both cores as one device
    ),
    "v5e": Family("v5litepod", 1, 1, 256, FLAT, 15.75, 1.5e9, 200e9, 3.125e9),
    "v5p": Family("v5p", 2, 1, 8960, CUBES, 95.74, 1.75e9, 600e9, 6.25e9),
    "v6e": Family("v6e", 1, 1, 256, FLAT, 31.25, 1.75e9, 400e9, 12.5e9),
    # Two devices a chip; the clock is a guess from the peak, so is what depends on it.
    "tpu7x": Family("tpu7x", 2, 2, 9216, CUBES, 94.75, 1.9e9, 300e9, 6.25e9),
}  # fmt: skip


class Topology(NamedTuple):
    """One or more equal slices of a family."""

    name: str  # as the compiler knows one slice: v5e:16x16
    family: Family
    slices: int

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return self.slices * math.prod(_sides(self.name))

    @property
    def devices(self) -> int:
        return self.chips * self.family.per_chip


def parse(text: str, slices: int = 1) -> Topology:
    """The topology of "v5e:16x16", or of an accelerator type such as v5litepod-256 or v4-32.

    Raises UserError, with what there is, for any other name and for a slice that is not made.
    """
    kind, mark, rest = (
        text.lower().replace("v5litepod", "v5e").partition(":" if ":" in text else "-")
    )
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1", USAGE)
    if kind not in FAMILIES or not rest:
        raise _unknown(text)
    family = FAMILIES[kind]
    if mark == "-":
        chips, odd = divmod(int(rest), family.counted) if rest.isdigit() else (0, 0)
        if odd or chips not in family.shapes:
            raise _unknown(text)
        return Topology(f"{kind}:{family.shapes[chips]}", family, slices)
    axes = 1 + family.shapes[4].count("x")
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), rest):
        raise _unknown(text)
    topology = Topology(f"{kind}:{rest}", family, slices)
    if topology.chips > slices * family.most:
        raise UserError(
            f"topology {text} has {topology.chips // slices:,} chips; "
            f"the largest {kind} slice has {family.most:,}: add slices with --slices",
            USAGE,
        )
    return topology


def _sides(name: str) -> list[int]:
    return [int(side) for side in name.partition(":")[2].split("x")]


def _unknown(text: str) -> UserError:
    """All there is, or all there is of the family that `text` begins with."""
    meant = [name for name in FAMILIES if text.lower().replace("v5litepod", "v5e").startswith(name)]
    known = "; ".join(
        f"{name}:{{{','.join(family.shapes.values())}}} or "
        f"{family.accelerator}-{{{','.join(str(family.counted * n) for n in family.shapes)}}}"
        for name, family in FAMILIES.items()
        if name in (meant or FAMILIES)
    )
    return UserError(f"topology {text!r} is unknown; valid: {known}", USAGE)


# Nothing here opens a TPU: no device is looked for, no metadata server asked, nothing is logged.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what it holds could not be read back
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file admits one process
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
}


def devices(topology: Topology) -> list:
    """Devices to compile for, in a process whose environment is `ENVIRONMENT`.

    Raises UserError where libtpu, the compiler, is missing or refuses the slice.
    """
    from jax.experimental import topologies

    os.environ.update(ENVIRONMENT)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "vit-scale plan needs libtpu, the TPU's compiler: launch/compiler.sh installs it, "
            "and so does pip install libtpu"
        )
    options = dict(topology.family.options)
    if math.prod(_sides(topology.name)) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    except Exception as error:  # the compiler says what it does not make in many ways
        first = str(error).splitlines()[0]
        raise UserError(f"topology {topology.name}: libtpu refuses it: {first}") from error

"""TPU slices by name, and devices to compile for, which need not exist."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

from vit_scale.distributed.accelerators import TPUS, Tpu
from vit_scale.errors import USAGE, UserError

GIB = 2**30


class Topology(NamedTuple):
    """One or more equal slices of one TPU generation."""

    name: str  # as the compiler knows one slice: v5e:16x16
    tpu: Tpu
    slices: int

    @property
    def chips(self) -> int:
        """The number of chips of all slices together."""
        return self.slices * math.prod(_sides(self.name))

    @property
    def devices(self) -> int:
        """The number of JAX devices of all slices together."""
        return self.chips * self.tpu.devices_per_chip


def parse(text: str, slices: int = 1) -> Topology:
    """Parse "v5e:16x16", or an accelerator type such as v5litepod-256 or v4-32.

    Raises UserError, with the valid names, for any other name and for a slice that does not exist.
    """
    kind, separator, rest = (
        text.lower().replace("v5litepod", "v5e").partition(":" if ":" in text else "-")
    )
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1", USAGE)
    if kind not in TPUS or not rest:
        raise _unknown(text)
    tpu = TPUS[kind]
    if separator == "-":
        chips, odd = divmod(int(rest), tpu.type_counts_per_chip) if rest.isdigit() else (0, 0)
        if odd or chips not in tpu.topologies:
            raise _unknown(text)
        return Topology(f"{kind}:{tpu.topologies[chips]}", tpu, slices)
    axes = 1 + tpu.topologies[4].count("x")
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), rest):
        raise _unknown(text)
    topology = Topology(f"{kind}:{rest}", tpu, slices)
    if topology.chips > slices * tpu.max_chips:
        raise UserError(
            f"topology {text} has {topology.chips // slices:,} chips; "
            f"the largest {kind} slice has {tpu.max_chips:,}: add slices with --slices",
            USAGE,
        )
    return topology


def _sides(name: str) -> list[int]:
    return [int(side) for side in name.partition(":")[2].split("x")]


def _unknown(text: str) -> UserError:
    """Return the error that lists the topologies of the TPU generation that `text` begins with."""
    generations = [
        name for name in TPUS if text.lower().replace("v5litepod", "v5e").startswith(name)
    ]
    valid = "; ".join(
        f"{name}:{{{','.join(tpu.topologies.values())}}} or {tpu.accelerator_type}-"
        f"{{{','.join(str(tpu.type_counts_per_chip * chips) for chips in tpu.topologies)}}}"
        for name, tpu in TPUS.items()
        if name in (generations or TPUS)
    )
    return UserError(f"topology {text!r} is unknown; valid: {valid}", USAGE)


# Keeps libtpu from opening devices, asking the metadata server and writing logs.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # its entries could not be read back
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a lock file admits one process only
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
}


def devices(topology: Topology) -> list:
    """Return the devices of a topology, to compile for. Sets `ENVIRONMENT` in this process.

    Raises UserError where libtpu, the compiler, is missing or rejects the slice.
    """
    from jax.experimental import topologies

    os.environ.update(ENVIRONMENT)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "vit-scale plan needs libtpu, the TPU's compiler: install it with launch/compiler.sh "
            "or pip install libtpu"
        )
    options = dict(topology.tpu.compiler_options)
    if math.prod(_sides(topology.name)) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    except Exception as error:  # libtpu raises many types for a slice that does not exist
        first = str(error).splitlines()[0]
        raise UserError(f"topology {topology.name} is not supported by libtpu: {first}") from error

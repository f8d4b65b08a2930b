"""Look up accelerator types in accelerators.json: chips, hosts, software, GKE's name, price.

The number in a type counts TensorCores for v2 to v4, v5p and tpu7x, and chips for v5e and v6e.
"""

import json
import pathlib
import re
from typing import NamedTuple

from launch.tpu.exit_codes import Exit, Stop

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TABLE = json.loads((ROOT / "vit_scale" / "distributed" / "accelerators.json").read_text())
GENERATIONS = {row["accelerator_type"]: row for row in TABLE["tpus"].values()}
# The table's prices are from memory; another region, a discount or --price says otherwise.
PRICE_SOURCE = "list price on demand in US regions, unverified"


class Accelerator(NamedTuple):
    """A slice of `type`: `chips` in `hosts` VMs."""

    type: str
    chips: int
    hosts: int
    runtime: str
    gke: str | None  # GKE's name of the generation
    devices: int  # that JAX sees
    price: float | None  # USD an hour, on demand


def parse(name: str, price: float | None = None) -> Accelerator:
    """Look up an accelerator type such as v4-32 or v5e-16; `price` is in USD per chip-hour.

    Raises Stop for an unknown type and for a size that no slice has.
    """
    match = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]*)", name)
    generation = {"v5e": "v5litepod"}.get(match[1], match[1]) if match else ""
    if match is None or generation not in GENERATIONS:
        valid = ", ".join(f"{key}-N" for key in GENERATIONS)
        raise Stop(Exit.REFUSED, f"unknown accelerator type {name!r}; valid: {valid} (v4-32)")
    row, number = GENERATIONS[generation], int(match[2])
    chips, odd = divmod(number, row["type_counts_per_chip"])
    single = chips in row["single_host_chips"]
    hosts, rest = (1, 0) if single else divmod(chips, row["chips_per_host"])
    power_of_two = chips & (chips - 1) == 0
    if odd or rest or hosts < 1 or not (row["dimensions"] == 3 or power_of_two):
        raise Stop(Exit.REFUSED, f"accelerator type {name}: no {generation} slice has this size")
    price = row["usd_per_chip_hour"] if price is None else price
    return Accelerator(
        type=f"{generation}-{number}",
        chips=chips,
        hosts=hosts,
        runtime=row["runtime_version"],
        gke=row["gke_accelerator"],
        devices=chips * row.get("devices_per_chip", 2),  # v2 and v3: one per TensorCore
        price=None if price is None else price * chips,
    )

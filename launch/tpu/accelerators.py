"""What an accelerator type means: chips, hosts, software, where it lies in GKE, and what it costs.

The number in a name counts cores up to v4 and in v5p and tpu7x, and chips in v5e and v6e.
"""

import re
from typing import NamedTuple

from launch.tpu.exit_codes import REFUSED, Stop


class Generation(NamedTuple):
    counts: int  # what the number in a type's name counts, per chip
    one_host: tuple  # numbers of chips that are one host; else there are `per_host` on each
    per_host: int
    runtime: str
    gke: str
    dimensions: int  # of the network between chips
    price: float | None  # USD a chip and hour on demand; see PRICES


# List prices on demand in US regions, USD a chip and hour, from memory and not verified; another
# region, a discount or --price says otherwise. Spot prices change and are lower.
PRICES = "list price on demand in US regions, unverified"
GENERATIONS = {
    "v2": Generation(2, (), 4, "tpu-ubuntu2204-base", "", 2, 1.13),
    "v3": Generation(2, (), 4, "tpu-ubuntu2204-base", "", 2, 2.00),
    "v4": Generation(2, (), 4, "tpu-ubuntu2204-base", "tpu-v4-podslice", 3, 3.22),
    "v5litepod": Generation(
        1, (1, 4, 8), 4, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2, 1.20
    ),
    "v5p": Generation(2, (), 4, "v2-alpha-tpuv5", "tpu-v5p-slice", 3, 4.20),
    "v6e": Generation(1, (1, 4, 8), 4, "v2-alpha-tpuv6e", "tpu-v6e-slice", 2, 2.70),
    "tpu7x": Generation(2, (), 4, "v2-alpha-tpu7-ubuntu2404", "tpu7x", 3, None),
}
TOPOLOGIES = {
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    3: "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
}


class Accelerator(NamedTuple):
    """A slice of `type`: `chips` in `hosts` machines."""

    type: str
    generation: str
    chips: int
    hosts: int
    runtime: str
    price: float | None  # USD an hour, on demand

    @property
    def topology(self) -> str:
        """The shape of the slice, such as 4x4; empty where there is no table of it."""
        for shape in TOPOLOGIES[GENERATIONS[self.generation].dimensions].split():
            product = 1
            for side in shape.split("x"):
                product *= int(side)
            if product == self.chips:
                return shape
        return ""


def parse(name: str, price: float | None = None) -> Accelerator:
    """The accelerator of a type such as v4-32, or v5e-16; `price` is of a chip and hour.

    Raises Stop for what is none.
    """
    match = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]*)", name)
    generation = {"v5e": "v5litepod"}.get(match[1], match[1]) if match else ""
    if match is None or generation not in GENERATIONS:
        known = ", ".join(f"{key}-N" for key in GENERATIONS)
        raise Stop(REFUSED, f"type {name!r} is none of {known}, such as v4-32")
    table, number = GENERATIONS[generation], int(match[2])
    chips, rest = divmod(number, table.counts)
    hosts = 1 if chips in table.one_host else chips // table.per_host
    uneven = chips not in table.one_host and chips % table.per_host
    square = table.dimensions == 3 or chips & (chips - 1) == 0
    if rest or hosts < 1 or uneven or not square:
        raise Stop(REFUSED, f"type {name}: no slice of {generation} has this size")
    price = table.price if price is None else price
    return Accelerator(
        f"{generation}-{number}",
        generation,
        chips,
        hosts,
        table.runtime,
        None if price is None else price * chips,
    )

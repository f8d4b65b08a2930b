"""Predictions of a step's time and cost, from the compiler's figures and nothing else.

None was calibrated on a TPU: use them to rank variants, and to see whether something fits.
"""

from collections import defaultdict
from collections.abc import Iterable

from vit_scale.distributed.accelerators import mfu
from vit_scale.plan.hlo import Collective, Cost
from vit_scale.plan.topology import Topology

# A device of a group of g sends an array over its links at least (g - 1) / g times this often.
PASSES = {"all-reduce": 2}  # reduce-scatter, then all-gather
# Of photos of 400 to 500 px, cropped at random to 224 px, on a core of an EPYC (Zen 3).
DECODED_PER_VCPU = 500  # images/s


def moved_bytes(transfer: Collective) -> float:
    """Return the bytes that a device sends, at least, over all executions of a collective."""
    if transfer.kind in ("collective-permute", "collective-broadcast", "send"):
        return transfer.bytes * transfer.times
    share = (transfer.group - 1) / transfer.group
    return PASSES.get(transfer.kind, 1) * share * transfer.bytes * transfer.times


def parts(cost: Cost, where: Topology) -> dict[str, float]:
    """Return the parts of a step in ms.

    arithmetic: the compiler's cycles; synchronous: collectives that block; hidden: collectives that
    overlap with arithmetic; between_slices: transfers over the data centre's network. Transfers are
    assumed to use all of a device's links at once: these are lower bounds.
    """
    sums: dict[str, float] = defaultdict(float)
    for transfer in cost.collectives:
        between = transfer.kind == "send"
        waits = transfer.hidden is None
        name = "between_slices" if between else "synchronous" if waits else "hidden"
        speed = where.tpu.dcn_bytes_per_second if between else where.tpu.ici_bytes_per_second
        sums[name] += 1e3 * moved_bytes(transfer) / speed
    return {
        "arithmetic_ms": 1e3 * cost.cycles / where.tpu.clock_hz,
        "synchronous_ms": sums["synchronous"],
        "hidden_ms": sums["hidden"],
        "between_slices_ms": sums["between_slices"],
    }


def step_ms(times: dict[str, float]) -> float:
    """Return the ms of a step with these `parts` and "exposed_ms".

    exposed: how long arithmetic waits for overlapped transfers, by the compiler's scheduler. A step
    is never shorter than its transfers.
    """
    waiting = times["exposed_ms"] + times["synchronous_ms"]
    moving = max(times["hidden_ms"] + times["synchronous_ms"], times["between_slices_ms"])
    return max(times["arithmetic_ms"] + waiting, moving)


def by_kind(collectives: Iterable[Collective]) -> list[dict]:
    """Sum collectives by kind, the most bytes first; "overlapped" ones run beside arithmetic."""
    rows: dict[str, dict] = {}
    for transfer in collectives:
        row = rows.setdefault(
            transfer.kind,
            {"kind": transfer.kind, "count": 0, "bytes": 0, "async": 0, "overlapped": 0},
        )
        row["count"] += transfer.times
        row["bytes"] += transfer.times * transfer.bytes
        row["async"] += transfer.times * (transfer.hidden is not None)
        row["overlapped"] += transfer.times * bool(transfer.hidden)
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def decoding(step: dict, images_per_second: float, where: Topology) -> dict[str, float]:
    """Return what each host has to decode so that no device waits for images."""
    per_host = images_per_second / step["hosts"]
    return {
        "images_per_second_per_host": per_host,
        "decoding_vcpus": per_host / DECODED_PER_VCPU,
        "host_vcpus": where.tpu.vcpus_per_chip * where.chips / step["hosts"],
    }


def totals(step: dict, step_ms: float, price: float | None) -> dict[str, float | None]:
    """Return speed and cost of all steps, without evaluation, startup, and waiting for data.

    `step` is the description of step.py; `price` is in USD per chip and hour.
    """
    per_second = 1e3 * step["global_batch"] / step_ms
    hours = step["chips"] * step["steps"] * step_ms / 3.6e6
    image_flops = step["flops_per_step"] / step["global_batch"]
    return {
        "step_ms": step_ms,
        "images_per_second": per_second,
        "mfu": mfu(per_second, image_flops, step["devices"], step["device_kind"]),
        "chip_hours": hours,
        "cost_usd": None if price is None else price * hours,
    }

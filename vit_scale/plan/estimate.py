"""What a compiled step is predicted to take: arithmetic on what the compiler says, nothing else.

Every number here is a prediction. None was calibrated on a TPU: take them for ranking, and for
whether something fits.
"""

from collections import defaultdict
from collections.abc import Iterable

from vit_scale.distributed.accelerators import mfu
from vit_scale.plan.hlo import Collective, Cost
from vit_scale.plan.topology import Topology

# How often an array of a group's size passes a device's links, at least: (g - 1) / g times this.
PASSES = {"all-reduce": 2}  # reduce-scatter, then all-gather


def moved_bytes(transfer: Collective) -> float:
    """What a device sends, at least, for all the times that a collective is made."""
    if transfer.kind in ("collective-permute", "collective-broadcast", "send"):
        return transfer.bytes * transfer.times
    share = (transfer.group - 1) / transfer.group
    return PASSES.get(transfer.kind, 1) * share * transfer.bytes * transfer.times


def parts(cost: Cost, where: Topology) -> dict[str, float]:
    """Milliseconds of the parts of a step.

    arithmetic: the compiler's cycles. synchronous: collectives that everything waits for. hidden:
    those that go on beside arithmetic, and between_slices, transfers over the slow network. All
    transfers are at the speed of all of a device's links at once: they take at least that.
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
    """Milliseconds of a step of these `parts` and "exposed_ms".

    exposed: how long the compiler's scheduler says that arithmetic waits for hidden transfers. A
    step is no shorter than what it moves takes.
    """
    waiting = times["exposed_ms"] + times["synchronous_ms"]
    moving = max(times["hidden_ms"] + times["synchronous_ms"], times["between_slices_ms"])
    return max(times["arithmetic_ms"] + waiting, moving)


def by_kind(collectives: Iterable[Collective]) -> list[dict]:
    """One row per kind of collective, the largest first; `overlapped` are those hidden by work."""
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


def totals(found: dict, step_ms: float, price: float | None) -> dict[str, float | None]:
    """Speed and cost of all steps, without evaluation, the start, and waiting for data.

    `found` is what is known of the step; `price` is in USD per chip and hour.
    """
    per_second = 1e3 * found["global_batch"] / step_ms
    hours = found["chips"] * found["steps"] * step_ms / 3.6e6
    image_flops = found["flops_per_step"] / found["global_batch"]
    return {
        "step_ms": step_ms,
        "images_per_second": per_second,
        "mfu": mfu(per_second, image_flops, found["devices"], found["device_kind"]),
        "chip_hours": hours,
        "cost_usd": None if price is None else price * hours,
    }

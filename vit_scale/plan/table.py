"""Plans as text: tables, with a note that the numbers are predictions."""

from collections.abc import Sequence

from vit_scale.plan import memory
from vit_scale.plan.estimate import DECODED_PER_VCPU
from vit_scale.runs import report

NOTE = (
    "Predicted from the compiler's cycle estimates and nominal bandwidths; "
    "not calibrated, not measured."
)


def format_plan(plan: dict) -> str:
    """Format one plan: whether it fits, its memory, its speed, and its collectives."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    where = f"{plan['slices']} x {plan['topology']}" if plan["slices"] > 1 else plan["topology"]
    lines = [
        f"{plan['config']} on {where}: {plan['chips']:,} chips ({plan['device_kind']}), "
        f"mesh {mesh}, global batch {plan['global_batch']:,}",
        f"{'fits' if plan['fits'] else 'DOES NOT FIT'}: {memory(plan)} per device",
    ]
    if "flags" in plan:
        lines.append(f"to make it fit, add: {' '.join(plan['flags'])}")
    lines += ["", report.table(memory_rows(plan))]
    if plan["fits"]:
        lines += ["", report.table([speed_row(plan)])]
        if plan["collectives"]:
            lines += ["", report.table(collective_rows(plan))]
        if plan["unpriced_kernels"]:
            lines.append(
                f"plus {plan['unpriced_kernels']:,} custom kernels without a time estimate"
            )
        if "decoding_vcpus" in plan:
            lines += ["", decoding_line(plan)]
        lines += ["", NOTE]
    return "\n".join(lines)


def decoding_line(plan: dict) -> str:
    """Say what the hosts have to decode, and whether they can."""
    needed, there = plan["decoding_vcpus"], plan["host_vcpus"]
    line = (
        f"each of {plan['hosts']:,} hosts has to decode {plan['images_per_second_per_host']:,.0f} "
        f"images/s: {needed:.0f} vCPUs at {DECODED_PER_VCPU} images/s each, of {there:.0f} "
        "(`vit-scale data bench` measures your images and your host)"
    )
    if needed <= there:
        return line
    return f"{line}\nWARNING: the devices would wait for images; store them smaller with data pack"


def memory_rows(plan: dict) -> list[dict]:
    """Return a row per part of a device's memory."""
    parts = ("parameter", "optimizer", "ema", "temporary", "program")
    return [
        {"per device": part, "GiB": f"{plan[f'{part}_bytes'] / 2**30:.3f}"}
        for part in parts
        if plan.get(f"{part}_bytes")
    ]


def speed_row(plan: dict) -> dict:
    """Return the predicted speed and cost of a plan that fits, as a row."""
    row = {
        "step ms": f"{plan['step_ms']:.2f}",
        "arithmetic ms": f"{plan['arithmetic_ms']:.2f}",
        "exposed ms": f"{plan['exposed_ms']:.2f}",
        "synchronous ms": f"{plan['synchronous_ms']:.2f}",
        "images/s": plan["images_per_second"],
        "MFU": f"{100 * plan['mfu']:.1f} %",
        "chip-hours": plan["chip_hours"],
    }
    if plan["cost_usd"] is not None:
        row["USD"] = f"{plan['cost_usd']:,.0f}"
    return row | {"compile s": plan["compile_seconds"]}


def collective_rows(plan: dict) -> list[dict]:
    """Return a row per kind of collective."""
    return [
        {
            "collective": row["kind"],
            "per step": row["count"],
            "MB": f"{row['bytes'] / 1e6:.1f}",
            "async": row["async"],
            "overlapped": row["overlapped"],
        }
        for row in plan["collectives"]
    ]


def format_comparison(results: Sequence[dict], markdown: bool = False) -> str:
    """Format a row per variant, in the order of `results`."""
    fitting = next((speed_row(row) for row in results if row["fits"]), {})
    rows = []
    for row in results:
        speed = speed_row(row) if row["fits"] else dict.fromkeys(fitting)
        needs = row.get("error") or ("" if row["fits"] else "does not fit: ") + memory(row)
        rows.append({"variant": row["variant"], **speed, "memory": needs})
    return report.table(rows, markdown) + f"\n\n{NOTE}"

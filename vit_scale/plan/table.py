"""Plans as text: tables whose numbers say that they are predictions."""

from collections.abc import Sequence

from vit_scale.plan import memory
from vit_scale.runs import report

NOTE = (
    "Predictions from the compiler's cycle estimates and bandwidths on paper, "
    "not calibrated and not measured."
)


def text(found: dict) -> str:
    """One plan: whether it fits and what fills the memory, how fast, and what is moved."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    where = f"{found['slices']} x {found['topology']}" if found["slices"] > 1 else found["topology"]
    lines = [
        f"{found['config']} on {where}: {found['chips']:,} chips ({found['device_kind']}), "
        f"mesh {mesh}, global batch {found['global_batch']:,}",
        f"{'fits' if found['fits'] else 'DOES NOT FIT'}: {memory(found)} of each device",
    ]
    if "flags" in found:
        lines.append(f"to make it fit, add: {' '.join(found['flags'])}")
    lines += ["", report.table(memory_rows(found))]
    if found["fits"]:
        lines += ["", report.table([speed_row(found)])]
        if found["collectives"]:
            lines += ["", report.table(collective_rows(found))]
        if found["unpriced_kernels"]:
            lines.append(f"{found['unpriced_kernels']:,} custom kernels have no estimate: add them")
        lines += ["", NOTE]
    return "\n".join(lines)


def memory_rows(found: dict) -> list[dict]:
    parts = ("parameter", "optimizer", "ema", "temporary", "program")
    return [
        {"per device": part, "GiB": f"{found[f'{part}_bytes'] / 2**30:.3f}"}
        for part in parts
        if found.get(f"{part}_bytes")
    ]


def speed_row(found: dict) -> dict:
    """What is predicted of a plan that fits."""
    row = {
        "step ms": f"{found['step_ms']:.2f}",
        "arithmetic ms": f"{found['arithmetic_ms']:.2f}",
        "exposed ms": f"{found['exposed_ms']:.2f}",
        "synchronous ms": f"{found['synchronous_ms']:.2f}",
        "images/s": found["images_per_second"],
        "MFU": f"{100 * found['mfu']:.1f} %",
        "chip-hours": found["chip_hours"],
    }
    if found["cost_usd"] is not None:
        row["USD"] = f"{found['cost_usd']:,.0f}"
    return row | {"compiled in s": found["compile_seconds"]}


def collective_rows(found: dict) -> list[dict]:
    return [
        {
            "collective": row["kind"],
            "a step": row["count"],
            "MB": f"{row['bytes'] / 1e6:.1f}",
            "async": row["async"],
            "with work between": row["overlapped"],
        }
        for row in found["collectives"]
    ]


def comparison(found: Sequence[dict], markdown: bool = False) -> str:
    """A row per variant, in the order given."""
    fitting = next((speed_row(row) for row in found if row["fits"]), {})
    rows = []
    for row in found:
        speed = speed_row(row) if row["fits"] else dict.fromkeys(fitting)
        needs = row.get("error") or ("" if row["fits"] else "does not fit: ") + memory(row)
        rows.append({"variant": row["variant"], **speed, "memory": needs})
    return report.table(rows, markdown) + f"\n\n{NOTE}"

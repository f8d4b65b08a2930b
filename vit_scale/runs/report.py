"""Tables of results, generated from the report.json of run folders."""

import pathlib
from collections.abc import Sequence
from typing import Any

from vit_scale.errors import UserError, printable
from vit_scale.runs.goodput import read as read_attempts
from vit_scale.runs.goodput import summarise
from vit_scale.runs.json_files import read_json
from vit_scale.storage import paths


def _report(run: pathlib.Path) -> dict:
    if (run / "run.json").exists() and not (run / "report.json").exists():
        raise UserError(f"run {run} has not finished; rerun its command to resume it")
    return read_json(run / "report.json")


def _result(report: dict) -> dict:
    return report.get("eval", {})  # a run may evaluate nothing


COLUMNS = {
    "run": lambda run, report: str(run),
    "initialised from": lambda run, report: report["init"] or "random",
    "trained on": lambda run, report: report["data"]["name"],
    "resolution": lambda run, report: " x ".join(map(str, report["resolution"])),
    "steps": lambda run, report: report["step"],
    "parameters": lambda run, report: report["parameters"],
    "evaluated on": lambda run, report: _result(report).get("split"),
    "n": lambda run, report: _result(report).get("n"),
    "accuracy": lambda run, report: _result(report).get("accuracy"),
    "best accuracy": lambda run, report: _result(report).get("best", {}).get("accuracy"),
    "images/s": lambda run, report: report["images_per_second"],
}
PERCENT = ("accuracy", "best accuracy")


def rows(runs: Sequence[str | pathlib.Path]) -> list[dict[str, Any]]:
    """Return a row of results per run folder. Raises UserError for an unfinished run."""
    reports = [(run, _report(paths.parse(run))) for run in runs]
    return [{name: cell(*pair) for name, cell in COLUMNS.items()} for pair in reports]


def goodput(run: str | pathlib.Path) -> dict[str, Any] | None:
    """Return a run's use of time (`goodput.summarise`); None where it was not recorded."""
    attempts = read_attempts(paths.parse(run))
    return summarise(attempts) if attempts else None


def table(content: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Format rows, which share their keys, as aligned text or as a Markdown table."""
    lines = [list(content[0]), *([_text(name, row[name]) for name in row] for row in content)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def layout_table(layout: dict[str, Any]) -> str:
    """Format `parameter_layout` for `vit-scale show --sharding`, with the totals below."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in layout["mesh"].items())
    parts = layout["bytes_per_device"]
    sums = ", ".join(f"{name} {size:,}" for name, size in parts.items())
    total = sum(parts.values())
    return (
        f"{table(layout['parameters'])}\n"
        f"mesh {mesh}; bytes per device: {sums}; total {total:,} ({total / 2**30:.2f} GiB)"
    )


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return printable(value)
    if name in PERCENT:
        return f"{100 * value:.2f} %"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:,}"

"""Tables of results, generated from the report.json of run folders."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
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


SHARES = ("accuracy", "balanced_accuracy", "mAP", "macro_f1", "micro_f1")  # shown in percent
# Of what an evaluation measures, how it is written; in the order of a line.
NAMES = {
    "accuracy": "accuracy",
    "mAP": "mAP",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "r2": "R2",
    "rmse": "RMSE",
    "mae": "MAE",
    "loss": "loss",
}


def format_name(name: str) -> str:
    """Return how a result's name is written: "macro F1" for "macro_f1"."""
    return NAMES.get(name, name.replace("_", " "))


def _result_columns(main: str) -> dict[str, Callable]:
    """Return the columns of the last step's result `main`, and of the best step's."""
    return {
        format_name(main): lambda run, report: _result(report).get(main),
        f"best {format_name(main)}": lambda run, report: _result(report).get("best", {}).get(main),
    }


RUN_COLUMNS: dict[str, Callable] = {
    "run": lambda run, report: str(run),
    "initialised from": lambda run, report: report["init"] or "random",
    "trained on": lambda run, report: report["data"]["name"],
    "resolution": lambda run, report: " x ".join(map(str, report["resolution"])),
    "steps": lambda run, report: report["step"],
    "parameters": lambda run, report: report["parameters"],
    "evaluated on": lambda run, report: _result(report).get("split"),
    "n": lambda run, report: _result(report).get("n"),
}
RESULTS = {format_name(name): name for name in {*NAMES, *SHARES}}  # by column
SPEED: dict[str, Callable] = {"images/s": lambda run, report: report["images_per_second"]}
COSTS: dict[str, Callable] = {  # shown where they are known
    "FLOPs": lambda run, report: report.get("flops"),
    "CPU min": lambda run, report: _cpu_minutes(run, report),
}


def _cpu_minutes(run: str | pathlib.Path, report: dict) -> float | None:
    """Return the CPU time of a run on CPUs alone, in minutes."""
    cpu = (goodput(run) or {}).get("cpu")
    return cpu / 60 if cpu and report["devices"]["kind"] == "cpu" else None


def rows(runs: Sequence[str | pathlib.Path]) -> list[dict[str, Any]]:
    """Return a row of results per run folder, with a column for the main result of each.

    Raises UserError for an unfinished run.
    """
    reports = [(run, _report(paths.parse(run))) for run in runs]
    columns = dict(RUN_COLUMNS)
    for _, report in reports:
        columns |= _result_columns(report.get("measure", "accuracy"))
    columns |= SPEED
    for name, cell in COSTS.items():
        if any(cell(*pair) is not None for pair in reports):
            columns[name] = cell
    return [{name: cell(*pair) for name, cell in columns.items()} for pair in reports]


def format_value(name: str, value: float) -> str:
    """Format the value of a result: "12.34 %" of an accuracy, "0.9876" of R2."""
    return f"{100 * value:.2f} %" if name in SHARES else f"{value:.4f}"


def format_results(results: Mapping[str, Any], *names: str) -> str:
    """Format what an evaluation measured, or `names` of it: "accuracy 12.34 %, n 10,000"."""
    parts = [
        f"{format_name(name)} {format_value(name, results[name])}"
        for name in names or NAMES
        if name in results
    ]
    return ", ".join([*parts, f"n {results['n']:,}"])


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
    result = name.removeprefix("best ")
    if result in RESULTS:
        return format_value(RESULTS[result], value)
    if name == "FLOPs":
        return f"{value:.2e}".replace("e+", "e")
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:,}"

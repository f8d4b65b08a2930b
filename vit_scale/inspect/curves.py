"""Read a run's training curves from its metrics.jsonl."""

import json
import pathlib
import statistics
from collections.abc import Iterable

Curve = tuple[list[int], list[float]]  # steps, values


def read_curves(run: pathlib.Path) -> dict[str, Curve]:
    """{"train/loss": (steps, values), ...} of RUN/metrics.jsonl; {} if it is missing.

    Values that were not finite (written as null) and truncated lines are skipped.
    """
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    curves: dict[str, Curve] = {}
    for row in _rows(lines):
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _rows(lines: Iterable[str]) -> Iterable[dict]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def median_speed(curves: dict[str, Curve]) -> float | None:
    """Training throughput in images per second: the median over the rows; None if not recorded."""
    values = curves.get("images_per_second", ([], []))[1]
    return statistics.median(values) if values else None

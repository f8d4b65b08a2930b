"""A run's training curves, from the rows that it wrote while it trained."""

import json
import pathlib
import statistics
from collections.abc import Iterable

Curve = tuple[list[int], list[float]]


def read(run: pathlib.Path) -> dict[str, Curve]:
    """{"train/loss": (steps, values), ...} of RUN/metrics.jsonl; none where it is missing.

    A value that was not finite was written as null; it is left out, as is a torn line.
    """
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, Curve] = {}
    for row in _rows(lines):
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def _rows(lines: Iterable[str]) -> Iterable[dict]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def speed(curves: dict[str, Curve]) -> float | None:
    """Images per second while it trained: the median over the rows. None where none says it."""
    values = curves.get("images_per_second", ([], []))[1]
    return statistics.median(values) if values else None

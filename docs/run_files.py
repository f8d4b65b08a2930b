"""What the manual's tables and pictures read of the run folders in results/."""

import json
import pathlib
from typing import Any

from vit_scale.evaluation.intervals import wilson_interval
from vit_scale.runs import report

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def read(run: str, name: str = "report.json") -> dict[str, Any]:
    return json.loads((RESULTS / run / name).read_text())


def accuracy(result: dict[str, Any]) -> str:
    """Format an accuracy and half of its 95 % interval: "52.42 ± 0.98 %"."""
    low, high = wilson_interval(round(result["accuracy"] * result["n"]), result["n"])
    return f"{100 * result['accuracy']:.2f} ± {50 * (high - low):.2f} %"


def cpu_minutes(run: str) -> float:
    used = report.goodput(RESULTS / run)
    assert used and used["cpu"]
    return used["cpu"] / 60


def evaluations(run: str, began: float = 0.0) -> list[tuple[float, float]]:
    """(CPU minutes, accuracy) of a run's evaluations; a step costs the same at any time."""
    steps, minutes = read(run)["step"], cpu_minutes(run)
    rows = map(json.loads, (RESULTS / run / "metrics.jsonl").read_text().splitlines())
    return [
        (began + minutes * row["step"] / steps, row["eval/accuracy"])
        for row in rows
        if "eval/accuracy" in row
    ]

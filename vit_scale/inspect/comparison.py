"""Several runs side by side: their curves, accuracy, parameters and speed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vit_scale.inspect import curves, plots
from vit_scale.inspect.html import Note, Picture, Table
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.predictions import Predictions, calibration, interval


class Looked(NamedTuple):
    """A run, and what it says of the labelled images; None where there were none."""

    subject: InspectedRun
    found: Predictions | None


def numbers(looked: Looked) -> dict:
    """What is measured of one run, for JSON. Absent numbers are None."""
    subject, found = looked
    kind = (subject.report or subject.about).get("devices", {})
    measured: dict = {"split": None, "n": 0, "accuracy": None, "loss": None, "ece": None}
    if found is not None:
        measured = {
            "split": found.source,
            "n": found.n,
            "accuracy": found.accuracy,
            "loss": float(found.losses.mean()),
            "ece": calibration(found.probabilities, found.labels).ece,
        }
    return {
        "run": str(subject.folder),
        "step": subject.step,
        **measured,
        "parameters": subject.parameters,
        "resolution": list(subject.size),
        "images_per_second": curves.speed(subject.curves),
        "devices": f"{kind.get('count', '?')} x {kind.get('kind', '?')}",
    }


def format_row(row: dict) -> dict[str, str]:
    """The numbers of one run as text, for a table."""
    speed, loss = row["images_per_second"], row["loss"]
    return {
        "run": row["run"],
        "step": f"{row['step']:,}",
        "evaluated on": row["split"] or "-",
        "n": f"{row['n']:,}",
        "accuracy": _percent(row["accuracy"]),
        "loss": "-" if loss is None else f"{loss:.4f}",
        "ECE": _percent(row["ece"]),
        "parameters": f"{row['parameters']:,}",
        "resolution": " x ".join(map(str, row["resolution"])),
        "images/s": "-" if speed is None else f"{speed:,.0f} on {row['devices']}",
    }


def compare(all_looked: Sequence[Looked]) -> list[Picture | Table | Note]:
    rows = [numbers(looked) for looked in all_looked]
    names = [looked.subject.name for looked in all_looked]
    steps = ", ".join(f"{n} (step {row['step']:,})" for n, row in zip(names, rows, strict=True))
    recorded = {looked.subject.name: looked.subject.curves for looked in all_looked}
    parts: list[Picture | Table | Note] = [
        Table(
            "In numbers",
            [format_row(row) | {"run": name} for name, row in zip(names, rows, strict=True)],
        ),
        Picture("measures", "Accuracy, parameters, speed", _caption(rows),
                plots.comparison(names, _measures(rows), steps)),
        Picture("curves", "Training curves", "Training is solid, evaluation dashed.",
                plots.curves(recorded, f"Training: {steps}")),
    ]  # fmt: skip
    return parts + _pairs(all_looked)


def _caption(rows: Sequence[dict]) -> str:
    of = {(row["split"], row["n"]) for row in rows if row["n"]}
    what = "; ".join(f"n = {n:,} images of {split}" for split, n in sorted(of))
    return (
        f"Accuracy with its 95 % interval (Wilson), {what or 'not measured'}. Images per second "
        "are of training, the median over the rows of metrics.jsonl, on the devices in the table."
    )


def _measures(rows: Sequence[dict]) -> dict[str, dict]:
    shares = [row["accuracy"] for row in rows]
    bounds = [
        interval(round(row["accuracy"] * row["n"]), row["n"]) if row["n"] else (0, 0)
        for row in rows
    ]
    speeds = [row["images_per_second"] for row in rows]
    return {
        "accuracy, %": {
            "values": [share and 100 * share for share in shares],
            "low": [100 * low for low, _ in bounds],
            "high": [100 * high for _, high in bounds],
            "texts": [_percent(share) for share in shares],
        },
        "parameters, millions": {
            "values": [row["parameters"] / 1e6 for row in rows],
            "texts": [f"{row['parameters'] / 1e6:.2f} M" for row in rows],
        },
        "training, images/s": {
            "values": speeds,
            "texts": ["-" if speed is None else f"{speed:,.0f}" for speed in speeds],
        },
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _pairs(all_looked: Sequence[Looked]) -> list[Table | Note]:
    """The first run against each other one, image by image."""
    (first, one), *others = all_looked
    rows, title = [], f"On the same images as {first.name}, step {first.step:,}"
    for other, two in others:
        if one is None or two is None or not _same_images(one, two):
            return [Note(title, "The runs were not measured on the same images.")]
        counts = [(one.right & two.right), (one.right & ~two.right), (two.right & ~one.right)]
        both, only_one, only_two = (int(np.sum(hits)) for hits in counts)
        rows.append(
            {
                "run": other.name,
                "step": f"{other.step:,}",
                "both right": f"{both:,}",
                f"only {first.name} right": f"{only_one:,}",
                "only this run right": f"{only_two:,}",
                "both wrong": f"{one.n - both - only_one - only_two:,}",
                "n": f"{one.n:,}",
            }
        )
    return [Table(title, rows)]


def _same_images(one: Predictions, two: Predictions) -> bool:
    return one.source == two.source and all(
        np.array_equal(*pair) for pair in ((one.labels, two.labels), (one.positions, two.positions))
    )

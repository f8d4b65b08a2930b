"""Compare several runs: curves, accuracy, parameters, speed, and agreement image by image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vit_scale.evaluation.intervals import wilson_interval
from vit_scale.inspect import plots
from vit_scale.inspect.curves import median_speed
from vit_scale.inspect.feature_sections import Nearest
from vit_scale.inspect.html import Note, Part, Picture, Table
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.predictions import Predictions, calibration


class Inspection(NamedTuple):
    """A run, and what is measured of it.

    Attributes:
      run: it.
      predictions: on the labelled images; None if there are no such images, or no head.
      nearest: how often an image's nearest neighbour has its label; None without labels.
    """

    run: InspectedRun
    predictions: Predictions | None
    nearest: Nearest | None = None


def measurements(inspection: Inspection) -> dict:
    """What is measured of one run, for JSON; None where it could not be."""
    run, predictions, nearest = inspection
    devices = (run.report or run.metadata).get("devices", {})
    measured: dict = {"split": None, "n": 0, "accuracy": None, "loss": None, "ece": None}
    if predictions is not None:
        measured = {
            "split": predictions.source,
            "n": predictions.n,
            "accuracy": predictions.accuracy,
            "loss": float(predictions.losses.mean()),
            "ece": calibration(predictions.probabilities, predictions.labels).ece,
        }
    return {
        "run": str(run.folder),
        "step": run.step,
        **measured,
        "nearest": nearest.share if nearest else None,
        "nearest_n": nearest.n if nearest else 0,
        "nearest_split": nearest.source if nearest else None,
        "parameters": run.parameter_count,
        "resolution": list(run.size),
        "images_per_second": median_speed(run.curves),
        "devices": f"{devices.get('count', '?')} x {devices.get('kind', '?')}",
    }


def format_row(row: dict) -> dict[str, str]:
    """Format the measurements of one run as text cells."""
    speed, loss = row["images_per_second"], row["loss"]
    return {
        "run": row["run"],
        "step": f"{row['step']:,}",
        "evaluated on": row["split"] or "-",
        "n": f"{row['n']:,}",
        "accuracy": _percent(row["accuracy"]),
        "loss": "-" if loss is None else f"{loss:.4f}",
        "ECE": _percent(row["ece"]),
        "nearest has the class": _percent(row["nearest"]),
        "parameters": f"{row['parameters']:,}",
        "resolution": " x ".join(map(str, row["resolution"])),
        "images/s": "-" if speed is None else f"{speed:,.0f} on {row['devices']}",
    }


def compare(inspections: Sequence[Inspection]) -> list[Part]:
    """The parts of the report that compare two or more runs."""
    rows = [measurements(inspection) for inspection in inspections]
    names = [inspection.run.name for inspection in inspections]
    steps = ", ".join(f"{n} (step {row['step']:,})" for n, row in zip(names, rows, strict=True))
    curves = {inspection.run.name: inspection.run.curves for inspection in inspections}
    cfgs = [inspection.run.cfg for inspection in inspections]
    return [
        Table(
            "Summary",
            [format_row(row) | {"run": name} for name, row in zip(names, rows, strict=True)],
        ),
        Picture("measures", f"{_quality(rows).capitalize()}, parameters, speed", _caption(rows),
                plots.plot_comparison(names, _measures(rows), steps)),
        Picture("curves", "Training curves", "Solid lines: training. Dashed lines: evaluation.",
                plots.plot_curves(curves, f"Training: {steps}", cfgs)),
        _agreement(inspections),
    ]  # fmt: skip


def _quality(rows: Sequence[dict]) -> str:
    """What the runs are compared by: of runs that all have no head, by their features."""
    return "accuracy" if any(row["n"] for row in rows) else "nearest"


def _caption(rows: Sequence[dict]) -> str:
    what, prefix = "Accuracy", ""
    if _quality(rows) == "nearest":
        what, prefix = "The share of images whose nearest neighbour is of their class,", "nearest_"
    measured = {(row[f"{prefix}split"], row[f"{prefix}n"]) for row in rows if row[f"{prefix}n"]}
    text = "; ".join(f"n = {n:,} images of {split}" for split, n in sorted(measured))
    return (
        f"{what} with its 95 % Wilson interval ({text or 'not measured'}). Training throughput "
        "is the median over the rows of metrics.jsonl, on the devices in the table."
    )


def _measures(rows: Sequence[dict]) -> dict[str, dict]:
    quality = _quality(rows)
    shares = [row[quality] for row in rows]
    counts = [row["n" if quality == "accuracy" else "nearest_n"] for row in rows]
    bounds = [
        (0, 0) if share is None else wilson_interval(round(share * n), n)
        for share, n in zip(shares, counts, strict=True)
    ]
    label = {"accuracy": "accuracy, %", "nearest": "nearest has the class, %"}[quality]
    speeds = [row["images_per_second"] for row in rows]
    return {
        label: {
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


def _agreement(inspections: Sequence[Inspection]) -> Part:
    """How often the first run and each other one are right about the same image."""
    (first, one, _), *others = inspections
    rows, title = [], f"Agreement with {first.name}, step {first.step:,}, image by image"
    for run, two, _ in others:
        if one is None or two is None or not _same_images(one, two):
            return Note(title, "Not available: the runs have no predictions of the same images.")
        hits = [one.correct & two.correct, one.correct & ~two.correct, two.correct & ~one.correct]
        both, only_one, only_two = (int(np.sum(correct)) for correct in hits)
        rows.append(
            {
                "run": run.name,
                "step": f"{run.step:,}",
                "both correct": f"{both:,}",
                f"only {first.name} correct": f"{only_one:,}",
                "only this run correct": f"{only_two:,}",
                "both wrong": f"{one.n - both - only_one - only_two:,}",
                "n": f"{one.n:,}",
            }
        )
    return Table(title, rows)


def _same_images(one: Predictions, two: Predictions) -> bool:
    return one.source == two.source and all(
        np.array_equal(*pair) for pair in ((one.labels, two.labels), (one.positions, two.positions))
    )

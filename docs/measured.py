"""Tables and pictures of the manual, made from the run folders in results/."""

import json
import os
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "results"

from vit_scale.evaluation.intervals import wilson_interval  # noqa: E402
from vit_scale.runs import report  # noqa: E402
from vit_scale.sweep import format_sweep  # noqa: E402

BLOCK = "<!-- results: "  # in a page, then what to show, "-->", the table, and "<!-- end -->"
FILLED = re.compile(rf"({BLOCK}(.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Make the tables of a page anew."""
    return FILLED.sub(lambda block: f"{block[1]}{show(block[2])}\n{block[3]}", text)


def show(what: str) -> str:
    """Return a table: of run folders below results/, of a sweep there, or one of TABLES."""
    if what in TABLES:
        return report.table(TABLES[what](), markdown=True)
    if what.startswith("sweep "):
        return format_sweep(read(what.replace(" ", "/"), "sweep.json"), markdown=True)
    before = os.getcwd()
    os.chdir(ROOT)  # runs are shown by their paths in the repository
    try:
        return report.table(report.rows([f"results/{run}" for run in what.split()]), markdown=True)
    finally:
        os.chdir(before)


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


# Pretraining methods

METHODS = {
    "supervised": "supervised, 200 classes",
    "mae": "MAE",
    "dino": "DINO",
    "ibot": "DINO and iBOT",
    "lejepa": "LeJEPA",
}


def pretraining_methods() -> list[dict[str, Any]]:
    """A row for each method, then those that were not pretrained."""
    rows = []
    for method, title in METHODS.items():
        if (RESULTS / "pretraining" / method).exists():
            probes = read(f"pretraining/{method}", "probe.json")
            rows.append(
                {
                    "pretraining": title,
                    "CPU min": cpu_minutes(f"pretraining/{method}"),
                    "kNN": accuracy(probes["knn"]),
                    "linear probe": accuracy(probes["linear"]),
                    **fine_tuning(f"pretraining/finetune-{method}"),
                }
            )
    for run in ("finetune-none", "scratch"):
        if (RESULTS / "pretraining" / run).exists():
            none = {"pretraining": "none", "CPU min": 0, "kNN": None, "linear probe": None}
            rows.append({**none, **fine_tuning(f"pretraining/{run}")})
    return rows


def fine_tuning(run: str) -> dict[str, Any]:
    return {
        "CPU min on CIFAR-10": cpu_minutes(run),
        "its steps": read(run)["step"],
        "accuracy": accuracy(read(run)["eval"]),
        "n": read(run)["eval"]["n"],
    }


TABLES = {"pretraining methods": pretraining_methods}

# Pictures

PAIRS = (
    ("Fractals at 32 px", "quickstart/scratch-32", "quickstart/finetune-32"),
    ("Fractals at 64 px", "quickstart/scratch-64", "quickstart/finetune-64"),
    ("CIFAR-10 (JPEG q75) at 96 px", "cifar_from_scratch-Ti", "cifar_from_tiny_imagenet-Ti"),
)


def pretraining() -> str:
    """Bars: accuracy after the same fine-tuning, from random and from pretrained parameters.

    Greys and the blue are legible on white and on black.
    """
    text, colours, scale, y = "#7a828e", ("#9aa3af", "#4f6bed"), 4.3, 60
    parts = [
        f'<rect x="{x}" y="4" width="13" height="13" rx="2" fill="{colour}"/>'
        f'<text x="{x + 20}" y="16">{label}</text>'
        for x, colour, label in zip(
            (0, 225), colours, ("from random parameters", "from pretrained ones"), strict=True
        )
    ]
    for title, *runs in PAIRS:
        reports = [read(run) for run in runs]
        n = reports[0]["eval"]["n"]
        parts.append(
            f'<text x="0" y="{y - 8}"><tspan class="name">{title}</tspan> (n = {n:,})</text>'
        )
        for row, (content, colour) in enumerate(zip(reports, colours, strict=True)):
            share, top = 100 * content["eval"]["accuracy"], y + 23 * row
            parts.append(
                f'<rect x="0" y="{top}" width="{share * scale:.1f}" height="20" rx="2" '
                f'fill="{colour}"/>'
                f'<text x="{share * scale + 8:.1f}" y="{top + 15}">{share:.2f} %</text>'
            )
        y += 84
    style = f"text{{font:15px sans-serif;fill:{text}}}.name{{font-weight:bold}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="480" viewBox="0 0 480 {y - 32}" '
        'role="img" aria-label="Accuracy after fine-tuning, from random and from pretrained '
        f'parameters"><style>{style}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


# Colours that differ for colour-blind readers, on white and on black (Okabe & Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a828e")
LEFT, TOP, WIDTH, HEIGHT, LEGEND = 44, 26, 430, 240, 190  # pixels


def curves(series: dict[str, list[tuple[float, float]]], title: str, label: str) -> str:
    """Draw accuracies in [0, 1] over `label`, a line for each series, as SVG."""
    points = [point for line in series.values() for point in line]
    most = max(x for x, _ in points)
    low = int(min(10 * y for _, y in points)) / 10
    high = min(1.0, (int(max(10 * y for _, y in points)) + 1) / 10)

    def position(x: float, y: float) -> tuple[float, float]:
        return LEFT + WIDTH * x / most, TOP + HEIGHT * (high - y) / (high - low)

    parts = [f'<text class="name" x="0" y="14">{title}</text>']
    for tenth in range(round(10 * low), round(10 * high) + 1):
        _, y = position(0, tenth / 10)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{WIDTH}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10 * tenth} %</text>'
        )
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200) if most / s <= 8)
    for x in range(0, int(most) + 1, step):
        left, bottom = position(x, low)
        parts.append(f'<text x="{left:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{x}</text>')
    end = f'x="{LEFT + WIDTH}" y="{TOP + HEIGHT + 36}"'
    parts.append(f'<text {end} text-anchor="end">{label}</text>')
    for row, ((name, line), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (position(*point) for point in line))
        parts.append(f'<path fill="none" stroke="{colour}" stroke-width="2" d="M{path}"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in (position(*point) for point in line)
        ]
        y = TOP + 12 + 22 * row
        parts.append(
            f'<rect x="{LEFT + WIDTH + 16}" y="{y - 9}" width="14" height="4" fill="{colour}"/>'
            f'<text x="{LEFT + WIDTH + 36}" y="{y - 2}">{name}</text>'
        )
    style = "text{font:13px sans-serif;fill:#7a828e}.name{font-weight:bold}.grid{stroke:#7a828e44}"
    size = f"{LEFT + WIDTH + LEGEND} {TOP + HEIGHT + 44}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + LEGEND}" '
        f'viewBox="0 0 {size}" role="img" aria-label="{title}"><style>{style}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def evaluations(run: str, began: float = 0.0) -> list[tuple[float, float]]:
    """(CPU minutes, accuracy) of a run's evaluations; a step costs the same at any time."""
    steps, minutes = read(run)["step"], cpu_minutes(run)
    rows = map(json.loads, (RESULTS / run / "metrics.jsonl").read_text().splitlines())
    return [
        (began + minutes * row["step"] / steps, row["eval/accuracy"])
        for row in rows
        if "eval/accuracy" in row
    ]


def pretraining_curves() -> str:
    """Draw the held-out accuracy while fine-tuning, after the time of pretraining."""
    series = {
        title: evaluations(f"pretraining/finetune-{method}", cpu_minutes(f"pretraining/{method}"))
        for method, title in METHODS.items()
        if (RESULTS / "pretraining" / method).exists()
    }
    series["none"] = evaluations("pretraining/scratch")
    title = "Held-out accuracy on CIFAR-10 (JPEG q75), n = 1,000"
    return curves(series, title, "CPU minutes, pretraining included")

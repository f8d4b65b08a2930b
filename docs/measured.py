"""Tables and pictures of the manual, made from the run folders in results/."""

import os
import re
from collections.abc import Callable
from typing import Any

import cifar10
from drawing import curves
from run_files import RESULTS, ROOT, accuracy, cpu_minutes, evaluations, read

from vit_scale.runs import report
from vit_scale.sweep import format_sweep

BLOCK = "<!-- results: "  # in a page, then what to show, "-->", the table, and "<!-- end -->"
FILLED = re.compile(rf"({BLOCK}(.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Make the tables of a page anew."""
    return FILLED.sub(lambda block: f"{block[1]}{show(block[2])}\n{block[3]}", text)


def show(what: str) -> str:
    """Return a table of run folders below results/ or of a sweep there, or what has a name."""
    if what in TABLES:
        return report.table(TABLES[what](), markdown=True)
    if what in cifar10.COMMANDS:
        return cifar10.COMMANDS[what]()
    if what.startswith("sweep "):
        return format_sweep(read(what.replace(" ", "/"), "sweep.json"), markdown=True)
    before = os.getcwd()
    os.chdir(ROOT)  # runs are shown by their paths in the repository
    try:
        return report.table(report.rows([f"results/{run}" for run in what.split()]), markdown=True)
    finally:
        os.chdir(before)


# Pretraining methods

METHODS = {
    "supervised": "supervised, 200 classes",
    "fractals": "supervised, fractals of 1,000 classes",
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


TABLES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "pretraining methods": pretraining_methods,
    **cifar10.TABLES,
}

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

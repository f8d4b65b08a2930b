"""Tables and pictures of the runs on CIFAR-10 in results/cifar10, ours and peers'.

A row is a run folder, or the report of benchmarks/timm_training.py. What was not run has none.
"""

from typing import Any

from drawing import curves
from run_files import RESULTS, accuracy, cpu_minutes, evaluations, read

TRAINING_IMAGES = 50_000  # timm's epochs
SCRATCH = {  # run: its row in the table, its line in the picture
    "hybrid": "ViT on a CNN's features",
    "patch": "ViT, patches of 4 px",
    "tutorial": "the tutorial's ViT, patches of 4 px",
    "timm-patch": "ViT, patches of 4 px, by timm",
    "timm-tutorial": "the tutorial's ViT, by timm",
}
REACHED = (0.8, 0.9)  # accuracies on the held-out images whose time is given


def names(table: dict[str, str]) -> list[str]:
    return [name for name in table if (RESULTS / "cifar10" / name / "report.json").exists()]


def rows(table: dict[str, str]) -> list[dict[str, Any]]:
    return [row(f"cifar10/{name}", table[name]) for name in names(table)]


def row(run: str, title: str) -> dict[str, Any]:
    report = read(run)
    by_us = "peer" not in report
    batch = read(run, "run.json")["config"]["data"]["batch"] if by_us else None
    return {
        "model": title,
        "parameters": report.get("parameters"),
        "images seen": report["step"] * batch if batch else report["epochs"] * TRAINING_IMAGES,
        "FLOPs": report.get("flops"),
        "CPU min": cpu_minutes(run) if by_us else report["cpu"] / 60,
        "accuracy": accuracy(report["eval"]),
        "n": report["eval"]["n"],
        **{f"min to {100 * share:.0f} %": minutes_to(run, share) for share in REACHED},
    }


def curve(run: str) -> list[tuple[float, float]]:
    """Return (CPU minutes, accuracy): on the held-out images, and of peers on the test split."""
    report = read(run)
    if "peer" not in report:
        return evaluations(run)
    minutes, count = report["cpu"] / 60, len(report["curve"])
    return [((i + 1) * minutes / count, share) for i, share in enumerate(report["curve"])]


def minutes_to(run: str, share: float) -> float | None:
    """Return the CPU minutes of the first evaluation that reached this accuracy."""
    return next((minutes for minutes, reached in curve(run) if reached >= share), None)


def scratch_curves() -> str:
    lines = {SCRATCH[name]: curve(f"cifar10/{name}") for name in names(SCRATCH)}
    return curves(lines, "Accuracy on CIFAR-10 (JPEG q75), from scratch", "CPU minutes")


TABLES = {"cifar10 scratch": lambda: rows(SCRATCH)}

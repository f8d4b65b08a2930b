"""Tables and pictures of the runs on CIFAR-10 in results/cifar10, ours and peers'.

A row is a run folder, or the report of benchmarks/timm_training.py; runs without a report are left
out.
"""

import functools
from typing import Any, NamedTuple

from drawing import curves
from run_files import RESULTS, accuracy, cpu_minutes, evaluations, read

TRAINING_IMAGES = 50_000  # of an epoch of timm's script
REACHED = (0.8, 0.9)  # held-out accuracies to give the time of
SPEEDRUN = "vit-scale train --config vit_cifar_speedrun"


class Run(NamedTuple):
    """A row of a table, and a line of its picture."""

    title: str
    command: str
    before: str = ""  # the run whose parameters it starts from; its cost is added


# By the name of the folder.
PRETRAINING = {"mae": Run("a masked autoencoder, pretraining for the next", f"{SPEEDRUN}:mae")}
SCRATCH = {
    "hybrid": Run("ViT on a CNN's features", SPEEDRUN),
    "patch": Run(
        "ViT, patches of 4 px",
        f"{SPEEDRUN}:patch --config.init.source=runs/vit_cifar_speedrun-mae",
        before="mae",
    ),
    "tutorial": Run("the tutorial's ViT, patches of 4 px", f"{SPEEDRUN}:tutorial"),
}
GROUPS = {"scratch": SCRATCH}


def finished(group: dict[str, Run]) -> dict[str, Run]:
    """Return the runs that have a report."""
    return {k: v for k, v in group.items() if (RESULTS / "cifar10" / k / "report.json").exists()}


def rows(group: dict[str, Run]) -> list[dict[str, Any]]:
    return [row(name, run) for name, run in finished(group).items()]


def commands(group: dict[str, Run]) -> str:
    """Return a block of code, each command after its row's title."""
    runs = []
    for run in finished(group).values():
        runs += [PRETRAINING[run.before], run] if run.before else [run]
    lines = [f"# {run.title}\n{fold(run.command)}" for run in runs]
    return "\n".join(["```bash", *lines, "```"])


def fold(command: str, width: int = 100) -> str:
    """Break a command into lines at its flags."""
    lines = [""]
    for part in command.replace(" --", "\n--").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


class Cost(NamedTuple):
    """What a run took."""

    images: int
    flops: float | None
    minutes: float  # of CPU time


def cost(name: str) -> Cost:
    """Return the cost of one run; FLOPs of ours only."""
    report = read(f"cifar10/{name}")
    if "peer" in report:
        return Cost(report["epochs"] * TRAINING_IMAGES, None, report["cpu"] / 60)
    batch = read(f"cifar10/{name}", "run.json")["config"]["data"]["batch"]
    return Cost(report["step"] * batch, report["flops"], cpu_minutes(f"cifar10/{name}"))


def row(name: str, run: Run) -> dict[str, Any]:
    """Return a row of a table, with the cost of the run before; times are of our runs only."""
    report, parts = read(f"cifar10/{name}"), [cost(n) for n in (run.before, name) if n]
    flops = [part.flops for part in parts]
    return {
        "model": run.title,
        "parameters": report.get("parameters"),
        "images seen": sum(part.images for part in parts),
        "FLOPs": None if None in flops else sum(flops),
        "CPU min": sum(part.minutes for part in parts),
        "accuracy": accuracy(report["eval"]),
        "n": report["eval"]["n"],
        **{f"min to {100 * share:.0f} %": minutes_to(name, run, share) for share in REACHED},
    }


def curve(name: str, run: Run) -> list[tuple[float, float]]:
    """Return (CPU minutes, accuracy): on the held-out images, and of peers on the test split."""
    report = read(f"cifar10/{name}")
    if "peer" not in report:
        began = cost(run.before).minutes if run.before else 0
        return evaluations(f"cifar10/{name}", began)
    minutes, count = report["cpu"] / 60, len(report["curve"])
    return [((i + 1) * minutes / count, share) for i, share in enumerate(report["curve"])]


def minutes_to(name: str, run: Run, share: float) -> float | None:
    """Return the CPU minutes of our first evaluation that reached this held-out accuracy."""
    if "peer" in read(f"cifar10/{name}"):
        return None
    return next((minutes for minutes, reached in curve(name, run) if reached >= share), None)


def scratch_curves() -> str:
    """Draw the runs from scratch: ours on the 1,000 held-out images, peers' on the test split."""
    lines = {run.title: curve(name, run) for name, run in finished(SCRATCH).items()}
    return curves(lines, "Accuracy on CIFAR-10 (JPEG q75), from scratch", "CPU minutes")


TABLES = {f"cifar10 {name}": functools.partial(rows, runs) for name, runs in GROUPS.items()}
COMMANDS = {
    f"commands cifar10 {name}": functools.partial(commands, runs) for name, runs in GROUPS.items()
}

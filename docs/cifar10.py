"""Tables and pictures of the runs on CIFAR-10 in results/cifar10, ours and peers'.

A row is a run folder, or the report of benchmarks/timm_training.py; runs without a report are left
out.
"""

import functools
import json
import re
import shlex
from typing import Any, NamedTuple

from drawing import curves
from run_files import RESULTS, accuracy, cpu_minutes, evaluations, read

TRAINING_IMAGES = 50_000  # of an epoch of timm's script
REACHED = (0.8, 0.9)  # held-out accuracies to give the time of
SPEEDRUN = "vit-scale train --config vit_cifar_speedrun"


class Run(NamedTuple):
    """A row of a table, and a line of its picture; a peer's command is in its report."""

    title: str
    command: str = ""
    before: str = ""  # the run whose parameters it starts from; its cost is added


def compared(model: str, title: str, flags: str = "") -> Run:
    return Run(title, f"vit-scale train --config compare_architectures:{model}{flags}")


def dinov2(title: str, start: str = "") -> Run:
    source = "" if start == ":random" else " --config.init.source=DIR"
    return Run(title, f"vit-scale train --config vit_dinov2_cifar_cpu{start}{source}")


def transfer(title: str, stage: str, flags: str = "", before: str = "") -> Run:
    return Run(title, f"vit-scale train --config compare_transfer:{stage}{flags}", before)


# By the name of the folder in results/cifar10.
PRETRAINING = {
    "mae": Run("a masked autoencoder, pretraining for the next", f"{SPEEDRUN}:mae"),
    "transfer-pretrain": transfer(
        "a masked autoencoder on Tiny-ImageNet-200 at 64 px, pretraining for the next", "pretrain"
    ),
}
SCRATCH = {
    "hybrid": Run("ViT on a CNN's features", SPEEDRUN),
    "patch": Run(
        "ViT, patches of 4 px",
        f"{SPEEDRUN}:patch --config.init.source=runs/vit_cifar_speedrun-mae",
        before="mae",
    ),
    "timm-patch": Run("the same ViT, from labels alone, by timm"),
    "tutorial": Run("the tutorial's ViT, patches of 4 px", f"{SPEEDRUN}:tutorial"),
    "timm-tutorial": Run("the tutorial's ViT by timm"),
}
TEACHER = " --config.distill.teacher=runs/compare_architectures-cnn"
GROUPS = {
    "scratch": SCRATCH,
    "architectures": {
        "cnn": compared("cnn", "the slides' CNN"),
        "resnet": compared("resnet", "ResNet-20"),
        "hybrid-40": compared("hybrid", "ViT on a CNN's features"),
        "vit": compared("vit", "ViT, patches of 4 px"),
        "distilled": compared("distilled", "the same ViT, taught by that CNN", TEACHER),
    },
    "transfer": {
        "transfer-finetune": transfer(
            "from Tiny-ImageNet-200 at 64 px",
            "finetune",
            " --config.init.source=runs/compare_transfer-pretrain",
            before="transfer-pretrain",
        ),
        "transfer-scratch": transfer("from scratch", "scratch"),
    },
    "dinov2": {
        "dinov2": dinov2("fine-tuned"),
        "lora": dinov2("adapters (LoRA, rank 16) and the head", ":lora"),
        "random": dinov2("from random parameters", ":random"),
    },
}
PILOT = (
    f"{SPEEDRUN} --config.steps=1150 --config.optim.warmup=100 --config.augment.cutmix=0"
    " --config.augment.until=1 --config.eval.every=0 --config.eval.final="
    " --config.checkpoint.every=300"
)
PILOTS = {  # short runs, and runs stopped early, by which the recipe was chosen
    "pilot-cnn4": Run("CNN's features in patches of 4 (chosen)", PILOT),
    "pilot-cnn8": Run(
        "in patches of 8, of twice the width",
        f"{PILOT} --config.model.variant=CNN+Ti/8 --config.model.width=256",
    ),
    "patch-cutmix": Run(
        "ViT, patches of 4 px, without pretraining, stopped at a seventh of 12,600 steps",
        f"{SPEEDRUN}:patch --until 1800 --config.steps=12600 --config.model.class_token=False"
        " --config.model.dtype=float32",
    ),
}


def finished(group: dict[str, Run]) -> dict[str, Run]:
    """Return the runs that have a report, and the pilots that were evaluated."""
    file = "metrics.jsonl" if group is PILOTS else "report.json"
    return {k: v for k, v in group.items() if (RESULTS / "cifar10" / k / file).exists()}


def rows(group: dict[str, Run]) -> list[dict[str, Any]]:
    return [row(name, run, timed=group is SCRATCH) for name, run in finished(group).items()]


def pilots() -> list[dict[str, Any]]:
    """Return a row for each of PILOTS: its last evaluation on the held-out images, and its cost."""
    table = []
    for name, run in finished(PILOTS).items():
        folder = RESULTS / "cifar10" / name
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        *_, last = (line for line in lines if "eval/accuracy" in line)
        held = {"accuracy": last["eval/accuracy"], "n": last["eval/n"]}
        goodput = read(f"cifar10/{name}", "goodput.json")
        share = last["step"] / goodput["attempts"][-1]["step"]  # of a stopped run's steps
        table.append(
            {
                "tried": run.title,
                "parameters": parameters(name),
                "steps": last["step"],
                "CPU min": share * cpu_minutes(f"cifar10/{name}"),
                "held-out accuracy": accuracy(held),
                "n": held["n"],
            }
        )
    return table


def parameters(name: str) -> int:
    """Return the number of a run's parameters; of a stopped run, from the table in its run.json."""
    if (RESULTS / "cifar10" / name / "report.json").exists():
        return read(f"cifar10/{name}")["parameters"]
    (total,) = re.findall(r"Total: ([\d,]+)", read(f"cifar10/{name}", "run.json")["parameters"])
    return int(total.replace(",", ""))


def commands(group: dict[str, Run]) -> str:
    """Return a block of code, each command after its row's title."""
    lines = []
    for name, run in finished(group).items():
        if run.before:
            before = PRETRAINING[run.before]
            lines.append(f"# {before.title}\n{fold(before.command)}")
        lines.append(f"# {run.title}\n{fold(run.command or peer_command(name))}")
    return "\n".join(["```bash", *lines, "```"])


def peer_command(name: str) -> str:
    """Return the command of benchmarks/timm_training.py; PEERS has torch, TIMM is a clone."""
    report = read(f"cifar10/{name}")
    return (
        "PYTHONPATH=PEERS:TIMM python -m benchmarks.timm_training --clone TIMM"
        f" --data .data/cifar10-jpeg --minutes {report['minutes']:g} --out results/cifar10/{name}"
        f" -- {shlex.join(report['flags'])}"
    )


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


def row(name: str, run: Run, timed: bool) -> dict[str, Any]:
    """Return a row of a table, with the cost of the run before; `timed` adds times, of our runs."""
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
        **{
            f"min to {100 * share:.0f} %": minutes_to(name, run, share)
            for share in REACHED
            if timed
        },
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
TABLES["cifar10 pilots"] = pilots
COMMANDS = {
    f"commands cifar10 {name}": functools.partial(commands, runs) for name, runs in GROUPS.items()
}
COMMANDS["commands cifar10 pilots"] = functools.partial(commands, PILOTS)

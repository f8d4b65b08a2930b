"""Tables and pictures of the runs on CIFAR-10 in results/cifar10, ours and peers'.

A row is a run folder, or the report of benchmarks/timm_training.py; runs without a report are left
out.
"""

import functools
import json
import re
import shlex
from collections.abc import Callable
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
    before: str = ""  # the run that it starts or learns from; its cost is added


def compared(model: str, title: str, flags: str = "", before: str = "") -> Run:
    return Run(title, f"vit-scale train --config compare_architectures:{model}{flags}", before)


DINOV2 = "vit-scale train --config vit_dinov2_cifar_cpu"
HEAD = " --config.init.source=runs/vit_dinov2_cifar_cpu-head"


def dinov2_pilot(title: str, lr: str, decay: str, source: str) -> Run:
    flags = (
        f"--config.init.source={source} --config.optim.lr={lr} --config.optim.layer_decay={decay}"
        " --config.data.resolution=84 --config.steps=150 --config.optim.warmup=15"
        " --config.eval.every=150 --config.eval.final= --config.checkpoint.every=0"
    )
    return Run(title, f"{DINOV2} {flags}")


def transfer(title: str, stage: str, flags: str = "", before: str = "") -> Run:
    return Run(title, f"vit-scale train --config compare_transfer:{stage}{flags}", before)


# By the name of the folder in results/cifar10. DIR is a folder of weights, HEAD a run.
PRETRAINING = {
    "mae": Run("a masked autoencoder, pretraining for the next", f"{SPEEDRUN}:mae"),
    "dinov2-head": Run("the head alone", f"{DINOV2}:head --config.init.source=DIR"),
    "transfer-pretrain": transfer(
        "a masked autoencoder on Tiny-ImageNet-200 at 64 px, pretraining for the next", "pretrain"
    ),
}
SCRATCH = {
    "hybrid": Run("ViT on a CNN's features", SPEEDRUN),
    "wide": Run("ViT on wider features, at half the resolution", f"{SPEEDRUN}:wide"),
    "long": Run("the same for longer, with CutMix", f"{SPEEDRUN}:long"),
    "patch": Run(
        "ViT, patches of 4 px",
        f"{SPEEDRUN}:patch --config.init.source=runs/vit_cifar_speedrun-mae",
        before="mae",
    ),
    "timm-patch": Run("a plain ViT of its size, from labels alone, by timm"),
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
        "distilled": compared(
            "distilled", "the same ViT, taught by that CNN", TEACHER, before="cnn"
        ),
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
        "dinov2-head": PRETRAINING["dinov2-head"],
        "dinov2": Run("then all of it", f"{DINOV2}{HEAD}", before="dinov2-head"),
        "lora": Run("or then adapters (LoRA, rank 16)", f"{DINOV2}:lora{HEAD}", "dinov2-head"),
        "random": Run("from random parameters", f"{DINOV2}:random"),
    },
}
BEST = {  # the README's rows
    "hybrid": "a ViT on a CNN's features, from scratch",
    "patch": "a ViT on patches of 4 px, first as a masked autoencoder",
    "distilled": "a ViT taught by a CNN",
    "transfer-finetune": "a ViT pretrained on Tiny-ImageNet-200",
    "dinov2": "a pretrained ViT-S/14",
}
PILOT = (
    f"{SPEEDRUN} --config.steps=1150 --config.optim.warmup=100 --config.augment.cutmix=0"
    " --config.augment.until=1 --config.eval.every=0 --config.eval.final="
    " --config.checkpoint.every=300"
)
WIDE = (
    f"{SPEEDRUN}:wide --config.steps=380 --config.optim.warmup=50 --config.data.batch=128"
    " --config.augment.erase=0 --config.augment.until=1 --config.augment.smoothing=.1"
    " --config.eval.every=0 --config.eval.final= --config.checkpoint.every=0"
)
SPEEDRUN_PILOTS = {  # short runs, and runs stopped early, by which the recipe was chosen
    "pilot-cnn4": Run("CNN's features in patches of 4 (chosen)", PILOT),
    "pilot-cnn8": Run(
        "in patches of 8, of twice the width",
        f"{PILOT} --config.model.variant=CNN+Ti/8 --config.model.width=256",
    ),
    "pilot-lr-4e-3": Run(
        "the same with 2 blocks for 1 epoch, lr 4e-3", f"{WIDE} --config.optim.lr=4e-3"
    ),
    "pilot-lr-1e-2": Run("lr 1e-2 (chosen)", WIDE),
    "pilot-lr-2.5e-2": Run("lr 2.5e-2", f"{WIDE} --config.optim.lr=2.5e-2"),
    "patch-cutmix": Run(
        "ViT, patches of 4 px, without pretraining, stopped at a seventh of 12,600 steps",
        f"{SPEEDRUN}:patch --until 1800 --config.steps=12600 --config.model.class_token=False"
        " --config.model.dtype=float32",
    ),
}
DINOV2_PILOTS = {
    "pilot-zeros": dinov2_pilot("a head of zeros, lr 1e-4, layer decay .75", "1e-4", ".75", "DIR"),
    "pilot-zeros-3e-5": dinov2_pilot("a head of zeros, lr 3e-5, no decay", "3e-5", "1", "DIR"),
    "pilot-zeros-2e-4": dinov2_pilot("a head of zeros, lr 2e-4, no decay", "2e-4", "1", "DIR"),
    "pilot-probe": Run(
        "the head alone, HEAD of the next two",
        f"{DINOV2}:head --config.init.source=DIR --config.data.resolution=84 --config.steps=300"
        " --config.optim.warmup=15 --config.eval.every=150 --config.eval.final="
        " --config.checkpoint.every=150",
    ),
    "pilot-head": dinov2_pilot("a trained head, lr 1e-4, layer decay .75", "1e-4", ".75", "HEAD"),
    "pilot-head-3e-5": dinov2_pilot("a trained head, lr 3e-5, no decay", "3e-5", "1", "HEAD"),
}
PILOTS = {"pilots": SPEEDRUN_PILOTS, "dinov2 pilots": DINOV2_PILOTS}


def finished(group: dict[str, Run]) -> dict[str, Run]:
    """Return the runs that have a report, and the pilots that were evaluated."""
    file, needed = "report.json", ""
    if group in PILOTS.values():
        file, needed = "metrics.jsonl", "eval/accuracy"
    found = {name: RESULTS / "cifar10" / name / file for name in group}
    return {k: group[k] for k, f in found.items() if f.exists() and needed in f.read_text()}


def rows(group: dict[str, Run]) -> list[dict[str, Any]]:
    return [row(name, run, timed=group is SCRATCH) for name, run in finished(group).items()]


def pilots(group: dict[str, Run]) -> list[dict[str, Any]]:
    """Return a row for each pilot: its last evaluation on the held-out images, and its cost."""
    table = []
    for name, run in finished(group).items():
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
        if run.before in PRETRAINING and run.before not in group:
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


def summary() -> list[dict[str, Any]]:
    """Return the README's rows: of the best runs, what they took and reached."""
    columns = ("model", "parameters", "CPU min", "accuracy", "n")
    every = {name: run for group in GROUPS.values() for name, run in finished(group).items()}
    chosen = {
        name: Run(title, before=every[name].before) for name, title in BEST.items() if name in every
    }
    table = [row(name, run, timed=False) for name, run in chosen.items()]
    return [{column: line[column] for column in columns} for line in table]


def curve(name: str, run: Run) -> list[tuple[float, float]]:
    """Return (CPU minutes, accuracy): on the held-out images, and of peers on the test split."""
    report = read(f"cifar10/{name}")
    if "peer" not in report:
        began = cost(run.before).minutes if run.before else 0
        return evaluations(f"cifar10/{name}", began)
    minutes = report["cpu"] / 60 / report["epochs"]  # of an epoch
    return [(minutes * epochs, share) for epochs, share in report["curve"]]


def minutes_to(name: str, run: Run, share: float) -> float | None:
    """Return the CPU minutes of our first evaluation that reached this held-out accuracy."""
    if "peer" in read(f"cifar10/{name}"):
        return None
    return next((minutes for minutes, reached in curve(name, run) if reached >= share), None)


def scratch_curves() -> str:
    """Draw the runs from scratch: ours on the 1,000 held-out images, peers' on the test split."""
    lines = {run.title: curve(name, run) for name, run in finished(SCRATCH).items()}
    return curves(lines, "Accuracy on CIFAR-10 (JPEG q75), from scratch", "CPU minutes")


TABLES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    f"cifar10 {name}": functools.partial(rows, runs) for name, runs in GROUPS.items()
}
TABLES["cifar10 summary"] = summary
TABLES |= {f"cifar10 {name}": functools.partial(pilots, runs) for name, runs in PILOTS.items()}
COMMANDS = {
    f"commands cifar10 {name}": functools.partial(commands, runs)
    for name, runs in {**GROUPS, **PILOTS}.items()
}

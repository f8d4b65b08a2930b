"""Training speed in bfloat16 beside timm with torch.compile: images/s, MFU, memory, data.

    python -m benchmarks.speed --data-note "CIFAR-10 (JPEG q75)"

Each contender (speed_contender.py) lives in a process of its own and trains on one batch that stays
on the device: AdamW, the same architecture and batch. They take turns, all others idle, so that
whatever changes the device's speed meets each alike. How long the trainer itself waits for data
comes from a short run of it on CIFAR-10, enlarged and augmented on the device. A finished case is
kept, so that a later piece goes on with the next.
"""

import contextlib
import os
import shutil
import sys
from typing import Any

from benchmarks.contender import Contender
from benchmarks.measurement import HERE, Measurement, Session, main, spread
from benchmarks.speed_config import BATCH
from vit_scale import config
from vit_scale.distributed.accelerators import mfu
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.flops import training_flops
from vit_scale.runs.json_files import read_json, write_json

CONFIG = HERE / "speed_config.py"
MEASUREMENT = Measurement(
    name="speed",
    title="Training speed beside timm: Ti/4, S/4 at 32 px; Ti, S, B, L /16 at 224 px; bfloat16",
    data={"cifar-10-batches-bin": "CIFAR-10"},
    configs=tuple(f"{CONFIG}:{case}" for case in BATCH),
    files=("speed.py", "speed_contender.py", "contender.py"),
)
CONTENDERS: dict[str, tuple[str, ...]] = {  # the program, then overrides of its config
    "vit_scale": ("vit_scale",),
    "vit_scale, cudnn attention": ("vit_scale", "model.attention=cudnn"),
    "timm": ("timm",),
}
TOYS = ("vit_scale", "timm")  # cuDNN needs a GPU
TURNS = 7
REAL_DATA = ("data.name=cifar10", "augment.crop=resized", "augment.flip=True", "log.every=25")


def measure(session: Session) -> dict:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # timm's one device is all that anybody gets
    cases = list(BATCH)[:1] if session.toy else list(BATCH)
    return {case: measure_case(session, case) for case in cases}


def measure_case(session: Session, case: str) -> dict:
    """The figures of a case, from an earlier piece if that finished it."""
    name = case.replace("/", "-")
    file = session.workdir / f"{name}.json"
    data = (f"data.path={session.data}", *REAL_DATA)
    trainer = session.train(f"{CONFIG}:{case}", name, *data)
    shutil.rmtree(session.workdir / name / "checkpoints", ignore_errors=True)  # up to 4 GB
    if not file.exists():
        write_json(file, compete(session, case))
    contest = read_json(file)
    session.machine["versions"] |= contest.pop("versions")
    return {**contest, "vit-scale train on CIFAR-10": trainer}


def compete(session: Session, case: str) -> dict:
    """Let the contenders take turns; those that can't take part are None, with the reason."""
    names = TOYS if session.toy else tuple(CONTENDERS)
    rates: dict[str, list[float]] = {}
    results: dict[str, Any] = dict.fromkeys(names)
    absent: dict[str, str] = {}
    versions: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        present = {}
        for name in names:
            try:
                present[name] = stack.enter_context(
                    Contender(
                        "speed_contender",
                        (f"{CONFIG}:{case}", *CONTENDERS[name], *(["--toy"] * session.toy)),
                        lambda: session.seconds_left,
                    )
                )
            except UserError as error:
                absent[name] = str(error)
        for _ in range(TURNS):
            for name, contender in present.items():
                rates.setdefault(name, []).append(contender.ask("turn")["images_per_second"])
        for name, contender in present.items():
            results[name] = standing(contender, rates[name], flops_per_image(f"{CONFIG}:{case}"))
            versions |= contender.description["versions"]
    ratios = {}
    if "timm" in rates:
        ours = {name: mine for name, mine in rates.items() if name != "timm"}
        for name, mine in ours.items():
            pairs = zip(mine, rates["timm"], strict=True)
            ratios[name] = spread([left / right for left, right in pairs])
    return {**results, "absent": absent, "speed over timm's": ratios or None, "versions": versions}


def flops_per_image(config_name: str) -> int:
    """Return a training step's FLOPs, the same for all contenders.

    As in the published figures, all tokens of the last block count, not only [CLS].
    """
    cfg = config.load(config_name)
    cfg.model.update({"pool": "gap", "class_token": True})
    return training_flops(build(cfg.model, config.image_size(cfg)).macs)


def standing(contender: Contender, rates: list[float], flops_each: int) -> dict:
    """What one contender reached."""
    description = contender.description
    speeds = spread(rates)
    return {
        "images_per_second": speeds,
        "mfu": mfu(speeds["median"], flops_each, 1, description["device"]),
        "peak_memory_bytes": contender.ask("memory")["peak_memory_bytes"],
        "parameters": description["parameters"],
        "batch": description["batch"],
        "turns": len(rates),
        "steps_per_turn": description["steps_per_turn"],
    }


if __name__ == "__main__":
    sys.exit(main(MEASUREMENT, measure))

"""Training speed on a CPU beside timm and big_vision: images/s and GFLOP/s, float32 and bfloat16.

    python -m benchmarks.cpu_step --label before
    python -m benchmarks.cpu_step --label after --case tutorial C+Ti/4

Each contender (speed_contender.py) lives in a process of its own and trains on one batch of noise:
AdamW, the same architecture and batch. All are compiled and warmed up first, then they take turns,
all others idle, so that whatever changes the processor's speed meets each alike. Who isn't ready
in time, or needs more than 20 s for a step, is absent, with the reason. torch and timm, and a clone
of big_vision, are looked for on PYTHONPATH. Results are added to --out by label and case, each case
as soon as it is finished.
"""

import argparse
import contextlib
import datetime
import os
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contender import Contender, start_all
from benchmarks.cpu_parts import processor
from benchmarks.cpu_step_config import BATCH
from benchmarks.measurement import HERE, RESULTS, TimeUp, spread
from benchmarks.speed import flops_per_image
from vit_scale.cli.entry import HUGE_PAGES
from vit_scale.errors import UserError
from vit_scale.runs.json_files import read_json, write_json

CONFIG = HERE / "cpu_step_config.py"
BFLOAT16 = "model.dtype=bfloat16"
CONTENDERS: dict[str, tuple[str, ...]] = {  # the program, then overrides of its config
    "vit_scale f32": ("vit_scale",),
    "vit_scale bf16": ("vit_scale", BFLOAT16),
    "timm eager f32": ("timm_eager",),
    "timm eager bf16": ("timm_eager", BFLOAT16),
    "timm compile f32": ("timm",),
    "timm compile bf16": ("timm", BFLOAT16),
    "big_vision f32": ("big_vision",),
    "big_vision bf16": ("big_vision", BFLOAT16),
}
TOYS = ("vit_scale f32",)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLIBC_TUNABLES": HUGE_PAGES,  # for all: `vit-scale train` sets it, the others could
}
TURNS = 7
PAUSE = 0.5  # seconds: OpenMP's threads spin for a while after a turn
DEADLINE = 240.0  # seconds


def measure(
    case: str,
    names: Sequence[str] = tuple(CONTENDERS),
    turns: int = TURNS,
    deadline: float = DEADLINE,
    toy: bool = False,
) -> dict:
    """Let the contenders take turns, those that can; the others are absent, with the reason."""
    flops_each = flops_per_image(f"{CONFIG}:{case}")
    versions: dict[str, str] = {}
    toys = ("--toy",) if toy else ()
    contenders = {
        name: Contender(
            "speed_contender",
            (f"{CONFIG}:{case}", *CONTENDERS[name], *toys),
            lambda: deadline,
            ENVIRONMENT,
        )
        for name in names
    }
    with contextlib.ExitStack() as stack:
        present, absent = start_all(stack, contenders)
        rates = take_turns(present, turns, absent)
        for name in rates:
            versions |= present[name].description["versions"]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "toy": toy,
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        "turns": turns,
        "contenders": {
            name: standing(present[name].description, mine, flops_each)
            for name, mine in rates.items()
        },
        "absent": absent,
        "speed over the best other": ratios(rates),
    }


def take_turns(
    present: Mapping[str, Contender], turns: int, absent: dict[str, str]
) -> dict[str, list[float]]:
    """Return the images/s of each turn; who fails meanwhile moves to `absent`."""
    rates: dict[str, list[float]] = {name: [] for name in present}
    for _ in range(turns):
        for name in list(rates):
            try:
                rates[name].append(present[name].ask("turn")["images_per_second"])
                time.sleep(PAUSE)
            except (UserError, TimeUp) as error:
                absent[name] = str(error)
                del rates[name]
    return rates


def standing(description: dict, rates: Sequence[float], flops_each: int) -> dict[str, Any]:
    """What one contender reached."""
    speeds = spread(rates)
    return {
        "images_per_second": speeds,
        "gflop_per_second": round(speeds["median"] * flops_each / 1e9, 1),
        "parameters": description["parameters"],
        "steps_per_turn": description["steps_per_turn"],
    }


def ratios(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]] | None:
    """Return our speeds over that of the best other, turn by turn; None if there is no other.

    The best has the highest median, whatever its dtype.
    """
    ours = {name: mine for name, mine in rates.items() if name.startswith("vit_scale")}
    others = [theirs for name, theirs in rates.items() if name not in ours]
    if not others:
        return None
    best = max(others, key=statistics.median)
    return {
        name: spread([left / right for left, right in zip(mine, best, strict=True)])
        for name, mine in ours.items()
    }


def table(case: str, figures: dict) -> str:
    """Format the figures of a case: medians, and in brackets the spread over turns."""
    rows = [("", "images/s", "", "GFLOP/s", "over the best other", "")]
    for name, row in figures["contenders"].items():
        speeds = bracketed(row["images_per_second"], ".1f")
        ratio = (figures["speed over the best other"] or {}).get(name)
        rows.append(
            (name, *speeds, f"{row['gflop_per_second']:.1f}")
            + (bracketed(ratio, ".2f") if ratio else ("", ""))
        )
    lines = [f"{case}, {figures['turns']} turns"]
    lines += ["{:18} {:>9} {:19} {:>8}  {:>19} {}".format(*row).rstrip() for row in rows]
    lines += [f"{name:18} absent: {reason}" for name, reason in figures["absent"].items()]
    return "\n".join(lines)


def bracketed(speeds: dict[str, float], form: str) -> tuple[str, str]:
    return f"{speeds['median']:{form}}", f"({speeds['min']:{form}} to {speeds['max']:{form}})"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_step")
    parser.add_argument("--label", required=True, help="name of this state of the code")
    parser.add_argument("--case", nargs="+", choices=BATCH, help="default: all")
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, help="default: all")
    parser.add_argument("--toy", action="store_true", help="one tiny case, only ours: a test")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS.parent / "cpu" / "step.json")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of each (default: {TURNS})")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEADLINE,
        help=f"seconds until a contender has to be ready (default: {DEADLINE:g})",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    cases = args.case or list(BATCH)[: 1 if args.toy else None]
    names = args.contender or (TOYS if args.toy else tuple(CONTENDERS))
    for case in cases:
        figures = measure(case, names, args.turns, args.deadline, args.toy)
        content = read_json(args.out) if args.out.exists() else {}
        content.setdefault(args.label, {})[case] = figures
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, content)
    for case in cases:
        print("\n" + table(case, content[args.label][case]))


if __name__ == "__main__":
    main()

"""Loading photos beside timm and big_vision: images/s of one worker and of all cores.

    python -m benchmarks.photos PHOTOS
    vit-scale data pack PHOTOS PACKED --shorter-side 256
    python -m benchmarks.loader --photos PHOTOS --packed PACKED

Each loader (loader_contender.py) lives in a process of its own and reads random resized crops of
224 px, in batches of 64. They take turns of two seconds, all others waiting for theirs. Who can't
take part is absent, with the reason: timm and torchvision, TensorFlow and a clone of big_vision are
looked for on PYTHONPATH. "images in memory" is CIFAR-10's path, by one thread. Results are written
to --out.
"""

import argparse
import contextlib
import datetime
import os
import pathlib
import statistics
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.contender import Contender, start_all
from benchmarks.cpu_parts import processor
from benchmarks.cpu_step import bracketed, take_turns
from benchmarks.measurement import RESULTS, spread
from vit_scale.data import InMemory
from vit_scale.data.loader import TrainBatches
from vit_scale.runs.json_files import write_json

PROGRAMS = {  # name: (of loader_contender.PROGRAMS, the set that it reads)
    "vit_scale": ("vit_scale", "photos"),
    "vit_scale, threads": ("vit_scale_threads", "photos"),
    "vit_scale, Pillow": ("vit_scale_pillow", "photos"),
    "vit_scale, packed": ("vit_scale_packed", "packed"),
    "vit_scale, packed, threads": ("vit_scale_packed_threads", "packed"),
    "timm": ("timm", "photos"),
    "big_vision": ("big_vision", "photos"),
}
REFERENCE = "timm"
RESAMPLES = ("bicubic", "bilinear")
TURNS = 5
DEADLINE = 120.0  # seconds
IN_MEMORY = 512  # images per batch


def measure(
    folders: dict[str, pathlib.Path], workers: int, resample: str, turns: int, names: Sequence[str]
) -> dict:
    """Let the loaders take turns, each with so many workers; the others are absent."""
    contenders = {
        name: Contender(
            "loader_contender",
            (str(folders[PROGRAMS[name][1]]), PROGRAMS[name][0], str(workers), resample),
            lambda: DEADLINE,
            ENVIRONMENT,
        )
        for name in names
    }
    with contextlib.ExitStack() as stack:
        present, absent = start_all(stack, contenders)
        rates = take_turns(present, turns, absent)
        versions = [present[name].description["versions"] for name in rates]
    reference = rates.get(REFERENCE)
    return {
        "images_per_second": {name: spread(mine) for name, mine in rates.items()},
        "over timm": reference
        and {
            name: spread([left / right for left, right in zip(mine, reference, strict=True)])
            for name, mine in rates.items()
        },
        "absent": absent,
        "versions": {package: v for each in versions for package, v in each.items()},
    }


ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}


def in_memory(turns: int) -> dict[str, float]:
    """Return the images/s of a set of CIFAR-10's size that is in memory, one thread."""
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    source = InMemory("noise", images, draw.randint(0, 10, len(images)), list("0123456789"))
    batches, rates = TrainBatches(source, IN_MEMORY, 0, 0, None, None), []
    for turn in range(turns):
        start, steps = time.perf_counter(), 400
        for step in range(steps):
            batches[turn * steps + step]
        rates.append(steps * IN_MEMORY / (time.perf_counter() - start))
    return spread(rates)


def table(results: dict) -> str:
    """Format the medians, and in brackets the spread over turns."""
    lines = []
    for setting, figures in results["settings"].items():
        lines += ["", setting, "{:27} {:>9} {:20} {:>9}".format("", "images/s", "", "x timm")]
        for name, speeds in figures["images_per_second"].items():
            ratio = (figures["over timm"] or {}).get(name)
            row = (*bracketed(speeds, ".0f"), *(bracketed(ratio, ".2f") if ratio else ("", "")))
            lines.append("{:27} {:>9} {:20} {:>9} {}".format(name, *row).rstrip())
        lines += [f"{name:22} absent: {reason}" for name, reason in figures["absent"].items()]
    speed = bracketed(results["images in memory"], ",.0f")
    return "\n".join([*lines, "", "images in memory            " + " ".join(speed)])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader")
    parser.add_argument("--photos", type=pathlib.Path, required=True, help="an image folder")
    parser.add_argument("--packed", type=pathlib.Path, required=True, help="a pack of it")
    parser.add_argument("--loader", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--resample", nargs="+", choices=RESAMPLES, default=list(RESAMPLES))
    text = f"workers or threads of each (default: 1, and one a core, here {os.cpu_count()})"
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[1, os.cpu_count() or 1], help=text
    )
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of each (default: {TURNS})")
    out = RESULTS.parent / "loader" / "loader.json"
    parser.add_argument("--out", type=pathlib.Path, default=out)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    folders = {"photos": args.photos, "packed": args.packed}
    sizes = [file.stat().st_size for file in args.photos.rglob("*.jpg")]
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "photos": len(sizes),
        "bytes each": round(statistics.mean(sizes)),
        "turns": args.turns,
        "images in memory": in_memory(args.turns),
        "settings": {},
    }
    for resample in args.resample:
        for workers in args.workers:
            figures = measure(folders, workers, resample, args.turns, args.loader)
            results["settings"][f"{resample}, {workers} workers"] = figures
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()

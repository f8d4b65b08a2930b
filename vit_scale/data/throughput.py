"""Measure how many training images a second this machine reads, decodes and crops."""

import contextlib
import copy
import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from vit_scale.data import workers
from vit_scale.data.loader import TrainBatches, train_batches
from vit_scale.data.registry import check_crop, open_training
from vit_scale.data.sources import Batch

BATCH = 64  # images per batch, at most: the speed is that of a batch of any size


def measure(cfg: ConfigDict, seconds: float) -> dict[str, Any]:
    """Read training batches of a config for `seconds` in one thread, and as long as configured.

    The latter uses data.workers processes of data.threads threads each. Raises UserError if the
    training set cannot be opened, read, or cropped.
    """
    check_crop(cfg)
    cfg = copy.deepcopy(cfg)
    data = cfg.data
    sets = max(1, len(data.mixture))
    data.batch, threads = min(data.batch, max(BATCH, sets * sets)), data.threads
    data.repeats = 1
    source = open_training(cfg)
    decodes = source.decodes
    ahead = data.workers * workers.READ_AHEAD if decodes else workers.READ_AHEAD
    with contextlib.closing(train_batches(source, data, 0, 0)) as reader:
        host = _rate((batch for _, batch in reader), seconds, ahead)
    data.threads = 1
    batches = TrainBatches(open_training(cfg), data.batch, 0, 0, None, None)
    thread = _rate(map(batches.__getitem__, itertools.count()), seconds, 0)
    return {
        "images": len(source),
        "height": source.size[0],
        "width": source.size[1],
        "images_per_second_per_thread": thread,
        "images_per_second": host,
        "workers": data.workers if decodes else 0,
        "threads": threads if decodes else 1,
        "cores": len(os.sched_getaffinity(0)),
    }


def _rate(batches: Iterator[Batch], seconds: float, ahead: int) -> float:
    """Return the images/s over `seconds`, after the first batch and those that are read ahead."""
    for _ in range(1 + ahead):
        next(batches)
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += len(next(batches)["mask"])
    return images / passed


def summary(cfg: ConfigDict, result: dict[str, Any]) -> str:
    """Format what `measure` returned, and what the slice in its "plan" needs, if there is one."""
    thread, cores = result["images_per_second_per_thread"], result["cores"]
    lines = [
        f"{cfg.data.train} of {cfg.data.path}: {result['images']:,} images, read at "
        f"{result['height']} x {result['width']}, crop {cfg.augment.crop}",
        f"one thread: {thread:,.0f} images/s",
        f"this host: {result['images_per_second']:,.0f} images/s with {result['workers']} workers "
        f"of {result['threads']} threads, on {cores} cores",
    ]
    plan = result.get("plan", {"fits": False})
    if plan["fits"]:
        wanted = plan["images_per_second"] / plan["hosts"]
        lines.append(
            f"{plan['topology']} needs {wanted:,.0f} images/s of each of its {plan['hosts']:,} "
            f"hosts: {wanted / thread:.1f} such threads (predicted, not measured)"
        )
    return "\n".join(lines)

"""A little run to track, and what its writers wrote."""

import copy
import json
import struct
from pathlib import Path

import flax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from tensorboardX.proto.event_pb2 import Event

from vit_scale.tracking import (
    TrackedRun,
    Tracker,
)

DESCRIPTION: dict = {
    "name": "little",
    "config": {"seed": 3, "optim": {"lr": 0.5}},
    "git": {"commit": "c0ffee", "dirty": True},
    "devices": {"kind": "abacus", "count": 2},
    "parameters": "head/kernel <4 x 2>",
}
BATCH = 10


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    loss: clu_metrics.Average.from_output("loss")


def loss(value: float) -> TrainMetrics:
    return TrainMetrics.single_from_model_output(loss=jnp.float32(value))


class Clock:
    """Seconds that pass only when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def tracker(workdir, cfg, steps=4, start=0, **options) -> Tracker:
    """The tracker of a run of `steps` steps; options are those of TrackedRun and of Tracker."""
    cfg = copy.deepcopy(cfg)
    cfg.steps = steps
    about = {name: options.pop(name) for name in ("quiet", "mfu") if name in options}
    run = TrackedRun(workdir, cfg, DESCRIPTION, start, **{"quiet": True, **about})
    return Tracker(run, **options)


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir: Path) -> list[Event]:
    """Of all event files, in the order of their names: TFRecord framing, 8 + 4 + n + 4 bytes."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            found.append(Event.FromString(data[position + 12 : position + 12 + length]))
            position += length + 16
    return found

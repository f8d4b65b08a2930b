"""Checkpoints: written asynchronously by Orbax, verified against fingerprints when read.

Guaranteed: a checkpoint appears whole or not at all; what is read equals what was written, to the
bit, or is refused with the name of the damaged array; a checkpoint written on any number of devices
and hosts is read on any other. Each one describes itself: config, classes, and its arrays.
"""

from vit_scale.checkpoint.checkpointer import DAMAGED, Checkpoints, score
from vit_scale.checkpoint.io import (
    BASE,
    COMMITTED,
    EXTENDED,
    FOLDER,
    SELECTION,
    all_steps,
    finished_steps,
    has_ema,
    read,
    read_description,
    read_manifest,
    read_selection,
    stored_shapes,
    verify,
)

__all__ = [
    "BASE",
    "COMMITTED",
    "DAMAGED",
    "EXTENDED",
    "FOLDER",
    "SELECTION",
    "Checkpoints",
    "all_steps",
    "finished_steps",
    "has_ema",
    "read",
    "read_description",
    "read_manifest",
    "read_selection",
    "score",
    "stored_shapes",
    "verify",
]

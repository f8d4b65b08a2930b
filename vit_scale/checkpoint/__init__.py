"""Checkpoints: written asynchronously by Orbax, verified against fingerprints when read.

A checkpoint is complete or not there. What is read equals what was written to the bit, or is
refused with the name of the damaged array.
"""

from vit_scale.checkpoint.checkpointer import ASIDE, TREES, Checkpoints, score, unused
from vit_scale.checkpoint.io import (
    COMMITTED,
    FOLDER,
    SELECTION,
    description,
    folders,
    holds_average,
    read,
    read_manifest,
    read_part,
    selection,
    steps,
    verify,
)

__all__ = [
    "ASIDE",
    "COMMITTED",
    "FOLDER",
    "SELECTION",
    "TREES",
    "Checkpoints",
    "description",
    "folders",
    "holds_average",
    "read",
    "read_manifest",
    "read_part",
    "score",
    "selection",
    "steps",
    "unused",
    "verify",
]

"""Sweeps: one config trained with many values of some fields, and which of them is best.

Every run is a process of its own, `vit-scale train` with the command that is printed, so it equals
the same run by hand. Runs go one after another or side by side on parts of a machine's devices, may
be stopped early by successive halving, and are compared on a held-out split. Rerunning the same
command resumes a sweep.
"""

from vit_scale.sweep.definition import Sweep, check
from vit_scale.sweep.picture import describe_best, write_picture
from vit_scale.sweep.points import (
    Point,
    Space,
    is_integer,
    make_points,
    make_space,
    run_name,
    train_arguments,
    train_command,
)
from vit_scale.sweep.sweep import default_folder, format_sweep, run_sweep

__all__ = [
    "Point",
    "Space",
    "Sweep",
    "check",
    "default_folder",
    "describe_best",
    "format_sweep",
    "is_integer",
    "make_points",
    "make_space",
    "run_name",
    "run_sweep",
    "train_arguments",
    "train_command",
    "write_picture",
]

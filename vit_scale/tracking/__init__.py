"""Tracking: metrics computed in the step, and the writers that they go to.

Guaranteed: a masked example counts nowhere; logging never waits for the newest step;
`metrics.jsonl` holds each row once, across kills and resumes; only process 0 writes; a failing
TensorBoard, Weights & Biases or terminal never ends a run.
"""

from vit_scale.tracking.profiler import Profiler
from vit_scale.tracking.provenance import git_state, parameter_table, versions
from vit_scale.tracking.tracker import TrackedRun, Tracker, publish

__all__ = [
    "Profiler",
    "TrackedRun",
    "Tracker",
    "git_state",
    "parameter_table",
    "publish",
    "versions",
]

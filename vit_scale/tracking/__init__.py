"""Metrics and where they go: JSON lines, TensorBoard, Weights & Biases, and the terminal."""

from vit_scale.tracking.provenance import git_state, parameter_table, versions
from vit_scale.tracking.tracker import Tracker, publish

__all__ = ["Tracker", "git_state", "parameter_table", "publish", "versions"]

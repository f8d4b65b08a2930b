"""Plans: memory, time and cost of training on a TPU slice, predicted without one.

The train step that `train` would run is compiled by libtpu for the slice, on any machine. Memory is
the compiler's own figure; times follow from its cycle estimates and nominal bandwidths, and none is
calibrated or measured. Each compilation runs in a process of its own, so no TPU library is loaded
here.
"""

from vit_scale.plan.planner import (
    COMPILER,
    SAVE_MATMULS,
    cheapest_changes,
    compare,
    fit,
    memory,
    plan,
)

__all__ = ["COMPILER", "SAVE_MATMULS", "cheapest_changes", "compare", "fit", "memory", "plan"]

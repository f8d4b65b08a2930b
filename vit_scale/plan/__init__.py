"""Plan training on a TPU slice without one: compile the real step, then predict memory and time."""

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

"""Successive halving: train all runs a little, the better ones longer, the best to the end.

Jamieson & Talwalkar 2016, with the rungs of Hyperband (Li et al. 2018).
"""

import itertools
from collections.abc import Sequence

from vit_scale.errors import USAGE, UserError


def rungs(count: int, keep: int, steps: int, every: int) -> list[int]:
    """Return the steps at which runs are compared, the last of them `steps`.

    Args:
      count: number of runs.
      keep: at each rung one in `keep` runs continues.
      steps: steps of a whole run.
      every: steps between evaluations, of which rungs are multiples.

    Raises UserError where evaluations are too rare for that.
    """
    levels = 0
    while keep ** (levels + 1) <= count:
        levels += 1
    ideal = [steps / keep**level for level in range(levels, 0, -1)]
    rounded = [-(-round(step) // every) * every if every else 0 for step in ideal]
    bounds = [0, *rounded, steps]
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        wanted = ", ".join(f"{step:,.0f}" for step in ideal)
        raise UserError(
            f"--halving {keep} compares {count} runs after {wanted} of {steps:,} steps, and "
            f"eval.every={every} is too rare: set it to at most {max(1, int(ideal[0])):,}",
            USAGE,
        )
    return [*rounded, steps]


def survivors(ranking: Sequence[int], keep: int) -> list[int]:
    """Return the best of a ranking, best first: one in `keep`, and at least one."""
    return list(ranking[: max(1, len(ranking) // keep)])

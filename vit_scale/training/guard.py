"""The guard against divergence: counts steps whose loss or gradient is not finite.

The train step leaves the state unchanged where it meets a NaN or an infinity. After more such steps
in a row than `divergence.patience`, the parameters themselves must be spoilt: the run rolls back to
its last checkpoint and continues with the batches after those (`runs.rollbacks`), or ends once it
has done so `divergence.rollbacks` times. While steps are skipped, nothing is saved but a run's last
step, so no other checkpoint holds a diverging run.
"""

import collections
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vit_scale.errors import DIVERGED, UserError
from vit_scale.runs.rollbacks import Rollback

BEHIND = 2  # steps that are dispatched before the result of an earlier one is fetched


class Diverged(Exception):
    """Raised after too many steps in a row that were not finite, the last of them `step`."""

    def __init__(self, step: int, count: int):
        super().__init__(f"{count} steps in a row were not finite, up to step {step}")
        self.step = step


class Guard:
    """Count consecutive steps that were not finite, a little behind the device."""

    def __init__(self, cfg: ConfigDict):
        self._cfg, self._count = cfg, 0
        self._pending: collections.deque = collections.deque()

    def __call__(self, step: int, nonfinite) -> None:
        """Take the flag of `step`, still on the device. Raises Diverged for an earlier step."""
        if self._cfg.skip:
            self._pending.append((step, nonfinite))
            self._settle(BEHIND)

    def is_sound(self) -> bool:
        """Wait for the last step, and tell whether it was finite. Raises Diverged."""
        self._settle(0)
        return self._count == 0

    def _settle(self, behind: int) -> None:
        while len(self._pending) > behind:
            step, flag = self._pending.popleft()
            self._count = self._count + 1 if np.asarray(flag) else 0
            if self._count > self._cfg.patience:
                raise Diverged(step, self._count)


def diverged_for_good(error: Diverged, rollbacks: Sequence[Rollback]) -> UserError:
    """Return the error that ends a run whose rollbacks are used up."""
    history = ", ".join(f"step {r.diverged} (back to {r.step})" for r in rollbacks)
    return UserError(
        f"training diverged: {error}"
        + (f", after rollbacks at {history}" if history else "")
        + "; try a lower optim.lr, a longer optim.warmup or optim.clip=1, in another --workdir",
        DIVERGED,
    )

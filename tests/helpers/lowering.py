"""Programs as XLA is given them."""

from collections.abc import Callable
from typing import Any

import jax


def lowered(function: Callable, *args: Any, platform: str) -> str:
    """Return the StableHLO of `function` for a platform, which this machine need not have."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()

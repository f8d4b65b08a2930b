"""Learning rate schedules: pure functions of the step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Schedule = Callable[[Any], Any]


def _constant(cfg: ConfigDict, steps: int) -> Schedule:
    return optax.constant_schedule(cfg.lr)


def _cosine(cfg: ConfigDict, steps: int) -> Schedule:
    return optax.cosine_decay_schedule(cfg.lr, steps - cfg.warmup, alpha=cfg.end)


def _linear(cfg: ConfigDict, steps: int) -> Schedule:
    return optax.linear_schedule(cfg.lr, cfg.lr * cfg.end, steps - cfg.warmup)


def _rsqrt(cfg: ConfigDict, steps: int) -> Schedule:
    return lambda step: cfg.lr * jax.lax.rsqrt(1 + step / cfg.timescale)


def _piecewise(cfg: ConfigDict, steps: int) -> Schedule:
    boundaries = [boundary - cfg.warmup for boundary in milestone_steps(cfg, steps)]
    return optax.piecewise_constant_schedule(cfg.lr, dict.fromkeys(boundaries, cfg.factor))


SCHEDULES = {  # from the end of the warm-up, which is their step 0
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,  # Zhai et al. 2022
    "piecewise": _piecewise,
}


COOLDOWNS: dict[str, Schedule] = {  # factors of the learning rate, of the fraction that is left
    "linear": lambda left: left,
    "sqrt": lambda left: 1 - jnp.sqrt(1 - left),  # Hägele et al. 2024
}


def make_weight_decay(cfg: ConfigDict, steps: int) -> float | Schedule:
    """Return the weight decay: a number, or its cosine from `weight_decay` to `weight_decay_end`.

    As DINO's (Caron et al. 2021), it reaches the end at `steps`.
    """
    if cfg.weight_decay_end is None or cfg.weight_decay_end == cfg.weight_decay:
        return cfg.weight_decay
    return cosine(cfg.weight_decay, cfg.weight_decay_end, steps)


def cosine(first: float, last: float, steps: int) -> Schedule:
    """Return half a period of a cosine from `first` at step 0 to `last` at `steps`, and on."""
    fall = optax.cosine_decay_schedule(1.0, max(steps, 1))
    return lambda step: last + (first - last) * fall(step)


def milestone_steps(cfg: ConfigDict, steps: int) -> list[int]:
    """Return the steps at which `piecewise` multiplies the learning rate."""
    return [round(fraction * steps) for fraction in cfg.milestones]


def make_schedule(cfg: ConfigDict, steps: int) -> Schedule:
    """Build the learning rate as a function of the step, from 0 to `steps`, in float32.

    Warm-up rises linearly from 0 at step 0 to `lr` at step `warmup`. Cosine and linear reach
    `lr * end` at `steps`. A cool-down multiplies any of them in the last `cooldown` steps, by what
    falls from 1 to 0: with `constant` that is warm-up, stable, decay (WSD; Hu et al. 2024).
    """
    schedule = SCHEDULES[cfg.schedule](cfg, steps)
    if cfg.warmup:
        warmup = optax.linear_schedule(0.0, cfg.lr, cfg.warmup)
        schedule = optax.join_schedules([warmup, schedule], [cfg.warmup])

    def learning_rate(step):
        rate = jnp.asarray(schedule(step), jnp.float32)
        if cfg.cooldown:
            rate *= COOLDOWNS[cfg.cooldown_shape](jnp.clip((steps - step) / cfg.cooldown, 0, 1))
        return rate

    return learning_rate

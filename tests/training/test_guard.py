"""guard: a step that is not finite updates nothing, and too many in a row are a divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import random_batch, random_params, tiny_config
from vit_scale.config import base
from vit_scale.errors import DIVERGED
from vit_scale.runs.rollbacks import Rollback
from vit_scale.training.guard import Diverged, Guard, diverged_for_good
from vit_scale.training.setup import make_setup
from vit_scale.training.train_step import jit_train_step


def guard(patience=2, skip=True) -> Guard:
    cfg = base().divergence
    cfg.patience, cfg.skip = patience, skip
    return Guard(cfg)


def fed(flags, **settings) -> int | None:
    """The step at which a guard of these flags gives up; None if it does not."""
    watcher = guard(**settings)
    try:
        for step, flag in enumerate(flags, 1):
            watcher(step, jnp.int32(flag))
        watcher.is_sound()
    except Diverged as error:
        return error.step
    return None


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        ([0, 0, 0, 0], None),
        ([1, 1, 0, 1, 1, 0], None),
        ([0, 1, 1, 1, 0, 0, 0], 4),
        ([1, 1, 1], 3),  # seen only when it is asked for
        ([0, 1, 1, 0, 1, 1, 1, 1], 7),
    ],
)
def test_more_in_a_row_than_are_borne(flags, step):
    assert fed(flags) == step
    assert fed(flags, skip=False) is None


def test_a_run_is_sound_when_its_last_step_was():
    watcher = guard(patience=5)
    watcher(1, np.int32(1))
    assert not watcher.is_sound()
    watcher(2, np.int32(0))
    assert watcher.is_sound()


def test_the_last_error_names_the_rollbacks():
    error = diverged_for_good(Diverged(31, 11), [Rollback(4, 10), Rollback(4, 9)])
    assert error.code == DIVERGED
    assert "11 steps in a row were not finite, up to step 31" in str(error)
    assert "after rollbacks at step 10 (back to 4), step 9 (back to 4)" in str(error)


@pytest.mark.parametrize("skip", [True, False])
def test_a_step_that_is_not_finite_updates_nothing(skip):
    cfg = tiny_config(f"divergence.skip={skip}", "optim.ema=0.9")
    program = make_setup(cfg, jax.devices()[:1])
    params = jax.device_put(random_params(program.model))
    params["head"]["bias"] = params["head"]["bias"].at[0].set(jnp.nan)
    state = program.state._replace(
        step=jnp.int32(3),
        params=params,
        opt_state=jax.tree.map(lambda x: x + 1, program.optimizer.init(params)),
        ema=jax.tree.map(lambda x: x + 1, params),
    )
    before = jax.tree.map(np.array, state)
    after, measures = jit_train_step(program)(state, random_batch())
    assert int(measures.nonfinite.total) == 1
    assert int(after.step) == 4
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
        (after.params, after.ema),
        (before.params, before.ema),
    )
    assert all(jax.tree.leaves(same)) == skip
    for new, old in zip(
        jax.tree.leaves(after.opt_state), jax.tree.leaves(before.opt_state), strict=True
    ):
        if jnp.issubdtype(old.dtype, jnp.integer):  # learning rates are of the step
            assert int(new) == int(old) + 1
        else:
            assert (np.asarray(new).tobytes() == old.tobytes()) == skip


def test_a_finite_step_is_counted_as_one():
    program = make_setup(tiny_config(), jax.devices()[:1])
    params = jax.device_put(random_params(program.model))
    state = program.state._replace(
        step=jnp.int32(0), params=params, opt_state=program.optimizer.init(params)
    )
    _, measures = jit_train_step(program)(state, random_batch())
    assert int(measures.nonfinite.total) == 0

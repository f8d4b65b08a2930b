"""state: random, from another run, or resumed; nothing is shared between what is donated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import CLASSES, random_params, tiny_config, tiny_model, write_run
from vit_scale.checkpoint import Checkpoints, read_manifest
from vit_scale.errors import UserError
from vit_scale.models.parameters import count, select
from vit_scale.models.position_embeddings import resample
from vit_scale.training.init_state import check_source, init_state, recover, restore, store_frozen
from vit_scale.training.setup import make_setup


@pytest.fixture(scope="module")
def program():
    return make_setup(tiny_config("optim.ema=0.9", "seed=3"))


@pytest.fixture(scope="module")
def state(program):
    return init_state(program, CLASSES, quiet=True)


def same(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_random_start_is_the_model_of_the_seed(program, state):
    assert state.step == 0 and state.step.dtype == jnp.int32
    same(state.params, jax.jit(program.model.init)(jax.random.key(3)))
    other = jax.jit(program.model.init)(jax.random.key(4))
    assert np.abs(state.params["posemb"] - other["posemb"]).max() > 0.01
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    placed = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state)
    planned = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), program.state)
    assert placed == planned


def test_the_average_starts_as_a_copy(state):
    """The same buffer twice in a donated state crashes."""
    same(state.ema, state.params)
    pairs = zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True)
    assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pairs)


def test_averaged_is_the_model(state):
    assert state.eval_params is state.ema
    assert state._replace(ema=None).eval_params is state.params


@pytest.mark.parametrize("quiet", [False, True])
def test_a_start_from_another_run(tmp_path, capsys, quiet):
    given = random_params(tiny_model())
    run = write_run(tmp_path / "run", tiny_config(), given)
    program = make_setup(tiny_config("data.resolution=32", f"init.source={run}"))
    state = init_state(program, ("ant", *CLASSES[1:]), quiet)
    same(state.params["blocks"], given["blocks"])
    # Another compilation of the same resampling: equal to rounding.
    expected = resample(given["posemb"], (4, 4), "cubic")
    np.testing.assert_allclose(state.params["posemb"], expected, rtol=1e-5, atol=1e-7)
    assert not np.any(state.params["head"]["kernel"]), "other classes: a new head"
    printed = capsys.readouterr().out
    assert printed == "" if quiet else f"initialised from {run}/checkpoints/5\n" in printed
    assert ("resampled 2 x 2 -> 4 x 4, cubic" in printed) == (not quiet)


def test_the_same_classes_keep_the_head(tmp_path):
    given = random_params(tiny_model())
    run = write_run(tmp_path / "run", tiny_config(), given)
    program = make_setup(tiny_config(f"init.source={run}", "optim.ema=0.9"))
    state = init_state(program, CLASSES, quiet=True)
    same(state.params, given)
    same(state.ema, given)


def test_adapters_are_added_to_a_source_and_merged_when_they_are_one(tmp_path, capsys):
    given = random_params(tiny_model())
    first = write_run(tmp_path / "first", tiny_config(), given)
    cfg = tiny_config(f"init.source={first}", "lora.rank=2", "lora.alpha=6.", "optim.ema=0.9")
    program = make_setup(cfg)
    check_source(program, CLASSES)
    state = init_state(program, CLASSES, quiet=False)
    same(select(state.params, lambda name: "lora" not in name), given)
    drawn = jax.jit(program.model.init)(jax.random.key(0))
    same(*(select(tree, lambda name: "lora" in name) for tree in (state.params, drawn)))
    some = 2 * 2 * (16 * 2 + 2 * 16) + 16 * 4 + 4
    assert f"training {some:,} of {count(state.params):,} parameters\n" in capsys.readouterr().out
    average = random_params(program.model, seed=1)
    second = write_run(tmp_path / "second", cfg, state.params, ema=average)
    merged = init_state(make_setup(tiny_config(f"init.source={second}")), CLASSES, quiet=True)
    query = {name: average["blocks"]["attention"]["query"][name] for name in ("lora_a", "lora_b")}
    expected = average["blocks"]["attention"]["query"]["kernel"] + 3 * np.einsum(
        "ldr,lrke->ldke", query["lora_a"], query["lora_b"]
    )
    found = merged.params["blocks"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    same(merged.params["blocks"]["mlp"], average["blocks"]["mlp"])


@pytest.mark.parametrize(
    ("overrides", "stored"),
    [
        (["optim.train=head"], False),
        (["optim.train=head", "checkpoint.frozen=once"], True),
        (["checkpoint.frozen=once"], False),  # nothing is frozen
        (["lora.rank=2"], True),
        (["lora.rank=2", "checkpoint.frozen=each"], False),
    ],
)
def test_frozen_parameters_are_stored_once_where_that_is_wanted(tmp_path, overrides, stored):
    program = make_setup(tiny_config(*overrides))
    params = random_params(program.model)
    state = program.state._replace(
        step=np.int32(0), params=params, opt_state=program.optimizer.init(params)
    )
    with Checkpoints(tmp_path) as checkpoints:
        store_frozen(program, checkpoints, state, {})
        checkpoints.save(4, state._asdict(), {})
        checkpoints.wait()
        same(restore(program, checkpoints, 4).params, params)
    saved = read_manifest(tmp_path / "checkpoints" / "4")["arrays"]
    assert (tmp_path / "base" / "0").is_dir() == stored
    assert ("params/embed/kernel" in saved) != stored and "params/head/kernel" in saved


def test_a_source_that_does_not_fit_is_refused_before_the_run_begins(tmp_path):
    run = write_run(tmp_path / "run", tiny_config(), random_params(tiny_model()))
    check_source(make_setup(tiny_config()), CLASSES)
    fitting = make_setup(tiny_config("data.resolution=32", f"init.source={run}"))
    check_source(fitting, CLASSES)
    wider = make_setup(tiny_config("model.mlp=32", f"init.source={run}"))
    with pytest.raises(UserError, match="parameters don't fit the model: blocks/mlp/down"):
        check_source(wider, CLASSES)
    fields = ("objective=mae", "model.classes=0", "eval.split=", "eval.final=")
    headless = make_setup(tiny_config(*fields, f"init.source={run}"))
    check_source(headless, CLASSES)  # of the images that it learns from, as the source did
    started = init_state(headless, CLASSES, quiet=True)
    np.testing.assert_array_equal(
        started.params["embed"]["kernel"], random_params(tiny_model())["embed"]["kernel"]
    )
    missing = make_setup(tiny_config("init.source=none"))
    with pytest.raises(UserError, match="none is not a run folder"):
        check_source(missing, CLASSES)


def test_restored_is_what_was_saved(tmp_path, program, state):
    state = state._replace(
        step=jnp.int32(4),
        ema=jax.device_put(random_params(program.model)),
        opt_state=jax.tree.map(lambda leaf: leaf + 1, state.opt_state),
    )
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert recover(program, checkpoints) is None
        checkpoints.save(4, state._asdict(), {})
        checkpoints.save(8, state._replace(ema=state.params)._asdict(), {})
        checkpoints.wait()
        newest, given = recover(program, checkpoints), restore(program, checkpoints, 4)
    assert newest is not None and given is not None
    assert jax.tree.structure(given) == jax.tree.structure(state)
    same(given, state)
    assert newest.step == 8
    same(newest.ema, state.params)
    assert given.step.sharding == program.state.step.sharding

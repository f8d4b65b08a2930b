"""The guarantees of docs/design.md for objectives that own parameters, state, and a teacher."""

import itertools

import jax
import numpy as np
import pytest

from tests.helpers.objectives import SELF_SUPERVISED
from tests.helpers.tiny import random_batch, tiny_config
from vit_scale import config, pretrained
from vit_scale.checkpoint import Checkpoints
from vit_scale.models.build import build
from vit_scale.models.parameters import OBJECTIVE, count, named, of_model
from vit_scale.runs.json_files import write_json
from vit_scale.tracking.metrics import to_floats
from vit_scale.training.init_state import init_state, restore
from vit_scale.training.setup import make_setup
from vit_scale.training.train_step import jit_train_step

MASK = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)
COMMON = ("steps=6", "optim.lr=0.01", "model.drop_path=0.2", "optim.weight_decay=0.1")


class Trained:
    """The setup, the compiled step, and the states after 2 and 4 steps of one objective."""

    def __init__(self, name: str):
        self.setup = make_setup(tiny_config(*SELF_SUPERVISED[name], *COMMON))
        self.step = jit_train_step(self.setup)
        self.first = self.start()
        self.middle, self.metrics = self.steps(self.start(), 0, 2)
        self.last, _ = self.steps(jax.tree.map(jax.numpy.copy, self.middle), 2, 4)

    def start(self):
        return init_state(self.setup, (), quiet=True)

    def steps(self, state, first: int, last: int, change: int = 0):
        metrics = None
        for number in range(first, last):
            batch = random_batch(seed=number) | {"mask": MASK}
            batch["image"][~MASK] += np.uint8(change)
            state, metrics = self.step(state, batch)
        return state, metrics


@pytest.fixture(scope="module", params=SELF_SUPERVISED)
def trained(request) -> Trained:
    return Trained(request.param)


def leaves(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named(state._asdict()).items()}


def same_bits(left, right) -> None:
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    assert not [name for name in left if left[name].tobytes() != right[name].tobytes()]


def test_resumed_is_the_same_to_the_bit(trained, tmp_path):
    """Own parameters, centres and the teacher are in the checkpoint."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, trained.middle._asdict(), {"config": {}})
        checkpoints.wait()
        state = restore(trained.setup, checkpoints, 2)
    same_bits(state, trained.middle)
    same_bits(trained.steps(state, 2, 4)[0], trained.last)


def test_everything_that_is_trained_changes_and_the_teacher_follows(trained):
    before, after = leaves(trained.first), leaves(trained.last)
    still = {
        name
        for name in after
        if name.startswith("params/") and np.array_equal(before[name], after[name])
    }
    assert still <= {"params/blocks/attention/key/bias"}  # softmax does not see it
    cfg = trained.setup.cfg
    assert f"params/{OBJECTIVE}/" in " ".join(after)
    if cfg.objective != "dino":
        assert trained.last.ema is None and trained.last.objective is None
        return
    centred = {"centre", "patch_centre"} if cfg.dino.centring == "mean" else set()
    assert set(trained.last.objective or ()) == centred
    for name in centred:
        assert np.abs(after[f"objective/{name}"]).max() > 1e-4


def test_the_teacher_is_an_average_and_prototypes_wait_for_their_first_step(trained):
    """Its decay is a cosine from dino.momentum to momentum_end over the run."""
    d, steps = trained.setup.cfg.dino, trained.setup.cfg.steps
    states = [trained.first]
    for number in range(2):
        state = jax.tree.map(jax.numpy.copy, states[-1])
        states.append(trained.steps(state, number, number + 1)[0])
    prototypes = f"{OBJECTIVE}/head/prototypes/kernel"
    if trained.setup.cfg.objective != "dino":
        assert states[1].ema is None and prototypes not in named(states[1].params)
        return
    for number, (before, after) in enumerate(itertools.pairwise(map(leaves, states))):
        share = (1 + np.cos(np.pi * number / steps)) / 2
        decay = d.momentum_end + share * (d.momentum - d.momentum_end)
        for name in ("cls", prototypes):
            expected = decay * before[f"ema/{name}"] + (1 - decay) * after[f"params/{name}"]
            np.testing.assert_allclose(after[f"ema/{name}"], expected, atol=1e-7)
    first, second = (leaves(state)[f"params/{prototypes}"] for state in states[:2])
    assert np.array_equal(first, second) == bool(d.freeze_prototypes)


def test_masked_examples_are_never_looked_at(trained):
    same_bits(trained.steps(trained.start(), 0, 2, change=77)[0], trained.middle)


@pytest.mark.parametrize("name", [pytest.param("ibot", marks=pytest.mark.slow), "lejepa"])
def test_micro_batches_are_the_same_step(name):
    """Losses of the whole batch, too: KoLeo, batch normalisation, normality."""
    results = []
    for parts in (1, 2):
        setup = make_setup(tiny_config(*SELF_SUPERVISED[name], f"optim.accumulate={parts}"))
        state = init_state(setup, (), quiet=True)
        state, metrics = jit_train_step(setup)(state, random_batch() | {"mask": MASK})
        moments = leaves(state)
        results.append((moments, to_floats(metrics)))
    (one, expected), (two, measured) = results
    assert measured == pytest.approx(expected, rel=2e-5)
    for name, leaf in one.items():
        if name.startswith("opt_state") and "/mu/" in name:
            largest = max(np.abs(leaf).max(), 1e-3)
            np.testing.assert_allclose(two[name], leaf, atol=1e-4 * largest, err_msg=name)


def test_a_run_is_the_model_without_what_the_objective_owns(trained, tmp_path):
    cfg = trained.setup.cfg
    described = {"config": config.to_json(cfg), "classes": []}
    write_json(tmp_path / "run.json", described)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, trained.last._asdict(), described)
    loaded = pretrained.load_model(tmp_path)
    expected = named(of_model(trained.last.ema or trained.last.params))
    assert (
        named(loaded.params).keys()
        == expected.keys()
        == named(build(cfg.model, config.image_size(cfg)).abstract_params).keys()
    )
    for name, leaf in expected.items():
        np.testing.assert_array_equal(named(loaded.params)[name], leaf)
    assert count(loaded.params) < count(trained.last.params)


LAYOUTS = {"remat": ("model.remat=full",), "unrolled": ("model.scan=False",)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SELF_SUPERVISED)
def test_layouts_of_the_model_are_the_same_step(name):
    """Rematerialised, and unrolled; bfloat16 and adapters are another, which trains too."""
    plain = tuple(item for item in COMMON if "drop_path" not in item)

    def first_step(*overrides: str) -> tuple[dict, dict]:
        setup = make_setup(tiny_config(*SELF_SUPERVISED[name], *plain, *overrides))
        state, metrics = jit_train_step(setup)(
            init_state(setup, (), quiet=True), random_batch() | {"mask": MASK}
        )
        return leaves(state), to_floats(metrics)

    _, expected = first_step()
    for layout in LAYOUTS.values():
        assert first_step(*layout)[1] == pytest.approx(expected, rel=1e-4)
    _, rounded = first_step("model.dtype=bfloat16")
    assert rounded["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert rounded["loss"] != expected["loss"]
    adapted, measured = first_step("lora.rank=2", "optim.lr=0.1")
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    changed = {key for key in adapted if "lora_b" in key and np.any(adapted[key])}
    assert any(key.startswith("params/blocks") for key in changed)
    assert any(key.startswith(f"params/{OBJECTIVE}/") for key in adapted)

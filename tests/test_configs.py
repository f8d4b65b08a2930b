"""configs/: each one loads, each model builds at full size (shapes only), each claim adds up."""

import jax
import pytest

from vit_scale import config
from vit_scale.augment import check
from vit_scale.mesh import check_batch, make_mesh
from vit_scale.model import build
from vit_scale.optim import make_optimizer
from vit_scale.parameters import count


def runs(name: str) -> list[str]:
    """The runs that a config names: itself, or each of its stages."""
    return [f"{name}:{stage}" for stage in config.load(name).stages] or [name]


RUNS = [run for name in config.names() for run in runs(name)]


@pytest.mark.parametrize("run", RUNS)
def test_everything_but_the_data_is_accepted(run):
    cfg = config.load(run)
    size = config.image_size(cfg)
    params = jax.eval_shape(build(cfg.model, size).init, jax.random.key(0))
    make_optimizer(cfg.optim, cfg.steps, params)
    check(cfg.augment)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    check_batch(cfg.data.batch, mesh, cfg.optim.accumulate)
    check_batch(cfg.eval.batch, mesh)
    assert count(params) > 100_000
    assert cfg.steps >= 50


def test_selection_never_sees_the_reported_split():
    """Where a best step is selected, it is on held-out training images."""
    for run in RUNS:
        cfg = config.load(run)
        if cfg.eval.split and cfg.eval.final:
            assert cfg.eval.split != cfg.eval.final, run
            assert cfg.data.train != "train", run


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_fine_tuning_continues_the_pretraining(size):
    """The fine-tuned model differs from the pretrained one in what `adapt` can place, no more."""
    before = config.load(f"vit_{size}_imagenet").model
    after = config.load(f"vit_{size}_cifar").model
    assert {key for key in before if before[key] != after[key]} <= {
        "classes",
        "drop_path",
        "dropout",
    }


def test_the_tutorial_has_its_numbers():
    cfg = config.load("vit_tutorial_cifar")
    params = jax.eval_shape(build(cfg.model, (32, 32)).init, jax.random.key(0))
    assert 3.1e6 < count(params) < 3.3e6
    assert cfg.steps == 200 * 45_000 // 128
    assert config.load("vit_tutorial_cifar:2").steps == 2 * 45_000 // 128

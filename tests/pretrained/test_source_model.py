"""model.variant=source: the architecture and the normalization of what training starts from."""

import pathlib

import jax
import numpy as np
import pytest

from tests.helpers.tiny import tiny_config, write_run
from vit_scale import config, pretrained
from vit_scale.errors import UserError
from vit_scale.models.parameters import named
from vit_scale.runs.resume import resumed_config
from vit_scale.training.setup import make_setup, summary

FAMILIES = pathlib.Path(__file__).parents[1] / "golden" / "families"
CASES = ["dinov2-gated", "dinov3", "siglip", "clip", "timm-eva02-clip", "timm-pe"]


def source(case: str, *more: str):
    sizes = ["model.variant=source", f"init.source={FAMILIES / case}", "data.resolution=12"]
    return config.override(config.base(), [*sizes, "data.batch=8", "model.classes=4", *more])


@pytest.mark.parametrize("case", CASES)
def test_the_architecture_is_the_sources(case):
    loaded = pretrained.load_model(FAMILIES / case)
    cfg = pretrained.with_source_model(source(case, "model.drop_path=.1", "model.scan=false"))
    setup = make_setup(cfg)
    kept = {"classes": 4, "drop_path": 0.1, "scan": False}
    assert {name: cfg.model[name] for name in kept} == kept
    assert tuple(cfg.augment.mean) == tuple(loaded.cfg.augment.mean)
    params, _ = pretrained.adapt(
        loaded.params,
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), setup.model.abstract_params),
        "cubic",
        same_classes=False,
    )
    assert "4" in str(named(params)["head/kernel"].shape)
    assert summary(source(case))["config"]["model"]["variant"] == cfg.model.variant


def test_what_the_config_had_set_is_replaced_with_a_line(capsys):
    cfg = source("dinov2-registers", "model.pool=gap", "augment.mean=(0.1, 0.2, 0.3)")
    cfg = pretrained.with_source_model(cfg)
    assert cfg.model.pool == "cls_gap" and cfg.model.registers == 2
    line = capsys.readouterr().err
    assert "model.variant=source replaces what the config set" in line
    assert "model.pool=cls_gap" in line and "augment.mean=" in line and "layer_scale" not in line
    assert pretrained.with_source_model(tiny_config()) == tiny_config()


def test_without_a_source_it_is_refused():
    with pytest.raises(UserError, match=r"architecture of init\.source: set init\.source"):
        make_setup(config.override(config.base(), ["model.variant=source"]))


def test_a_run_resumes_with_the_architecture_that_its_source_had(tmp_path):
    """The weights may be gone by then."""
    resolved = pretrained.with_source_model(source("dinov3"))
    params = make_setup(resolved).model.init(jax.random.key(0))
    run = write_run(tmp_path / "run", resolved, params)
    again = source("dinov3", "init.source=/gone", "model.drop_path=.1")
    resumed = resumed_config(again, run)
    assert resumed.model.rope == "dinov3" and resumed.model.registers == 2
    assert resumed.model.drop_path == 0.1, "of training alone: a difference that is then refused"
    resumed.model.drop_path = 0.0
    assert resumed.model.to_dict() == resolved.model.to_dict()
    assert resumed.augment.mean == resolved.augment.mean
    assert pretrained.with_source_model(resumed) == resumed

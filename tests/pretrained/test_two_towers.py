"""The image towers of big_vision's models of images and texts: embeddings are those of its code.

golden/two_towers has SigLIP 2, tiny, as it saves it (golden/make_two_towers.py).
"""

import functools
import pathlib

import jax
import numpy as np
import pytest

from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.pretrained import Hints, weight_files

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "two_towers"
EXPECTED = dict(np.load(GOLDEN / "expected.npz"))
CASES = ["siglip2", "siglip2-scanned", "siglip2-naflex", "projected"]
PROJECTION = "the head is the projection to the space that images and texts share: no classifier"


@functools.cache
def golden(case: str) -> pretrained.Pretrained:
    return pretrained.load_model(GOLDEN / f"{case}.npz")


@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_those_of_big_vision(case):
    loaded = golden(case)
    cfg, params, expected = loaded.cfg.model, loaded.params, EXPECTED[f"{case}/values"]
    assert (cfg.pool, cfg.gelu, loaded.model.shape.size.heads) == ("map", "tanh", 3)
    assert loaded.model.shape.grid == (3, 3)
    if not loaded.classes:  # the embedding is what a head would read
        cfg = cfg.copy_and_resolve_references()
        cfg.classes = 24
        params = params | {"head": {"kernel": np.eye(24, dtype="f"), "bias": np.zeros(24, "f")}}
    values = jax.jit(build(cfg, (12, 12)).apply)(params, EXPECTED[f"{case}/images"])
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(values, expected, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_other_tower_is_left_aside_with_a_line(case):
    first, ignored, *notes = golden(case).notes
    assert first.endswith("(init.dialect=big_vision-two_towers)")
    assert ignored.startswith("ignored, not needed for inference: b, t, txt/")
    assert (PROJECTION in notes) == (case == "projected")
    assert "eval.fit=stretch, eval.crop=1.0, eval.resample=bilinear" in notes[-1]


def test_naflex_may_have_a_grid_that_is_not_square(tmp_path):
    """Its positions are one: nothing has to be guessed from a number of rows."""
    arrays = weight_files.read_arrays(GOLDEN / "siglip2-naflex.npz")
    key = "params/img/pos_embedding"
    weight_files.write_npz(tmp_path / "x.npz", arrays | {key: arrays[key][:2]})
    loaded = pretrained.load_model(tmp_path / "x.npz", Hints(trained_size=(8, 12)))
    np.testing.assert_array_equal(loaded.params["posemb"], arrays[key][:2])
    with pytest.raises(UserError, match="not a square grid"):
        pretrained.load_model(tmp_path / "x.npz")

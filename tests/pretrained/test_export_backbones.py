"""A model without a head, as self-supervision leaves it, exported to timm and transformers."""

import jax
import numpy as np
import pytest

from tests.helpers.tiny import random_params, tiny_config, write_run
from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.build import build
from vit_scale.models.parameters import OBJECTIVE
from vit_scale.pretrained.adapt import adapt

CASES = {  # and the class of transformers that computes it
    "cls": ((), "ViTModel"),
    "registers": (("model.registers=2", "model.mlp=32"), "Dinov2WithRegistersModel"),
}


def backbone(case: str, folder):
    """(images, tokens after the final norm) of a run that owned more while it was trained."""
    cfg = tiny_config("model.classes=0", *CASES[case][0])
    model = build(cfg.model, (16, 16))
    params = random_params(model)
    trained = {**params, OBJECTIVE: {"head": {"kernel": np.ones((2, 3), np.float32)}}}
    write_run(folder / "run", cfg, trained, classes=[])
    images = np.random.RandomState(0).randn(2, 16, 16, 3).astype(np.float32)
    return images, np.asarray(jax.jit(model.encode)(params, images).tokens)


@pytest.mark.parametrize("kind", ["safetensors-timm", "safetensors-hf"])
@pytest.mark.parametrize("case", CASES)
def test_read_again_its_features_are_the_same(case, kind, tmp_path):
    images, tokens = backbone(case, tmp_path)
    export(tmp_path / "run", kind, tmp_path / "out")
    loaded = pretrained.load_model(tmp_path / "out")
    assert loaded.classes == ()
    features = jax.jit(loaded.model.features, static_argnums=2)(loaded.params, images, "cls")
    np.testing.assert_allclose(features, tokens[:, 0], atol=2e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "image-feature-extraction" in card and "A backbone without a head" in card


@pytest.mark.parametrize("case", CASES)
def test_timm_computes_the_same(case, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    images, tokens = backbone(case, tmp_path)
    export(tmp_path / "run", "safetensors-timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        np.testing.assert_allclose(model.forward_features(pixels), tokens, atol=1e-4)
        np.testing.assert_allclose(model(pixels), tokens[:, 0], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(case, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    images, tokens = backbone(case, tmp_path)
    lines = export(tmp_path / "run", "safetensors-hf", tmp_path / "out")
    name = CASES[case][1]
    assert f"transformers.{name}.from_pretrained(" in lines[0]
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, loading = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True, **options
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        result = model.eval()(pixels).last_hidden_state
    np.testing.assert_allclose(result, tokens, atol=1e-4)


def test_formats_with_a_head_are_refused(tmp_path):
    backbone("cls", tmp_path)
    for kind, message in (("npz", "has no head, which a .npz has"), ("jax", "no classification")):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "run", kind, tmp_path / f"out.{kind}")


def test_self_supervision_continues_from_a_classifier_and_the_reverse():
    """The head is dropped, or new."""
    with_head, without = (build(tiny_config(f"model.classes={n}").model, (16, 16)) for n in (4, 0))
    params, rows = adapt(random_params(with_head), without.abstract_params, "cubic", False)
    assert params.keys() == without.abstract_params.keys()
    dropped = {row.name for row in rows if row.action.startswith("dropped")}
    assert dropped == {"head/kernel", "head/bias"}
    target = random_params(with_head, seed=1)
    params, _ = adapt(random_params(without), target, "cubic", False)
    np.testing.assert_array_equal(params["head"]["kernel"], target["head"]["kernel"])
    np.testing.assert_array_equal(params["cls"], random_params(without)["cls"])

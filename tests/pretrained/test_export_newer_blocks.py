"""Newer blocks as timm and transformers have them: the same logits, also when read again."""

import json

import jax
import numpy as np
import pytest

from tests.helpers.tiny import random_params, tiny_config, write_run
from vit_scale import config, pretrained
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.build import build

NO_BIAS = ("model.qkv_bias=false", "model.proj_bias=false", "model.patch_bias=false")
CASES = {  # VisionTransformer, unless it says Eva
    "hybrid": ("model.variant=R+Ti/8", "model.stem_epsilon=timm", "model.gelu=tanh"),
    "registers": ("model.registers=2", "model.layer_scale=.1"),
    "norms": ("model.qk_norm=layernorm", "model.pre_norm=true", "model.final_norm=false"),
    "rmsnorm": ("model.norm=rmsnorm", "model.qk_norm=rmsnorm"),
    "no-bias": (*NO_BIAS, "model.pool=gap"),
    "no-positions": ("model.posemb=none", "model.gelu=quick"),
    "fc_norm": ("model.pool=gap", "model.fc_norm=true", "model.registers=1"),
    "map": ("model.pool=map", "model.registers=3", "model.gelu=tanh"),
    "eva-swiglu": ("model.swiglu=true",),
    "eva-axial": ("model.rope=axial", "model.rope_reference=5", "model.rope_offset=1"),
    "eva-dinov3": ("model.rope=dinov3", "model.posemb=none", "model.registers=2"),
    "eva-mixed": ("model.rope=mixed", "model.qk_norm=layernorm", "model.qkv_bias=false"),
    "eva-norms": ("model.attention_norm=true", "model.mlp_norm=true", "model.pre_norm=true"),
    "eva-no-bias": ("model.rope=axial", *NO_BIAS, "model.swiglu=true", "model.pre_norm=true"),
    "eva-gap": ("model.rope=axial", "model.pool=gap", "model.fc_norm=true"),
    "eva-map": ("model.pool=map", "model.class_token=true", "model.pool_heads=1"),
    "eva-epsilon": ("model.rope=axial", "model.norm_epsilon=1e-5", "model.final_norm=false"),
}


def exported(case: str, folder, *more: str):
    """(logits of a run, the folder it is exported to), on images of 16 x 24 px."""
    cfg = tiny_config(*CASES.get(case, ()), "data.width=24", *more)
    model = build(cfg.model, config.image_size(cfg))
    params = random_params(model)
    run = write_run(folder / "run", cfg, params)
    lines = export(run, "safetensors-timm", folder / "timm")
    images = np.random.RandomState(0).randn(2, 16, 24, 3).astype(np.float32)
    return images, np.asarray(jax.jit(model.apply)(params, images)), lines


@pytest.mark.parametrize("case", CASES)
def test_read_again_it_is_the_same_model(case, tmp_path):
    images, logits, lines = exported(case, tmp_path)
    content = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert ("rope" in content["architecture"] or "dinov3" in content["architecture"]) == (
        case.startswith("eva")
    )
    loaded = pretrained.load_model(tmp_path / "timm")
    result = jax.jit(loaded.model.apply)(loaded.params, images)
    np.testing.assert_allclose(result, logits, atol=2e-5)
    assert np.ptp(logits) > 0.1 and not any("norm_epsilon" in line for line in lines)


@pytest.mark.parametrize("case", CASES)
def test_timm_computes_the_same(case, tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    images, logits, _ = exported(case, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        result = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(result, logits, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("model.variant=C+Ti/8",), r"VisionTransformer has no model.variant=C\+Ti/8"),
        (("model.pool=cls_gap",), "timm's VisionTransformer has no model.pool=cls_gap"),
        (("model.qk_norm=rmsnorm",), "qk_norm=rmsnorm beside norm=layernorm"),
        (("model.rope=axial", "model.distilled=true"), "timm's Eva has no model.distilled=True"),
        (("model.rope=axial", "model.gelu=tanh"), "timm's Eva has no model.gelu=tanh"),
        (
            ("model.pool=map", "model.class_token=true", "model.registers=1"),
            "timm's Eva has no model.registers=1 outside of the pool",
        ),
        (("model.swiglu=true", "model.norm=rmsnorm"), "timm's Eva has no model.norm=rmsnorm"),
        (
            ("model.rope=axial", "model.posemb=none", "model.pre_norm=true"),
            "no bias of the patch embedding beside a norm",
        ),
    ],
)
def test_what_timm_has_not_is_refused(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        exported("", tmp_path, *fields)
    assert not (tmp_path / "timm").exists()


DINOV2 = {
    "registers": ("model.registers=2", "model.layer_scale=.1"),
    "swiglu": ("model.swiglu=true", "model.pool=cls_gap"),
    "cls_gap": ("model.pool=cls_gap", *NO_BIAS),
    "gap": ("model.pool=gap", "model.class_token=true", "model.registers=1", "model.posemb=none"),
    "quick": ("model.gelu=quick",),
}


def dinov2(case: str, folder) -> tuple[np.ndarray, np.ndarray]:
    """(images, logits) of a run that is exported to FOLDER/hf."""
    cfg = tiny_config(*(() if case == "swiglu" else ("model.mlp=32",)), *DINOV2[case])
    model = build(cfg.model, (16, 16))
    params = random_params(model)
    lines = export(write_run(folder / "run", cfg, params), "safetensors-hf", folder / "hf")
    kind = "Dinov2WithRegisters" if "registers" in str(DINOV2[case]) else "Dinov2"
    assert f"transformers.{kind}ForImageClassification.from_pretrained(" in lines[0]
    images = np.random.RandomState(0).randn(2, 16, 16, 3).astype(np.float32)
    return images, np.asarray(jax.jit(model.apply)(params, images))


@pytest.mark.parametrize("case", DINOV2)
def test_newer_blocks_are_read_again_as_dinov2(case, tmp_path):
    images, logits = dinov2(case, tmp_path)
    loaded = pretrained.load_model(tmp_path / "hf")
    assert "huggingface-dinov2" in loaded.notes[0] and loaded.cfg.model.pool == "cls_gap"
    result = jax.jit(loaded.model.apply)(loaded.params, images)
    np.testing.assert_allclose(result, logits, atol=2e-5)


@pytest.mark.parametrize("case", DINOV2)
def test_transformers_dinov2_computes_the_same(case, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    images, logits = dinov2(case, tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        result = model(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.numpy()
    np.testing.assert_allclose(result, logits, atol=1e-4)
    assert type(model).__name__.startswith("Dinov2")


def test_an_mlp_that_transformers_cannot_have_is_refused(tmp_path):
    cfg = tiny_config("model.registers=2", "model.mlp=24")  # 1.5 times the width
    run = write_run(tmp_path / "run", cfg, random_params(build(cfg.model, (16, 16))))
    with pytest.raises(UserError, match=r"model\.registers=2, which Hugging Face transformers"):
        export(run, "safetensors-hf", tmp_path / "hf")


@pytest.mark.parametrize("kind", ["safetensors-hf", "npz"])
@pytest.mark.parametrize(
    "field",
    [
        *("rope=axial", "norm=rmsnorm", "pre_norm=true", "nearest_grid=true"),
        *("final_norm=false", "attention_norm=true", "mlp_norm=true", "qk_norm=layernorm"),
    ],
)
def test_formats_of_the_first_vit_refuse_newer_blocks(kind, field, tmp_path):
    """Rotary positions and a GELU are in no array: nothing else would tell."""
    cfg = tiny_config(f"model.{field}")
    params = random_params(build(cfg.model, (16, 16)))
    run = write_run(tmp_path / "run", cfg, params)
    out = tmp_path / ("x.npz" if kind == "npz" else "out")
    with pytest.raises(UserError, match="doesn't support: export to safetensors-timm"):
        export(run, kind, out)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["safetensors-hf", "npz"])
def test_absent_biases_and_layer_scale_are_the_same_function(kind, tmp_path):
    cfg = tiny_config(*NO_BIAS, "model.layer_scale=.1", "model.posemb=none")
    model = build(cfg.model, (16, 16))
    params = random_params(model)
    run = write_run(tmp_path / "run", cfg, params)
    out = tmp_path / ("x.npz" if kind == "npz" else "out")
    export(run, kind, out)
    loaded = pretrained.load_model(out)
    images = np.random.RandomState(0).randn(2, 16, 16, 3).astype(np.float32)
    expected = jax.jit(model.apply)(params, images)
    np.testing.assert_allclose(
        jax.jit(loaded.model.apply)(loaded.params, images), expected, atol=2e-5
    )
    assert loaded.cfg.model.qkv_bias and not loaded.cfg.model.layer_scale

"""The families that people start from: features and logits are those of their own libraries.

The tiny models in golden/families are transformers', timm's, or spelt as Meta and OpenAI do
(golden/make_families.py), so that every format is tested where those libraries are absent.
"""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from vit_scale import cli, pretrained
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.parameters import named
from vit_scale.pretrained import Hints, adapt, weight_files
from vit_scale.pretrained.formats import FORMATS
from vit_scale.pretrained.formats.timm import check_periods
from vit_scale.pretrained.rotary_channels import ORDERS, reorder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "families"
EXPECTED = dict(np.load(GOLDEN / "expected.npz"))
HEADS = Hints(heads=3)
EVA = {"rope": "axial", "rope_reference": 16, "mlp_norm": True, "swiglu": True}
CASES = {  # file or folder: (format, fields of the model block that it must come to)
    "dinov2": ("huggingface-dinov2", {"layer_scale": 1e-5, "norm_epsilon": 1e-6, "registers": 0}),
    "dinov2-gated": ("huggingface-dinov2", {"swiglu": True, "pool": "cls_gap"}),
    "dinov2-registers": ("huggingface-dinov2", {"registers": 2, "pool": "cls_gap"}),
    "dinov3": ("huggingface-dinov3", {"rope": "dinov3", "posemb": "none", "rope_rescale": 2.0}),
    "dinov3-gated": ("huggingface-dinov3", {"swiglu": True, "norm_epsilon": 1e-5}),
    "siglip": ("huggingface-siglip", {"pool": "map", "gelu": "tanh"}),
    "siglip-pair": ("huggingface-siglip", {"pool": "map", "gelu": "tanh"}),
    "siglip2-naflex": ("huggingface-siglip", {"pool": "map"}),
    "clip": ("huggingface-clip", {"pre_norm": True, "patch_bias": False, "gelu": "quick"}),
    "clip-pair": ("huggingface-clip", {"pre_norm": True, "classes": 6}),
    "mae": ("huggingface", {"pool": "cls", "norm_epsilon": 1e-12}),
    "meta-dinov2.safetensors": ("timm", {"registers": 4, "layer_scale": 1e-5}),
    "meta-dinov3.safetensors": ("timm", {"rope": "dinov3", "norm_epsilon": 1e-5, "swiglu": True}),
    "open_clip": ("open_clip", {"gelu": "quick", "pre_norm": True, "classes": 6}),
    "timm-eva02": ("timm", {**EVA, "pool": "gap", "fc_norm": True}),
    "timm-eva02-clip": ("timm", {**EVA, "attention_norm": True, "pool": "cls"}),
    "timm-rope": ("timm", {"rope": "axial", "rope_temperature": 100.0, "posemb": "learned"}),
    "timm-rope-mixed": ("timm", {"rope": "mixed", "posemb": "none"}),
    "timm-dinov3": ("timm", {"rope": "dinov3", "qkv_bias": False, "pool": "gap"}),
    "timm-pe": ("timm", {"rope_offset": 1.0, "pool": "map", "class_token": True, "pool_heads": 8}),
    "timm-registers": ("timm", {"registers": 2, "qk_norm": "layernorm", "pre_norm": True}),
}


@functools.cache
def golden(case: str) -> pretrained.Pretrained:
    return pretrained.load_model(GOLDEN / case, HEADS)


def values(loaded: pretrained.Pretrained, images: np.ndarray, method: str = "cubic") -> np.ndarray:
    """Its logits of images of any size; without a head, the pooled features."""
    cfg, params = loaded.cfg.model.copy_and_resolve_references(), loaded.params
    if not loaded.classes:
        cfg.classes = loaded.model.shape.pooled
        head = {"kernel": np.eye(cfg.classes, dtype=np.float32), "bias": np.zeros(cfg.classes, "f")}
        params = params | {"head": head}
    model = build(cfg, images.shape[1:3])
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract_params)
    params, _ = adapt(params, target, method, same_classes=True)
    return np.asarray(jax.jit(model.apply)(params, images))


@pytest.mark.parametrize("case", CASES)
def test_values_equal_those_of_the_original_library(case):
    fmt, fields = CASES[case]
    loaded, name = golden(case), case.partition(".")[0]
    images, expected = EXPECTED[f"{name}/images"], EXPECTED[f"{name}/values"]
    assert f"init.dialect={fmt})" in loaded.notes[0]
    assert {field: loaded.cfg.model[field] for field in fields} == fields
    assert loaded.model.shape.size.heads == 3
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(values(loaded, images), expected, atol=2e-5)


@pytest.mark.parametrize("case", [name for name in EXPECTED if name.endswith("-wide/images")])
def test_another_resolution_equals_transformers(case):
    """8 x 20 px: positions are resampled as torch does without antialiasing, or rotary."""
    name = case.removesuffix("-wide/images")
    images, expected = EXPECTED[case], EXPECTED[case.replace("images", "values")]
    assert images.shape[1:3] == (8, 20)
    np.testing.assert_allclose(values(golden(name), images, "bicubic"), expected, atol=2e-5)
    if name != "dinov3":
        assert np.abs(values(golden(name), images, "cubic") - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("case", "aside"),
    [
        ("siglip-pair", "text_model."),
        ("clip-pair", "text_model."),
        ("mae", "decoder"),
        ("meta-dinov2.safetensors", "teacher.dino_head"),
        ("open_clip", "text_projection"),
        ("dinov3", "embeddings.mask_token"),
    ],
)
def test_what_is_not_the_image_tower_is_left_aside_with_a_line(case, aside):
    notes = golden(case).notes
    assert any("ignored" in note and aside in note for note in notes), notes


def test_biases_of_keys_that_are_always_zero_are_said():
    assert "the biases of keys are zero" in golden("dinov3").notes
    for case in ("dinov3", "timm-eva02", "meta-dinov3.safetensors"):
        attention = golden(case).params["blocks"]["attention"]
        np.testing.assert_array_equal(attention["key"]["bias"], 0)
        assert np.abs(attention["query"]["bias"]).max() > 0.1


def copied(case: str, folder: pathlib.Path, **changes) -> pathlib.Path:
    """A copy of a golden folder, with a config.json changed; None removes the file."""
    shutil.copytree(GOLDEN / case, folder, dirs_exist_ok=True)
    for name, fields in changes.items():
        file = folder / f"{name}.json"
        if fields is None:
            file.unlink()
        else:
            file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def refused(message: str, source: pathlib.Path, hints: Hints = HEADS) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pretrained.load_model(source, hints)
    assert "\n" not in str(caught.value)


def test_clips_head_is_said_to_be_no_classifier():
    line = "the head is the projection to the space that images and texts share: no classifier"
    assert line in golden("clip").notes and line in golden("open_clip").notes
    assert line not in golden("dinov2-gated").notes


LISTED = """\
size           no standard one: width 24, 2 blocks, 3 heads, MLP 20
patch          4 px, a grid of 3 x 3
tokens         10, 1 before the patches; pool=cls
image          12 x 12 px
parameters     8,638
parts          gelu=quick, norm_epsilon=1e-05, patch_bias=False, pre_norm=True
preprocessing  mean 0.4, 0.4, 0.4, std 0.2, 0.2, 0.2; fit=shorter, crop=1, bicubic
classes        6: 0, 1, 2, ...
"""


def test_convert_lists_what_a_file_is(capsys):
    assert cli.main(["convert", str(GOLDEN / "open_clip"), "--list"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(LISTED)
    assert "ignored, not part of the model: text_projection" in printed
    assert "assuming, as the file does not say: model.norm_epsilon=1e-05" in printed
    for arguments in ([], ["OUT", "--list"]):
        assert cli.main(["convert", str(GOLDEN / "open_clip"), *arguments]) == 2
        assert "SOURCE and OUT, or SOURCE and --list" in capsys.readouterr().err


def test_eva_without_a_config_needs_its_architecture(tmp_path):
    """Its arrays are those of a model with and without rotary positions."""
    folder = copied("timm-eva02", tmp_path, config=None)
    refused("don't tell whether positions are rotary.*init.architecture=", folder)
    hints = HEADS._replace(architecture="eva02_tiny_patch14_224")
    loaded = pretrained.load_model(folder, hints)
    for name, leaf in named(loaded.params).items():
        np.testing.assert_array_equal(leaf, named(golden("timm-eva02").params)[name], err_msg=name)
    assert loaded.cfg.model.rope == "axial"
    refused("the architecture beit_base of timm", folder, HEADS._replace(architecture="beit_base"))


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("dinov2", {"apply_layernorm": False}, "apply_layernorm=False is not supported"),
        ("dinov2", {"model_type": "vit"}, "model_type=vit, but the arrays are named as in"),
        ("dinov2", {"hidden_act": "relu"}, "the activation relu"),
        ("dinov3-gated", {"hidden_act": "gelu"}, "use_gated_mlp with gelu, not silu"),
        ("siglip", {"vision_use_head": False}, "vision_use_head=False is not supported"),
        ("timm-eva02", {"model_args": {"num_kv_heads": 1}}, "num_kv_heads=1, not a plain ViT"),
        (
            "timm-eva02",
            {"architecture": "vit_base_patch16_sapiens2"},
            "sapiens2 of timm has fewer heads",
        ),
        ("timm-rope", {"model_args": {"rope_type": "mrope"}}, "rope_type=mrope"),
    ],
)
def test_settings_that_no_model_here_has_are_refused(case, fields, message, tmp_path):
    refused(message, copied(case, tmp_path, config=fields))


def test_the_configs_settings_are_taken(tmp_path):
    folder = copied("dinov3", tmp_path / "a", config={"rope_theta": 50.0, "layer_norm_eps": 1e-3})
    model = pretrained.load_model(folder).cfg.model
    assert model.rope_temperature == 50.0 and model.norm_epsilon == 1e-3
    rope = {"use_rot_pos_emb": True, "rope_temperature": 7.0, "rope_grid_offset": 2.0}
    folder = copied("timm-rope", tmp_path / "b", config={"model_args": {"num_heads": 3, **rope}})
    model = pretrained.load_model(folder).cfg.model
    assert (model.rope_temperature, model.rope_offset) == (7.0, 2.0)


def test_rotary_periods_of_another_temperature_are_refused():
    usual = 100.0 ** (np.arange(16) / 16)
    arrays, _ = check_periods({"rope_embed.periods": usual.astype(np.float32), "x": usual}, 1)
    assert list(arrays) == ["x"]
    with pytest.raises(UserError, match="temperature of 100"):
        check_periods({"rope_embed.periods": 10.0 ** (np.arange(16) / 16)}, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_channels_go_back_to_the_librarys_order(order):
    draw = np.random.RandomState(0)
    shapes = {"query/kernel": (4, 2, 8), "key/bias": (2, 8), "query_norm/scale": (8,)}
    shapes |= {"value/kernel": (4, 2, 8), "out/kernel": (2, 8, 4)}
    params = {f"blocks/0/attention/{name}": draw.randn(*shape) for name, shape in shapes.items()}
    there = reorder(params, order)
    moved = {name for name in params if (there[name] != params[name]).any()}
    rotated = {name for name in params if "value" not in name and "out" not in name}
    assert moved == (set() if order == "halves" else rotated)
    for name, x in reorder(there, order, back=True).items():
        np.testing.assert_array_equal(x, params[name])


def test_a_file_that_lost_an_array_is_no_other_architecture(tmp_path):
    """Absent biases and norms are damage, unless the family has none."""
    file = GOLDEN / "timm-registers" / weight_files.SAFETENSORS
    shutil.copy(file.with_name("config.json"), tmp_path)
    arrays = weight_files.read_arrays(file)
    keys = ["norm.weight", "norm.bias", "norm_pre.bias", "head.weight"]
    keys += [f"blocks.0.{name}" for name in ("norm1.bias", "attn.proj.bias", "attn.qkv.bias")]
    keys += [f"blocks.1.{name}" for name in ("ls1.gamma", "attn.q_norm.weight", "mlp.fc1.bias")]
    for key in keys:
        rest = {name: x for name, x in arrays.items() if name != key}
        weight_files.write_safetensors(tmp_path / weight_files.SAFETENSORS, rest)
        refused(f"missing: {key}", tmp_path)


def test_every_format_has_a_case():
    tested = {fmt for fmt, _ in CASES.values()} | {"google", "big_vision"}
    tested.add("big_vision-two_towers")  # test_two_towers.py
    assert tested == set(FORMATS)

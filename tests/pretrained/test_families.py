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
from vit_scale.pretrained.timm_config import read_timm_config

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
size           non-standard: width 24, 2 blocks, 3 heads, MLP 20
patch          4 px, a grid of 3 x 3
tokens         10, 1 before the patches; pool=cls
image          12 x 12 px
parameters     8,638
parts          gelu=quick, norm_epsilon=1e-05, patch_bias=False, pre_norm=True
preprocessing  mean 0.4, 0.4, 0.4, std 0.2, 0.2, 0.2; fit=shorter, crop=1, bicubic
classes        6: dimension 0, dimension 1, dimension 2, ...
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
    folder = copied("timm-eva02", tmp_path / "eva", config=None)
    refused("don't tell whether positions are rotary.*init.architecture=", folder)
    pe = copied("timm-pe", tmp_path / "pe", config=None)
    refused("it has attn_pool.*don't tell whether positions are rotary", pe)
    hints = HEADS._replace(architecture="eva02_tiny_patch14_224")
    loaded = pretrained.load_model(folder, hints)
    for name, leaf in named(loaded.params).items():
        np.testing.assert_array_equal(leaf, named(golden("timm-eva02").params)[name], err_msg=name)
    assert loaded.cfg.model.rope == "axial"
    refused("the architecture beit_base of timm", folder, HEADS._replace(architecture="beit_base"))


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("dinov2", {"auto_map": {"AutoModel": "x.y"}}, "auto_map=.*computed by other code"),
        ("clip-pair", {"post_layernorm": True}, "post_layernorm=True.*other code"),
        ("dinov2", {"model_type": "vit"}, "model_type=vit, but the arrays are named as in"),
        ("dinov2", {"hidden_act": "relu"}, "the activation relu"),
        ("dinov3-gated", {"hidden_act": "gelu"}, "use_gated_mlp with gelu, not silu"),
        ("siglip", {"vision_use_head": False}, "vision_use_head=False, which is not supported"),
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


def rope(**arguments):
    """(fields, order of channels) of timm's DINOv3 with these arguments beside it."""
    content = {"architecture": "vit_small_patch16_dinov3", "model_args": arguments}
    read = read_timm_config(pathlib.Path("x"), content)
    return {name: read.model.get(name) for name in ("rope", "rope_temperature")}, read.channels


def test_arguments_change_only_what_they_state():
    named = {"rope": "dinov3", "rope_temperature": 100.0}, "halves"
    assert rope() == rope(rope_rescale_coords=2.0) == rope(use_rot_pos_emb=True) == named
    assert rope(rope_temperature=50) == ({**named[0], "rope_temperature": 50.0}, "halves")
    assert rope(rope_rotate_half=False)[1] == "pairs"
    eva = {"architecture": "eva02_base_patch14_224", "model_args": {"use_rot_pos_emb": True}}
    read = read_timm_config(pathlib.Path("x"), eva)
    assert (read.model["rope_reference"], read.channels) == (16, "pairs")
    eva["model_args"] = {"ref_feat_shape": [24, 24]}
    assert read_timm_config(pathlib.Path("x"), eva).model["rope_reference"] == 24


PROCESSOR = {  # as transformers 5.24 saves it
    "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 2,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "DINOv3ViTImageProcessor", "rescale_factor": 1 / 255,
    "size": {"height": 12, "width": 12},
}  # fmt: skip


def test_image_processors_of_the_families(tmp_path):
    """DINOv3's own; DINOv2's crops to another size than that of its positions, which is said."""
    file = copied("dinov3", tmp_path / "a") / "preprocessor_config.json"
    file.write_text(json.dumps(PROCESSOR))
    view = pretrained.load_model(file.parent).cfg.eval
    assert (view.fit, view.resample) == ("stretch", "bilinear")
    file = copied("dinov2", tmp_path / "b") / "preprocessor_config.json"
    bit = {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 8, "width": 8}}
    file.write_text(json.dumps(PROCESSOR | bit | {"size": {"shortest_edge": 10}}))
    notes = pretrained.load_model(file.parent).notes
    assert any("makes 8 x 8 px; the model here takes 12 x 12 px" in note for note in notes)
    assert any("NaFlex keeps the shape" in note for note in golden("siglip2-naflex").notes)


def test_a_patch_that_does_not_divide_the_image_is_said(tmp_path):
    loaded = pretrained.load_model(copied("siglip", tmp_path, config={"image_size": 14}))
    assert any("14 x 14 px, of which the patches cover 12 x 12" in note for note in loaded.notes)


def test_a_text_towers_config_may_override(tmp_path):
    fields = {"vision_config_dict": {"hidden_act": "gelu"}}
    loaded = pretrained.load_model(copied("clip-pair", tmp_path, config=fields))
    assert loaded.cfg.model.gelu == "exact" and golden("clip-pair").cfg.model.gelu == "quick"


def test_openais_own_files_have_the_quick_gelu(tmp_path):
    arrays = weight_files.read_arrays(GOLDEN / "open_clip" / weight_files.FILE_NAMES[-1])
    file = tmp_path / "x.safetensors"
    for more, gelu in (({}, "exact"), ({"input_resolution": np.int64([12])}, "quick")):
        weight_files.write_safetensors(file, arrays | more)
        assert pretrained.load_model(file, HEADS).cfg.model.gelu == gelu


def test_open_clips_config_of_a_tower_of_timm(tmp_path):
    """With preprocessing, for both kinds of tower."""
    shutil.copy(GOLDEN / "timm-registers" / weight_files.SAFETENSORS, tmp_path)
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 12}
    view = {"mean": [0.1] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    content = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": view}
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps(content))
    cfg = pretrained.load_model(tmp_path).cfg
    assert tuple(cfg.augment.mean) == (0.1, 0.1, 0.1)
    assert (cfg.eval.fit, cfg.eval.resample) == ("stretch", "bilinear")
    file.write_text(json.dumps(content | {"preprocess_cfg": {"resize_mode": "longest"}}))
    refused("resize_mode=longest: not supported", tmp_path)
    file.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "radio"}))
    notes = pretrained.load_model(tmp_path, HEADS).notes
    assert "config.json beside it is not timm's, but of radio: ignored" in notes
    assert "model.rope=none" in notes[-1], "assumed: no array would tell"


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

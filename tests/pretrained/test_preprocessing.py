"""preprocessing: settings of other libraries are honoured or refused, and exported."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.helpers.tiny import CLASSES, random_params, tiny_config, tiny_model, write_run
from vit_scale import pretrained
from vit_scale.augment.view import View
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.parameters import named
from vit_scale.pretrained import Hints, adapt, weight_files

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
HEADS = Hints(heads=3, trained_size=(12, 12))
SQUARE = {"height": 12, "width": 12}


@pytest.fixture
def huggingface(tmp_path):
    """huggingface(do_normalize=False, ...) is the golden folder with such a preprocessor."""
    folder = shutil.copytree(GOLDEN / "huggingface", tmp_path / "hf")

    def read(config=(), **fields) -> pretrained.Pretrained:
        content = json.loads((GOLDEN / "huggingface/config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | dict(config)))
        (folder / "preprocessor_config.json").write_text(json.dumps(fields))
        return pretrained.load_model(folder)

    return read


@pytest.fixture
def timm(tmp_path):
    """timm(crop_pct=.9, ...) is the golden file beside such a pretrained_cfg."""
    shutil.copy(GOLDEN / "timm.safetensors", tmp_path / weight_files.SAFETENSORS)

    def read(top=(), **fields) -> pretrained.Pretrained:
        content = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": fields, **dict(top)}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return pretrained.load_model(tmp_path, HEADS)

    return read


def seen(loaded: pretrained.Pretrained) -> View:
    return View(*(loaded.cfg.eval[name] for name in View._fields))


def assumed(loaded: pretrained.Pretrained) -> str:
    return next((line for line in loaded.notes if line.startswith("assuming")), "")


def normalise(loaded: pretrained.Pretrained, value: float) -> float:
    """What the model gets of a pixel 0..255, of the first channel."""
    return (value / 255 - loaded.cfg.augment.mean[0]) / loaded.cfg.augment.std[0]


@pytest.mark.parametrize(
    ("fields", "of_200"),
    [
        ({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}, (200 / 255 - 0.4) / 0.2),
        ({"do_normalize": False}, 200 / 255),
        ({"do_normalize": False, "do_rescale": False}, 200),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [50] * 3}, 72.5 / 50),
        ({"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}, 200 / 127.5 - 1),
        ({"do_normalize": False, "rescale_factor": 1 / 128}, 200 / 128),
    ],
)
def test_rescaling_and_normalising(fields, of_200, huggingface):
    loaded = huggingface(**fields)
    assert normalise(loaded, 200) == pytest.approx(of_200, rel=1e-6)
    assert "augment.mean" not in assumed(loaded)


def test_a_mean_of_the_unit_range_is_unchanged(huggingface):
    loaded = huggingface(image_mean=[0.485, 0.456, 0.406], rescale_factor=0.00392156862745098)
    assert loaded.cfg.augment.mean == (0.485, 0.456, 0.406)
    assert loaded.cfg.augment.std == (0.5, 0.5, 0.5) and "augment.std=(0.5,0.5,0.5)" in assumed(
        loaded
    )


@pytest.mark.parametrize(
    ("fields", "view"),
    [
        ({"size": SQUARE, "resample": 2}, View("stretch", 1.0, "bilinear")),
        ({"size": SQUARE, "resample": 3}, View("stretch", 1.0, "bicubic")),
        ({"size": 12, "resample": 1}, View("stretch", 1.0, "lanczos")),
        (
            {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": SQUARE},
            View("shortest_edge", 0.75, "bilinear"),
        ),
        (
            {"size": {"shortest_edge": 12}, "do_center_crop": True, "crop_size": 12},
            View("shortest_edge", 1.0, "bilinear"),
        ),
        (
            {"size": {"height": 16, "width": 16}, "do_center_crop": True, "crop_size": SQUARE},
            View("stretch", 0.75, "bilinear"),
        ),
        (
            {
                "size": 16,
                "image_processor_type": "CLIPImageProcessor",
                "do_center_crop": True,
                "crop_size": 12,
            },
            View("shortest_edge", 0.75, "bicubic"),
        ),
        (
            {"do_resize": False, "size": {"height": 99, "width": 99}},
            View("stretch", 1.0, "bilinear"),
        ),
    ],
)
def test_resizing_and_cropping(fields, view, huggingface):
    assert seen(huggingface(**fields)) == view


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample": 0}, "unsupported resample=0; supported: bilinear, bicubic, lanczos"),
        ({"size": {"shortest_edge": 12}}, "without a centre crop"),
        ({"size": {"longest_edge": 12}}, "needs shortest_edge, or height and width"),
        ({"size": {"height": 24, "width": 24}}, "makes images of 24 x 24 px"),
        (
            {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": 12},
            "crop of 12 x 12 out of 10 x 10 px: images would be padded",
        ),
        (
            {"size": {"height": 15, "width": 15}, "do_center_crop": True, "crop_size": 12},
            "it starts at half a pixel, which transformers rounds down",
        ),
        (
            {"size": {"height": 15, "width": 18}, "do_center_crop": True, "crop_size": 12},
            "differ in shape",
        ),
        ({"do_pad": True}, "unsupported setting do_pad=True"),
        ({"do_flip_channel_order": True}, "unsupported setting do_flip_channel_order=True"),
        ({"rescale_offset": True}, "rescale_offset=True"),
        ({"crop_pct": 0.875, "size": {"shortest_edge": 12}}, "crop_pct=0.875"),
        (
            {"image_processor_type": "LevitImageProcessor"},
            "unsupported image processor LevitImageProcessor",
        ),
        ({"do_resize": False, "do_center_crop": True}, "do_center_crop without do_resize"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5] must have three values"),
        ({"image_std": [0, 1, 1]}, "image_std=[0, 1, 1] must have three values above 0"),
        (
            {"size": 12, "do_center_crop": True, "crop_size": {"shortest_edge": 12}},
            "crop_size={'shortest_edge': 12}: needs height and width",
        ),
        ({"do_rescale": False}, "rescale_factor=1.0 without image_mean"),
        ({"size": "large"}, "is not as Hugging Face transformers writes it"),
    ],
)
def test_unsupported_preprocessors_are_refused(fields, message, huggingface):
    with pytest.raises(UserError) as caught:
        huggingface(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_of_image_processors(huggingface):
    """Bit's and CLIP's crop, and resize by bicubic interpolation, unless they are told not to."""
    loaded = huggingface(image_processor_type="BitImageProcessor", size=16, crop_size=12)
    assert seen(loaded) == View("shortest_edge", 0.75, "bicubic")
    named = huggingface(size=SQUARE, resample="bicubic", rescale_factor=None, do_pad=None)
    assert seen(named) == View("stretch", 1.0, "bicubic")


def test_transformers_5_may_use_processor_config_json(tmp_path):
    folder = shutil.copytree(GOLDEN / "huggingface", tmp_path / "hf")
    (folder / "preprocessor_config.json").unlink()
    content = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "size": SQUARE, "resample": 1}}
    (folder / "processor_config.json").write_text(json.dumps(content))
    loaded = pretrained.load_model(folder)
    assert loaded.cfg.augment.mean == (0.1, 0.2, 0.3)
    assert seen(loaded) == View("stretch", 1.0, "lanczos")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type=multi_label_classification"),
        ({"problem_type": "regression"}, "problem_type=regression"),
        (
            {"model_type": "dinov2"},
            "model_type=dinov2, but the arrays are named as in Hugging Face",
        ),
        ({"model_type": "beit"}, "model_type=beit"),
        ({"num_channels": 1}, "num_channels=1"),
    ],
)
def test_other_model_types_are_refused(config, message, huggingface):
    with pytest.raises(UserError, match=message):
        huggingface(config)
    assert huggingface({"problem_type": "single_label_classification"}).model.shape.size.heads == 3


@pytest.mark.parametrize(
    ("fields", "view"),
    [
        (
            {"crop_pct": 0.95, "interpolation": "lanczos", "crop_mode": "squash"},
            View("stretch", 0.95, "lanczos"),
        ),
        ({"crop_pct": 1.0, "interpolation": "bilinear"}, View("shorter", 1.0, "bilinear")),
        ({}, View("shorter", 0.875, "bicubic")),  # timm's own defaults
    ],
)
def test_timm_preprocessing(fields, view, timm):
    loaded = timm(**fields)
    assert seen(loaded) == view
    assert loaded.cfg.augment.mean == (0.485, 0.456, 0.406) and "augment.mean" in assumed(loaded)
    said = {"crop_pct": "eval.crop", "interpolation": "eval.resample", "crop_mode": "eval.fit"}
    for name, field in said.items():
        assert (field in assumed(loaded)) == (name not in fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode=border"),
        ({"interpolation": "random"}, "interpolation=random"),
        ({"crop_pct": 1.2}, "crop_pct=1.2 must be above 0 and at most 1"),
    ],
)
def test_unsupported_timm_preprocessing_is_refused(fields, message, timm):
    with pytest.raises(UserError, match=message):
        timm(**fields)


def test_timm_class_names_in_either_place(timm):
    names = ["e", "d", "c", "b", "a"]
    assert timm(label_names=names).classes == tuple(names)
    assert timm({"label_names": names}).classes == tuple(names)
    assert timm({"label_names": names}, label_names=names[::-1]).classes == tuple(names)
    assert timm({"labels": names}).classes == tuple(names)
    numbered = {str(i): name for i, name in reversed(list(enumerate(names)))}
    assert timm(label_names=numbered).classes == tuple(names)
    with pytest.raises(UserError, match="names 4 classes, for outputs 1 to 4"):
        timm(label_names={key: name for key, name in numbered.items() if key != "0"})


def test_a_flat_config_of_older_timm(tmp_path):
    shutil.copy(GOLDEN / "timm.safetensors", tmp_path / weight_files.SAFETENSORS)
    content = {"architecture": "vit_tiny_patch16_224", "mean": [0.4, 0.5, 0.6], "crop_pct": 0.8}
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = pretrained.load_model(tmp_path, HEADS)
    assert loaded.cfg.augment.mean == (0.4, 0.5, 0.6) and loaded.cfg.eval.crop == 0.8


def test_architectures_that_compute_something_else(timm):
    for name, reason in (
        ("vit_base_patch16_rpn_224", "has norms behind attention and MLP"),
        ("vit_large_patch16_sapiens2", "has fewer heads of keys than of queries"),
        ("beit_base", "is not a plain ViT"),
    ):
        with pytest.raises(UserError, match=f"architecture {name} of timm {reason}"):
            timm({"architecture": name})
    heads = {"model_args": {"num_heads": 3}}
    loaded = timm({"architecture": "vit_so400m_patch16_siglip_256", **heads})
    assert loaded.cfg.model.gelu == "tanh" and "model.gelu" not in assumed(loaded)
    loaded = timm({"architecture": "vit_base_patch32_clip_quickgelu_224", **heads})
    assert loaded.cfg.model.gelu == "quick" and loaded.cfg.model.norm_epsilon == 1e-5
    assert "model.gelu" not in assumed(timm())


def test_a_config_of_another_model_is_refused(timm, huggingface):
    with pytest.raises(UserError, match="says depth 12, but the arrays have depth 2"):
        timm({"model_args": {"depth": 12, "embed_dim": 12}})
    with pytest.raises(UserError, match="says width 768, but the arrays have width 12"):
        huggingface({"hidden_size": 768})


def test_huggingface_class_names(huggingface):
    turned = {str(i): f"LABEL_{4 - i}" for i in range(5)}
    assert huggingface({"id2label": turned}).classes[0] == "LABEL_4"
    plain = {str(i): f"LABEL_{i}" for i in range(5)}
    assert huggingface({"id2label": plain}).classes == ("0", "1", "2", "3", "4")
    with pytest.raises(UserError, match="names 5 classes, for outputs 1 to 5"):
        huggingface({"id2label": {str(i): "x" for i in range(1, 6)}})


def exported(tmp_path, kind: str, *overrides: str) -> dict:
    cfg = tiny_config(*overrides)
    run = write_run(tmp_path / "run", cfg, random_params(tiny_model()), data={"images": 3})
    out = tmp_path / "out"
    lines = export(run, kind, out)
    name = "config.json" if kind == "safetensors-timm" else "preprocessor_config.json"
    content = json.loads((out / name).read_text())
    back = pretrained.load_model(out)
    return {"content": content, "back": seen(back), "lines": lines[1:]}


FOLDER = "data.name=folder"


@pytest.mark.parametrize(
    ("overrides", "view"),
    [
        ((FOLDER,), View("shorter", 1.0, "bicubic")),
        ((FOLDER, "eval.crop=0.8"), View("shorter", 0.8, "bicubic")),
        ((FOLDER, "eval.fit=stretch"), View("stretch", 1.0, "bicubic")),
        (
            (FOLDER, "eval.fit=stretch", "eval.crop=0.8", "eval.resample=lanczos"),
            View("stretch", 0.8, "lanczos"),
        ),
        (("data.resolution=16",), View("shorter", 1.0, "bilinear")),  # enlarged on the device
    ],
)
@pytest.mark.parametrize("kind", ["safetensors-timm", "safetensors-hf"])
def test_views_survive_export_and_import(kind, overrides, view, tmp_path):
    if kind == "safetensors-hf" and view.fit == "shorter":
        view, overrides = view._replace(fit="shortest_edge"), (*overrides, "eval.fit=shortest_edge")
    result = exported(tmp_path, kind, *overrides)
    assert result["back"] == view and result["lines"] == []


def test_differences_of_preprocessing_are_reported(tmp_path):
    result = exported(tmp_path, "safetensors-timm", FOLDER, "data.load=20")
    assert "resizes images twice" in result["lines"][0]
    result = exported(tmp_path / "cover", "safetensors-hf", FOLDER, "eval.fit=cover")
    assert "fractions of a pixel (eval.fit=cover)" in result["lines"][0]
    assert result["back"].fit == "shortest_edge"
    for kind, fit in (("safetensors-timm", "shortest_edge"), ("safetensors-hf", "shorter")):
        (line,) = exported(tmp_path / kind, kind, FOLDER, f"eval.fit={fit}")["lines"]
        assert f"this run rounds half pixels as eval.fit={fit}, the other library as" in line
    assert result["content"]["do_center_crop"] and result["content"]["crop_size"] == {
        "height": 16,
        "width": 16,
    }


def test_the_json_beside_an_npz(tmp_path):
    cfg = tiny_config(FOLDER, "eval.crop=0.75", "eval.fit=stretch")
    run = write_run(tmp_path / "run", cfg, random_params(tiny_model()), data={"images": 3})
    export(run, "npz", tmp_path / "x.npz")
    back = pretrained.load_model(tmp_path / "x.npz")
    assert seen(back) == View("stretch", 0.75, "train") and back.classes == CLASSES
    assert assumed(back) == ""
    beside = json.loads((tmp_path / "x.json").read_text())
    del beside["eval"]  # as earlier versions wrote it
    (tmp_path / "x.json").write_text(json.dumps(beside))
    assert "eval.crop=1.0" in assumed(pretrained.load_model(tmp_path / "x.npz"))


def test_a_head_without_a_bias(tmp_path):
    for case, weight, bias in (
        ("timm.safetensors", "head.weight", "head.bias"),
        ("google.npz", "head/kernel", "head/bias"),
    ):
        arrays = weight_files.read_arrays(GOLDEN / case)
        write = weight_files.write_npz if case.endswith("npz") else weight_files.write_safetensors
        write(tmp_path / case, {name: x for name, x in arrays.items() if name != bias})
        loaded = pretrained.load_model(tmp_path / case, HEADS)
        assert "the head has no bias: set to zero" in loaded.notes and len(loaded.classes) == 5
        assert not np.any(loaded.params["head"]["bias"]) and arrays[weight].size == 60


def test_absent_attention_biases_are_no_parameters(tmp_path):
    """And in a model that has them, they start at zero, with the same logits."""
    arrays = weight_files.read_arrays(GOLDEN / "timm.safetensors")
    biases = [name for name in arrays if name.endswith("qkv.bias")]
    for name in biases:
        arrays[name] = np.zeros_like(arrays[name])
    weight_files.write_safetensors(tmp_path / "zero.safetensors", arrays)
    without = {name: x for name, x in arrays.items() if name not in biases}
    weight_files.write_safetensors(tmp_path / "x.safetensors", without)
    left, right = (
        pretrained.load_model(tmp_path / f"{n}.safetensors", HEADS) for n in ("x", "zero")
    )
    assert not left.cfg.model.qkv_bias and right.cfg.model.qkv_bias
    params, rows = adapt(left.params, right.params, "cubic", same_classes=True)
    for name, leaf in named(params).items():
        np.testing.assert_array_equal(leaf, named(right.params)[name], err_msg=name)
    actions = {row.name: row.action for row in rows}
    assert actions["blocks/attention/key/bias"] == "new: zero, the source has no bias"
    assert actions["blocks/attention/key/kernel"] == "kept"
    del arrays[biases[0]]
    weight_files.write_safetensors(tmp_path / "x.safetensors", arrays)
    with pytest.raises(UserError, match=r"missing: blocks\.0\.attn\.qkv\.bias"):
        pretrained.load_model(tmp_path / "x.safetensors", HEADS)

"""preprocessing: what others say of how pixels come in is honoured or refused, and said by ours."""

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
from vit_scale.pretrained import Hints, weight_files

pytestmark = pytest.mark.usefixtures("quick_compile")
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
    shutil.copy(GOLDEN / "timm.safetensors", tmp_path / weight_files.MODEL)

    def read(top=(), **fields) -> pretrained.Pretrained:
        content = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": fields, **dict(top)}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return pretrained.load_model(tmp_path, HEADS)

    return read


def seen(given: pretrained.Pretrained) -> View:
    return View(*(given.cfg.eval[name] for name in View._fields))


def assumed(given: pretrained.Pretrained) -> str:
    return next((line for line in given.notes if line.startswith("assuming")), "")


def normalise(given: pretrained.Pretrained, value: float) -> float:
    """What the model gets of a pixel 0..255, of the first channel."""
    return (value / 255 - given.cfg.augment.mean[0]) / given.cfg.augment.std[0]


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
    given = huggingface(**fields)
    assert normalise(given, 200) == pytest.approx(of_200, rel=1e-6)
    assert "augment.mean" not in assumed(given)


def test_a_plain_mean_is_the_very_number(huggingface):
    given = huggingface(image_mean=[0.485, 0.456, 0.406], rescale_factor=0.00392156862745098)
    assert given.cfg.augment.mean == (0.485, 0.456, 0.406)
    assert given.cfg.augment.std == (0.5, 0.5, 0.5) and "augment.std=(0.5,0.5,0.5)" in assumed(
        given
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
        ({"resample": 0}, "resample=0; images here are resized bilinear, bicubic, lanczos"),
        ({"size": {"shortest_edge": 12}}, "without a centre crop: images of any shape"),
        ({"size": {"longest_edge": 12}}, "is neither shortest_edge nor height and width"),
        ({"size": {"height": 24, "width": 24}}, "images of 24 x 24 px come out of it"),
        (
            {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": 12},
            "is smaller than crop_size",
        ),
        (
            {"size": {"height": 15, "width": 15}, "do_center_crop": True, "crop_size": 12},
            "begins at half a pixel, which is rounded down there and up here",
        ),
        (
            {"size": {"height": 15, "width": 18}, "do_center_crop": True, "crop_size": 12},
            "differ in shape",
        ),
        ({"do_pad": True}, "do_pad=True: no field here says so"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order=True: no field here says so"),
        ({"rescale_offset": True}, "rescale_offset=True"),
        ({"crop_pct": 0.875, "size": {"shortest_edge": 12}}, "crop_pct=0.875"),
        (
            {"image_processor_type": "LevitImageProcessor"},
            "LevitImageProcessor is none of the image",
        ),
        ({"do_resize": False, "do_center_crop": True}, "do_center_crop without do_resize"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5] is not of three channels"),
        ({"image_std": [0, 1, 1]}, "image_std=[0, 1, 1] is not of three channels, or not above 0"),
        (
            {"size": 12, "do_center_crop": True, "crop_size": {"shortest_edge": 12}},
            "crop_size={'shortest_edge': 12} is not height and width",
        ),
        ({"do_rescale": False}, "rescale_factor=1.0, and no image_mean is set"),
        ({"size": "large"}, "is not as Hugging Face transformers writes it"),
    ],
)
def test_preprocessors_that_are_refused(fields, message, huggingface):
    with pytest.raises(UserError) as caught:
        huggingface(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_kind_of_processor_does_without_a_word(huggingface):
    """Bit's and CLIP's crop, and resize by bicubic interpolation, unless they are told not to."""
    given = huggingface(image_processor_type="BitImageProcessor", size=16, crop_size=12)
    assert seen(given) == View("shortest_edge", 0.75, "bicubic")
    named = huggingface(size=SQUARE, resample="bicubic", rescale_factor=None, do_pad=None)
    assert seen(named) == View("stretch", 1.0, "bicubic")


def test_transformers_5_may_keep_it_in_another_file(tmp_path):
    folder = shutil.copytree(GOLDEN / "huggingface", tmp_path / "hf")
    (folder / "preprocessor_config.json").unlink()
    content = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "size": SQUARE, "resample": 1}}
    (folder / "processor_config.json").write_text(json.dumps(content))
    given = pretrained.load_model(folder)
    assert given.cfg.augment.mean == (0.1, 0.2, 0.3)
    assert seen(given) == View("stretch", 1.0, "lanczos")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type=multi_label_classification"),
        ({"problem_type": "regression"}, "problem_type=regression"),
        ({"model_type": "dinov2"}, "model_type=dinov2, which is no plain ViT"),
        ({"model_type": "beit"}, "model_type=beit"),
        ({"num_channels": 1}, "num_channels=1"),
    ],
)
def test_models_that_are_something_else(config, message, huggingface):
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
def test_timms_evaluation(fields, view, timm):
    given = timm(**fields)
    assert seen(given) == view
    assert given.cfg.augment.mean == (0.485, 0.456, 0.406) and "augment.mean" in assumed(given)
    said = {"crop_pct": "eval.crop", "interpolation": "eval.resample", "crop_mode": "eval.fit"}
    for name, field in said.items():
        assert (field in assumed(given)) == (name not in fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode=border"),
        ({"interpolation": "random"}, "interpolation=random"),
        ({"crop_pct": 1.2}, "crop_pct=1.2 is not above 0 and at most 1"),
    ],
)
def test_timms_that_are_refused(fields, message, timm):
    with pytest.raises(UserError, match=message):
        timm(**fields)


def test_timm_writes_label_names_in_two_places(timm):
    names = ["e", "d", "c", "b", "a"]
    assert timm(label_names=names).classes == tuple(names)
    assert timm({"label_names": names}).classes == tuple(names)
    assert timm({"label_names": names}, label_names=names[::-1]).classes == tuple(names)
    assert timm({"labels": names}).classes == tuple(names)
    numbered = {str(i): name for i, name in reversed(list(enumerate(names)))}
    assert timm(label_names=numbered).classes == tuple(names)
    with pytest.raises(UserError, match="given for outputs 1 to 4, 4 of them"):
        timm(label_names={key: name for key, name in numbered.items() if key != "0"})


def test_timms_older_config_is_one_dictionary(tmp_path):
    shutil.copy(GOLDEN / "timm.safetensors", tmp_path / weight_files.MODEL)
    content = {"architecture": "vit_tiny_patch16_224", "mean": [0.4, 0.5, 0.6], "crop_pct": 0.8}
    (tmp_path / "config.json").write_text(json.dumps(content))
    given = pretrained.load_model(tmp_path, HEADS)
    assert given.cfg.augment.mean == (0.4, 0.5, 0.6) and given.cfg.eval.crop == 0.8


def test_an_architecture_may_be_another_function_of_the_same_arrays(timm):
    for name in ("vit_base_patch16_rpn_224", "vit_base_patch32_clip_quickgelu_224", "beit_base"):
        with pytest.raises(UserError, match=f"architecture={name}: no plain ViT"):
            timm({"architecture": name})
    given = timm({"architecture": "vit_so400m_patch14_siglip_224"})
    assert given.cfg.model.gelu == "tanh" and "model.gelu" not in assumed(given)
    assert "model.gelu=exact" in assumed(timm())


def test_a_config_of_another_model_is_refused(timm, huggingface):
    with pytest.raises(UserError, match="says depth 12, and its arrays are of depth 2"):
        timm({"model_args": {"depth": 12, "embed_dim": 12}})
    with pytest.raises(UserError, match="says width 768, and its arrays are of width 12"):
        huggingface({"hidden_size": 768})


def test_hugging_faces_names_of_classes(huggingface):
    turned = {str(i): f"LABEL_{4 - i}" for i in range(5)}
    assert huggingface({"id2label": turned}).classes[0] == "LABEL_4"
    plain = {str(i): f"LABEL_{i}" for i in range(5)}
    assert huggingface({"id2label": plain}).classes == ("0", "1", "2", "3", "4")
    with pytest.raises(UserError, match="given for outputs 1 to 5, 5 of them"):
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
def test_what_we_see_goes_out_and_comes_back(kind, overrides, view, tmp_path):
    if kind == "safetensors-hf" and view.fit == "shorter":
        view, overrides = view._replace(fit="shortest_edge"), (*overrides, "eval.fit=shortest_edge")
    found = exported(tmp_path, kind, *overrides)
    assert found["back"] == view and found["lines"] == []


def test_what_others_cannot_see_is_said(tmp_path):
    found = exported(tmp_path, "safetensors-timm", FOLDER, "data.load=20")
    assert "resized twice" in found["lines"][0]
    found = exported(tmp_path / "cover", "safetensors-hf", FOLDER, "eval.fit=cover")
    assert "fractions of a pixel (eval.fit=cover)" in found["lines"][0]
    assert found["back"].fit == "shortest_edge"
    for kind, fit in (("safetensors-timm", "shortest_edge"), ("safetensors-hf", "shorter")):
        (line,) = exported(tmp_path / kind, kind, FOLDER, f"eval.fit={fit}")["lines"]
        assert f"it rounds half a pixel as eval.fit={fit}, the other code as" in line
    assert found["content"]["do_center_crop"] and found["content"]["crop_size"] == {
        "height": 16,
        "width": 16,
    }


def test_what_is_beside_a_npz(tmp_path):
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
        arrays = weight_files.read(GOLDEN / case)
        write = weight_files.write_npz if case.endswith("npz") else weight_files.write_safetensors
        write(tmp_path / case, {name: x for name, x in arrays.items() if name != bias})
        given = pretrained.load_model(tmp_path / case, HEADS)
        assert "the head has no bias: it is zero" in given.notes and len(given.classes) == 5
        assert not np.any(given.params["head"]["bias"]) and arrays[weight].size == 60


def test_biases_that_are_not_there_are_zero(tmp_path):
    arrays = weight_files.read(GOLDEN / "timm.safetensors")
    biases = [name for name in arrays if name.endswith("qkv.bias")]
    for name in biases:
        arrays[name] = np.zeros_like(arrays[name])
    weight_files.write_safetensors(tmp_path / "zero.safetensors", arrays)
    without = {name: x for name, x in arrays.items() if name not in biases}
    weight_files.write_safetensors(tmp_path / "x.safetensors", without)
    left, right = (
        pretrained.load_model(tmp_path / f"{n}.safetensors", HEADS) for n in ("x", "zero")
    )
    assert "queries, keys and values have no biases: they are zero" in left.notes
    np.testing.assert_array_equal(
        left.params["blocks"]["attention"]["query"]["bias"],
        right.params["blocks"]["attention"]["query"]["bias"],
    )
    del arrays[biases[0]]
    weight_files.write_safetensors(tmp_path / "x.safetensors", arrays)
    with pytest.raises(UserError, match=r"missing: blocks\.0\.attn\.qkv\.bias"):
        pretrained.load_model(tmp_path / "x.safetensors", HEADS)

"""External weights in, ours out: logits are equal, every array is used, and the way back is exact.

The tiny models in golden/weights are from others' code (golden/make_weights.py), so that every
format is tested where that code is absent; test_peers.py runs it.
"""

import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export

import vit_scale
from tests.helpers.tiny import (
    CLASSES,
    convnet_config,
    random_images,
    random_params,
    tiny_config,
    tiny_model,
    write_run,
)
from vit_scale import cli, config, pretrained
from vit_scale.data import Match
from vit_scale.errors import UserError
from vit_scale.inference.export import EXPORTERS, export
from vit_scale.models.build import build
from vit_scale.models.parameters import named, unstack
from vit_scale.pretrained import Hints, load, weight_files
from vit_scale.pretrained.adapt import adapt
from vit_scale.pretrained.formats import FORMATS, HUGGINGFACE, TIMM

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
EXPECTED = dict(np.load(GOLDEN / "expected.npz"))
HEADS = Hints(heads=3, trained_size=(12, 12))
LARGER = [
    "timm",
    "timm-gap",
    "timm-map",
    "timm-deit3",
    "timm-avg",
    "timm-fc_norm",
    "timm-distilled",
]
CASES = {  # file: (format, fields of the model block that it must come to)
    "google.npz": ("google", {"pool": "cls", "gelu": "tanh", "norm_epsilon": 1e-6}),
    "google-pre_logits.npz": ("google", {"pool": "cls", "representation": 8}),
    "google-gap.npz": ("google", {"pool": "gap", "representation": 0}),
    "big_vision-tok.npz": ("big_vision", {"pool": "cls", "gelu": "tanh"}),
    "big_vision-gap.npz": ("big_vision", {"pool": "gap", "representation": 12}),
    "big_vision-map.npz": ("big_vision", {"pool": "map", "norm_epsilon": 1e-6}),
    "timm.safetensors": ("timm", {"pool": "cls", "gelu": "exact", "norm_epsilon": 1e-6}),
    "timm-gap.safetensors": ("timm", {"pool": "gap"}),
    "timm-map.safetensors": ("timm", {"pool": "map"}),
    "timm-deit3.safetensors": ("timm", {"pool": "cls"}),
    "timm-fc_norm.safetensors": ("timm", {"pool": "gap", "class_token": True, "fc_norm": True}),
    "timm-distilled.safetensors": ("timm", {"pool": "cls", "distilled": True}),
    "huggingface": ("huggingface", {"pool": "cls", "gelu": "exact", "norm_epsilon": 1e-12}),
}
NAMES = ("ant", "bee", "cat", "dog", "eel")  # of the golden folder of Hugging Face


@functools.cache
def golden(case: str, hints: Hints = HEADS) -> pretrained.Pretrained:
    return pretrained.load_model(GOLDEN / case, hints)


def expected(case: str) -> tuple[np.ndarray, np.ndarray]:
    return EXPECTED[f"{case}/images"], EXPECTED[f"{case}/logits"]


def bits(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf).view(np.int32) for name, leaf in named(tree).items()}


def same_bits(left, right) -> None:
    left, right = bits(left), bits(right)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[name], err_msg=name)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run_plain(tmp_path):
    """run_plain(PROGRAM): its output, in a process in which vit_scale can't be imported."""

    def run(program: str) -> str:
        without = "import sys; sys.modules['vit_scale'] = None\n"  # importing it raises
        done = subprocess.run(
            [sys.executable, "-c", without + program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# Import


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_original_library(case):
    fmt, fields = CASES[case]
    loaded = golden(case)
    images, logits = expected(case.partition(".")[0])
    result = jax.jit(loaded.model.apply)(loaded.params, images)
    np.testing.assert_allclose(result, logits, atol=1e-5)
    assert np.ptp(logits) > 0.3
    assert f"init.dialect={fmt})" in loaded.notes[0]
    assert {name: loaded.cfg.model[name] for name in fields} == fields
    assert loaded.model.shape.size.heads == 3 and loaded.model.shape.grid == (3, 3)


def test_mean_pooling_beside_a_class_token(tmp_path):
    """timm's global_pool=avg: config.json states it, the arrays don't."""
    shutil.copy(GOLDEN / "timm-avg.safetensors", tmp_path / weight_files.SAFETENSORS)
    content = {"architecture": "vit_tiny_patch16_224", "model_args": {"global_pool": "avg"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    images, logits = expected("timm-avg")
    loaded = pretrained.load_model(tmp_path, HEADS)
    assert loaded.cfg.model.class_token and loaded.cfg.model.pool == "gap"
    np.testing.assert_allclose(
        jax.jit(loaded.model.apply)(loaded.params, images), logits, atol=1e-5
    )
    bare = golden("timm-avg.safetensors")
    assert "the head reads [CLS] (model.pool=cls)" in bare.notes[-1]
    assert np.abs(jax.jit(bare.model.apply)(bare.params, images) - logits).max() > 0.1


@pytest.mark.parametrize("case", [case for case in LARGER if case != "timm-avg"])
def test_another_resolution_equals_timm(case):
    loaded = golden(f"{case}.safetensors")
    model = build(loaded.cfg.model, (20, 20))
    params, _ = adapt(loaded.params, random_params(model), "cubic", same_classes=True)
    images, logits = expected(f"{case}-larger")
    np.testing.assert_allclose(jax.jit(model.apply)(params, images), logits, atol=1e-5)


@pytest.mark.parametrize("case", ["timm.safetensors", "timm-gap.safetensors"])
def test_positions_are_resampled_to_another_shape_of_as_many_patches(case, tmp_path):
    """Sixteen rows are taken for 4 x 4 patches, unless 2 x 8 is stated."""
    arrays = weight_files.read_arrays(GOLDEN / case)
    first = arrays["pos_embed"].shape[1] - 9  # [CLS]'s row, where there is one
    width = arrays["pos_embed"].shape[2]
    arrays["pos_embed"] = np.random.RandomState(0).randn(1, first + 16, width).astype(np.float32)
    weight_files.write_safetensors(tmp_path / "x.safetensors", arrays)
    file = tmp_path / "x.safetensors"
    loaded = pretrained.load_model(file, Hints(heads=3, trained_size=(16, 16), target_size=(8, 32)))
    stored = arrays["pos_embed"][0, first:].reshape(4, 4, width)
    np.testing.assert_array_equal(loaded.params["posemb"], stored)
    overrides = ["data.resolution=8", "data.width=32", "model.heads=3", "init.resample=corners"]
    made, rows = pretrained.convert(file, tmp_path / "given", overrides)
    assert {row.name: row.action for row in rows}["posemb"] == "kept", "the size given is theirs"
    arrays["pos_embed"] = arrays["pos_embed"][:, :, :, None]
    weight_files.write_safetensors(tmp_path / "four.safetensors", arrays)
    assert "pos_embed has the wrong shape" in refusal(
        pretrained.load_model, tmp_path / "four.safetensors"
    )
    message = refusal(pretrained.load_model, file, Hints(heads=3, target_size=(8, 32)))
    assert "ambiguous" in message and "4 x 4 patches" in message and "2 x 8 patches" in message
    made, rows = pretrained.convert(file, tmp_path / "run", [*overrides, "init.image=16x16"])
    assert {row.name: row.action for row in rows}["posemb"] == "resampled 4 x 4 -> 2 x 8, corners"
    result = np.asarray(made.params["posemb"])
    # With aligned corners: the first and the last row, the second column at 3/7 of the first step.
    np.testing.assert_allclose(result[:, ::7], stored[::3, ::3], atol=1e-6)
    between = (4 * stored[::3, 0] + 3 * stored[::3, 1]) / 7
    np.testing.assert_allclose(result[:, 1], between, atol=1e-6)


def test_a_stored_size_takes_precedence_over_a_square(tmp_path):
    """Exports state the size: 2 x 8 patches are imported as such, whatever the hints."""
    overrides = ("data.resolution=16", "data.width=64")
    run = a_run(tmp_path / "run", *overrides)
    export(run, "npz", tmp_path / "x.npz")
    export(run, "safetensors-timm", tmp_path / "timm")
    for source in (tmp_path / "x.npz", tmp_path / "timm"):
        back = pretrained.load_model(source, Hints(trained_size=(32, 32)))
        assert back.model.shape.grid == (2, 8)
        same_bits(back.params, pretrained.load_model(run).params)


def test_metadata_beside_the_weights_is_used():
    loaded = golden("huggingface", Hints())  # the number of heads is in config.json
    assert loaded.classes == NAMES
    assert loaded.cfg.augment.mean == (0.4, 0.5, 0.6) and loaded.cfg.augment.std == (0.2, 0.25, 0.3)
    assert loaded.notes[1:] == (
        "assuming, as the file does not say: eval.fit=stretch, eval.crop=1.0, "
        "eval.resample=bilinear",
    )
    bare = golden("timm.safetensors")
    assert bare.classes == ("0", "1", "2", "3", "4")
    assert bare.notes[1] == (
        "assuming, as the file does not say: 3 heads, as configured, the head reads [CLS] "
        "(model.pool=cls), model.gelu=exact, model.norm_epsilon=1e-06, "
        "augment.mean=(0.5,0.5,0.5), augment.std=(0.5,0.5,0.5), model.rope=none, eval.fit=shorter, "
        "eval.crop=0.9, eval.resample=bicubic, classes are numbered 0 to 4"
    )


def test_arrays_that_are_no_parameters_are_listed():
    line = "ignored, not part of the model: opt/state/step"
    assert golden("big_vision-tok.npz").notes[1] == line
    line = golden("big_vision-gap.npz").notes[2]
    assert line == "no position embeddings are stored: using fixed sin-cos ones, 3 x 3 patches"


def test_heads_and_grids_that_nothing_determines_are_refused(tmp_path):
    """And a grid that is not square needs init.image."""
    arrays = weight_files.read_arrays(GOLDEN / "timm.safetensors")
    assert "set --config.model.heads" in refusal(golden, "timm.safetensors", Hints())
    arrays["pos_embed"] = arrays["pos_embed"][:, :7]
    weight_files.write_safetensors(tmp_path / "x.safetensors", arrays)
    wide = pretrained.load_model(tmp_path / "x.safetensors", Hints(heads=3, trained_size=(8, 12)))
    assert wide.model.shape.grid == (2, 3) and config.image_size(wide.cfg) == (8, 12)
    message = refusal(pretrained.load_model, tmp_path / "x.safetensors", Hints(heads=3))
    assert "7 position embeddings are for 6 patches, which is not a square grid" in message
    assert "--config.init.image=HEIGHTxWIDTH" in message


def test_positions_without_a_row_for_cls(tmp_path):
    """timm's no_embed_class, as DeiT III."""
    arrays = weight_files.read_arrays(GOLDEN / "timm.safetensors")
    first, arrays["pos_embed"] = arrays["pos_embed"][:, :1], arrays["pos_embed"][:, 1:]
    arrays["cls_token"] = arrays["cls_token"] + first
    weight_files.write_safetensors(tmp_path / weight_files.SAFETENSORS, arrays)
    content = {"architecture": "vit_tiny_patch16_224", "model_args": {"no_embed_class": True}}
    bare = HEADS._replace(trained_size=None)
    assert "9 position embeddings are for 8 patches" in refusal(
        pretrained.load_model, tmp_path, bare
    )
    assert "8 patches" in refusal(
        pretrained.load_model, tmp_path, bare._replace(requested_size=(12, 12))
    )
    loaded = pretrained.load_model(tmp_path, HEADS)
    same_bits(loaded.params, golden("timm.safetensors").params)
    (tmp_path / "config.json").write_text(json.dumps(content))
    same_bits(pretrained.load_model(tmp_path, bare).params, loaded.params)


@pytest.mark.parametrize("scan", [True, False])
def test_layer_scale_is_kept_or_folded_into_the_layers_before_it(scan):
    """As the model to start has it or not: the logits are the same."""
    loaded = golden("timm-deit3.safetensors")
    cfg = loaded.cfg.model.copy_and_resolve_references()
    cfg.update({"layer_scale": 0.0, "scan": scan})
    plain = build(cfg, (12, 12))
    assert loaded.cfg.model.layer_scale and "scale1" in loaded.params["blocks"]
    params, rows = adapt(loaded.params, random_params(plain), "cubic", same_classes=True)
    images, logits = expected("timm-deit3")
    np.testing.assert_allclose(jax.jit(plain.apply)(params, images), logits, atol=1e-5)
    scaled = {row.name for row in rows if row.action == "kept, times LayerScale"}
    assert len(scaled) == 4 * (1 if scan else 2) and all(
        "/out/" in n or "/down/" in n for n in scaled
    )
    plain = golden("timm.safetensors")
    params, rows = adapt(plain.params, loaded.params, "cubic", same_classes=True)
    images, logits = expected("timm")
    np.testing.assert_allclose(jax.jit(loaded.model.apply)(params, images), logits, atol=1e-5)
    actions = {row.name: row.action for row in rows}
    assert actions["blocks/scale1"] == "new: one, as without LayerScale"


def test_layer_scale_has_other_keys_in_deit3s_repository(tmp_path):
    loaded = golden("timm-deit3.safetensors")
    arrays = weight_files.read_arrays(GOLDEN / "timm-deit3.safetensors")
    renamed = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): x for name, x in arrays.items()}
    assert "blocks.1.gamma_2" in renamed
    weight_files.write_safetensors(tmp_path / "x.safetensors", renamed)
    same_bits(pretrained.load_model(tmp_path / "x.safetensors", HEADS).params, loaded.params)
    renamed["blocks.1.gamma_2"] = np.ones(3, np.float32)
    weight_files.write_safetensors(tmp_path / "x.safetensors", renamed)
    message = refusal(pretrained.load_model, tmp_path / "x.safetensors", HEADS)
    assert "wrong shape: blocks.1.ls2.gamma (3,), expected (12,)" in message


def test_half_precision_is_read(tmp_path):
    """.npz has no bfloat16: numpy writes two bytes of nothing in particular."""
    arrays = weight_files.read_arrays(GOLDEN / "google.npz")
    half = {name: np.asarray(jax.numpy.bfloat16(x)) for name, x in arrays.items()}
    np.savez(tmp_path / "half.npz", **half)
    weight_files.write_safetensors(tmp_path / "half.safetensors", half)
    for name in ("half.npz", "half.safetensors"):
        result = weight_files.read_arrays(tmp_path / name)
        for key, array in half.items():
            np.testing.assert_array_equal(result[key], array.astype(np.float32))


def test_other_spellings_of_keys_are_the_same_model(tmp_path):
    """transformers 5 has other names in memory; ViTModel has no prefix; DataParallel has one."""
    arrays = weight_files.read_arrays(GOLDEN / "huggingface" / weight_files.SAFETENSORS)
    shorter = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }

    def respelled(name):
        for old, new in shorter.items():
            name = name.replace(old, new)
        return "module." + name.removeprefix("vit.")

    respelt = {respelled(name): array for name, array in arrays.items()}
    assert "module.layers.1.mlp.fc2.bias" in respelt
    weight_files.write_safetensors(tmp_path / "x.safetensors", respelt)
    loaded = pretrained.load_model(tmp_path / "x.safetensors", HEADS)
    same_bits(loaded.params, golden("huggingface").params)
    assert loaded.cfg.model.norm_epsilon == 1e-12, "with no config.json beside it"


def test_the_format_can_be_forced():
    assert "format timm" in golden("timm.safetensors", HEADS._replace(format="timm")).notes[0]
    wrong = HEADS._replace(format="huggingface")
    message = refusal(golden, "timm.safetensors", wrong)
    assert "vit.embeddings.patch_embeddings.projection.weight is missing" in message
    assert "its format is not huggingface" in message
    unknown = HEADS._replace(format="tim")
    assert "did you mean timm" in refusal(golden, "timm.safetensors", unknown)


def test_each_table_names_each_parameter_once():
    for fmt in FORMATS.values():
        ours = [name for mapping in fmt.mappings for name in mapping.params]
        theirs = [mapping.key for mapping in fmt.mappings]
        assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs), fmt.name
    for pool in ("cls", "gap", "map"):
        required = named(unstack(random_params(tiny_model(f"model.pool={pool}", "model.depth=1"))))
        adapted = {name.replace("{i}", "0") for mapping in TIMM.mappings for name in mapping.params}
        assert required.keys() <= adapted
    assert "pool/probe" not in {name for mapping in HUGGINGFACE.mappings for name in mapping.params}


# Fine-tuning and conversion


def test_the_head_is_kept_if_the_classes_match():
    assert pretrained.match_head(NAMES, NAMES, "auto") == Match()
    assert pretrained.match_head(NAMES, NAMES[::-1], "auto").outputs == (4, 3, 2, 1, 0)
    assert pretrained.match_head(NAMES, NAMES[::-1], "keep").outputs == (4, 3, 2, 1, 0)
    unnamed = pretrained.match_head(("0", "1"), ("cat", "dog"), "auto")
    assert unnamed.outputs is None and "output i is class i of the set, cat to dog" in unnamed.line
    assert pretrained.match_head((), ("cat",), "auto") is None, "there is no head"
    assert pretrained.match_head(NAMES, NAMES, "new") is None
    others = ("ant", "bee", "cat", "dog", "elk")
    assert pretrained.match_head(NAMES, others, "auto") is None
    message = refusal(pretrained.match_head, NAMES, others, "keep")
    assert "'eel' only in the model, 'elk' only in the set" in message
    assert pretrained.match_head(NAMES, others, "keep", "order").outputs is None
    assert "init.head=keep: the source has 5 classes, the model 2" in refusal(
        pretrained.match_head, NAMES, ("cat", "dog"), "keep"
    )
    assert "init.head='old' is unknown" in refusal(pretrained.match_head, NAMES, NAMES, "old")


def test_a_new_head_drops_the_representation_of_the_old_one():
    """ViT paper, section 3.2: it is removed for fine-tuning."""
    loaded = golden("google-pre_logits.npz")
    cfg = loaded.cfg.copy_and_resolve_references()
    cfg.model.representation, cfg.model.classes = 0, 4
    target = random_params(build(cfg.model, (12, 12)))
    params, rows = adapt(loaded.params, target, "cubic", same_classes=False)
    same_bits(params["blocks"], loaded.params["blocks"])
    actions = {row.name: row.action for row in rows}
    assert actions["representation/kernel"] == "dropped: part of the old head"
    assert actions["head/kernel"] == "new: the classes differ"
    message = refusal(adapt, loaded.params, target, "cubic", True)
    assert "representation/bias (8,) is not in the model" in message


def test_mismatched_settings_are_listed():
    loaded = golden("huggingface")
    cfg = loaded.cfg.copy_and_resolve_references()
    assert pretrained.mismatched_settings(loaded.cfg, cfg) == []
    cfg.model.fc_norm = True
    (line,) = pretrained.mismatched_settings(loaded.cfg, cfg)
    assert line == "the source was trained with model.fc_norm=False; this config has True"
    cfg.model.fc_norm = False
    cfg.model.posemb = "sincos2d"  # which has no parameter that would be missing
    (line,) = pretrained.mismatched_settings(loaded.cfg, cfg)
    assert line == "the source was trained with model.posemb=learned; this config has sincos2d"
    cfg.model.posemb = "learned"
    cfg.model.gelu, cfg.augment.mean = "tanh", (0.5, 0.5, 0.5)
    assert pretrained.mismatched_settings(loaded.cfg, cfg) == [
        "the source was trained with model.gelu=exact; this config has tanh",
        "the source was trained with augment.mean=(0.4, 0.5, 0.6); this config has (0.5, 0.5, 0.5)",
    ]


def test_converted_weights_are_a_run(tmp_path, capsys):
    out, images = tmp_path / "run", random_images(3, (12, 12))
    assert cli.main(["convert", str(GOLDEN / "huggingface"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "40 arrays, format Hugging Face transformers (init.dialect=huggingface)" in printed
    assert "blocks/mlp/up/kernel" in printed and f"{out}: " in printed
    model = vit_scale.load(out)
    assert (model.classes, model.size, model.step) == (NAMES, (12, 12), 0)
    assert model.cfg.model.norm_epsilon == 1e-12
    loaded = golden("huggingface")
    same_bits(model.params, loaded.params)
    pixels = (images / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    logits = jax.jit(loaded.model.apply)(loaded.params, pixels.astype(np.float32))
    np.testing.assert_allclose(model(images), jax.nn.softmax(logits), atol=1e-6)
    assert "is not empty" in refusal(pretrained.convert, GOLDEN / "huggingface", out)


def test_a_convolutional_network_is_converted(tmp_path, capsys):
    cfg = convnet_config("resnet20")
    run = write_run(tmp_path / "run", cfg, random_params(build(cfg.model, (16, 16))))
    assert cli.main(["convert", str(run), str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'out'}: ResNetSize(") and last.endswith(", 4 classes")
    same_bits(pretrained.load_model(tmp_path / "out").params, pretrained.load_model(run).params)


def test_weights_are_not_evaluated_on_a_set_that_nobody_named(capsys):
    assert cli.main(["eval", str(GOLDEN / "huggingface"), "--split", "test"]) == 2
    assert "has no data set of its own: give one" in capsys.readouterr().err


def test_external_weights_are_used_without_conversion(tmp_path, capsys):
    model = vit_scale.load(GOLDEN / "huggingface")
    assert model(random_images(2, (12, 12))).shape == (2, 5)
    arrays = weight_files.read_arrays(GOLDEN / "huggingface" / weight_files.SAFETENSORS)
    shutil.copytree(GOLDEN / "huggingface", tmp_path / "bare")
    headless = {name: x for name, x in arrays.items() if not name.startswith("classifier")}
    weight_files.write_safetensors(tmp_path / "bare" / weight_files.SAFETENSORS, headless)
    bare, images = vit_scale.load(tmp_path / "bare"), random_images(2, (12, 12))
    assert bare.classes == ()
    np.testing.assert_array_equal(bare.features(images), model.features(images))
    for predict in (functools.partial(bare, images), lambda: bare.top(tmp_path / "missing.png")):
        assert f"{tmp_path / 'bare'} has no classification head: train one" in refusal(predict)
    assert cli.main(["predict", str(tmp_path / "bare"), "missing.png"]) == 1
    assert "has no classification head: train one" in capsys.readouterr().err
    message = refusal(pretrained.convert, tmp_path / "bare", tmp_path / "out")
    assert "has no head: set --config.model.classes=N" in message
    made, rows = pretrained.convert(tmp_path / "bare", tmp_path / "out", ["model.classes=3"])
    assert made.classes == ("0", "1", "2") and not np.any(made.params["head"]["kernel"])
    assert {row.action for row in rows if "head/" in row.name} == {"new: the classes differ"}


def test_external_weights_decode_files_at_their_input_size(tmp_path):
    """Their config names cifar10, with 32 px images, only because that is the default."""
    assert vit_scale.load(GOLDEN / "huggingface").decode_size == (12, 12)
    pretrained.convert(GOLDEN / "huggingface", tmp_path / "theirs", ["data.resolution=20"])
    assert vit_scale.load(tmp_path / "theirs").decode_size == (20, 20)
    ours = write_run(
        tmp_path / "ours", tiny_config(), random_params(tiny_model()), data={"height": 32}
    )
    pretrained.convert(ours, tmp_path / "larger", ["data.resolution=48"])
    assert vit_scale.load(tmp_path / "larger").decode_size == (32, 32)


def test_converting_takes_overrides(tmp_path):
    overrides = ["data.resolution=20", "model.heads=3", "augment.mean=(0.1, 0.2, 0.3)"]
    made, rows = pretrained.convert(GOLDEN / "timm.safetensors", tmp_path / "run", overrides)
    actions = {row.name: row.action for row in rows}
    assert actions["posemb"] == "resampled 3 x 3 -> 5 x 5, cubic"
    assert made.cfg.augment.mean == (0.1, 0.2, 0.3) and made.model.shape.grid == (5, 5)
    assert "augment.std" in made.notes[-1] and "augment.mean" not in made.notes[-1]
    images, logits = expected("timm-larger")
    run = pretrained.load_model(tmp_path / "run")
    np.testing.assert_allclose(jax.jit(run.model.apply)(run.params, images), logits, atol=1e-5)


# Export

MODELS = {
    "cls": ["augment.mean=(0.4, 0.5, 0.6)", "model.gelu=tanh"],
    "gap": ["model.pool=gap", "data.width=24"],
    "map": ["model.pool=map"],
    "unrolled": ["model.scan=False", "model.norm_epsilon=1e-12"],
}


def a_run(folder: pathlib.Path, *overrides: str) -> pathlib.Path:
    params = random_params(tiny_model(*overrides))
    for leaf in (params["head"]["bias"], params.get("cls", np.zeros(2))):
        leaf[:2] = -0.0, 0.0  # what adds a zero loses the sign of the first
    return write_run(folder, tiny_config(*overrides), params)


@pytest.mark.parametrize("kind", ["safetensors-timm", "safetensors-hf", "npz"])
@pytest.mark.parametrize("model", MODELS)
def test_export_and_import_are_bit_exact(kind, model, tmp_path):
    run = a_run(tmp_path / "run", *MODELS[model])
    out = tmp_path / f"out{'.npz' if kind == 'npz' else ''}"
    if kind == "safetensors-hf" and model in ("gap", "map"):
        message = refusal(export, run, kind, out)
        assert f"has pool={model}, but transformers' ViT only supports pool=cls" in message
        return
    lines = export(run, kind, out)
    loaded, back = pretrained.load_model(run), pretrained.load_model(out)
    same_bits(pretrained.adapt(back.params, loaded.params, "cubic", True)[0], loaded.params)
    assert np.signbit(np.asarray(back.params["head"]["bias"])[:2]).tolist() == [True, False]
    assert back.classes == CLASSES
    fields = config.differences(config.to_json(loaded.cfg), config.to_json(back.cfg))
    changed = [line for line in fields if line.startswith(("model.", "augment.m", "augment.s"))]
    if kind == "safetensors-timm" and model == "unrolled":
        assert changed.pop(0) == "model.norm_epsilon: 1e-12 -> 1e-06"
        assert "norm_epsilon=1e-12" in lines[1]
    assert changed == (["model.scan: False -> True"] if model == "unrolled" else [])
    assert config.image_size(back.cfg) == config.image_size(loaded.cfg)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_trained_with_cudnn_is_exported_for_every_device(gpu, tmp_path, monkeypatch):
    overrides = ("model.dtype=bfloat16", "model.attention=cudnn")
    run = a_run(tmp_path / "run", *overrides)
    plain = vit_scale.load(a_run(tmp_path / "plain", *overrides[:1]))
    monkeypatch.setattr(load, "have_cudnn", lambda devices: gpu)
    assert pretrained.load_model(run).cfg.model.attention == ("cudnn" if gpu else "xla")
    for kind in EXPORTERS:
        export(run, kind, tmp_path / f"{kind}.npz")
    artifact = jax_export.deserialize(bytearray((tmp_path / "jax.npz").read_bytes()))
    images = random_images(2)
    np.testing.assert_allclose(artifact.call(images), plain(images), atol=1e-6)


@pytest.mark.parametrize("kind", ["safetensors-timm", "safetensors-hf"])
def test_exports_equal_the_files_of_the_library(kind, tmp_path):
    """Array by array, except [CLS], which includes its position."""
    case = {"safetensors-timm": "timm.safetensors", "safetensors-hf": "huggingface"}[kind]
    theirs = weight_files.read_arrays(weight_files.find_weight_file(GOLDEN / case))
    pretrained.convert(GOLDEN / case, tmp_path / "run", ["model.heads=3"])
    export(tmp_path / "run", kind, tmp_path / "out")
    ours = weight_files.read_arrays(tmp_path / "out" / weight_files.SAFETENSORS)
    assert ours.keys() == theirs.keys()
    cls, positions = (next(name for name in theirs if end in name) for end in ("cls_token", "pos"))
    assert not np.any(ours[positions][:, 0])
    np.testing.assert_array_equal(ours[cls][:, 0], theirs[cls][:, 0] + theirs[positions][:, 0])
    np.testing.assert_array_equal(ours[positions][:, 1:], theirs[positions][:, 1:])
    for name in theirs.keys() - {cls, positions}:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_fixed_positions_are_exported_as_learned(tmp_path):
    run = a_run(tmp_path / "run", "model.posemb=sincos2d")
    loaded, images = pretrained.load_model(run), np.float32(random_images(2)) / 255
    logits = jax.jit(loaded.model.apply)(loaded.params, images)
    export(run, "npz", tmp_path / "x.npz")
    back = pretrained.load_model(tmp_path / "x.npz")
    assert back.cfg.model.posemb == "learned"
    np.testing.assert_allclose(jax.jit(back.model.apply)(back.params, images), logits, atol=1e-6)


def test_differences_in_computation_are_reported(tmp_path):
    run = a_run(tmp_path / "run", "model.norm_epsilon=1e-5")
    lines = export(run, "npz", tmp_path / "x.npz")
    assert any("model.gelu=exact" in line and "computes with tanh" in line for line in lines)
    assert any("model.norm_epsilon=1e-05" in line for line in lines)
    lines = export(run, "safetensors-hf", tmp_path / "hf")
    assert not any("norm" in line for line in lines)
    assert json.loads((tmp_path / "hf/config.json").read_text())["layer_norm_eps"] == 1e-5


def test_exports_that_are_refused(tmp_path):
    run = a_run(tmp_path / "run", "model.representation=8")
    message = refusal(export, run, "safetensors-timm", tmp_path / "x")
    assert "timm's VisionTransformer has no model.representation=8: export to jax" in message
    assert "did you mean safetensors or safetensors-hf or safetensors-timm?" in refusal(
        export, run, "timm-safetensors", "x"
    )
    assert "must end in .npz" in refusal(export, run, "npz", tmp_path / "x")
    beside = a_run(tmp_path / "beside", "model.pool=cls_gap")
    assert "pool=cls_gap, which a .npz" in refusal(export, beside, "npz", tmp_path / "x.npz")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(export, run, "npz", tmp_path / "file" / "x.npz")
    assert not (tmp_path / "x").exists()


def test_a_function_that_runs_without_this_package(tmp_path, capsys, run_plain):
    run = a_run(tmp_path / "run", "augment.mean=(0.4, 0.5, 0.6)")
    file = tmp_path / "model.jax"
    arguments = ["export", str(run), "--format", "jax", "--out", str(file)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{file}: for cpu, cuda, tpu" in printed
    snippet = printed.partition("\n")[2]
    assert len(snippet.strip().splitlines()) == 5
    images = random_images(3)
    np.save(tmp_path / "images.npy", images)
    more = "print(probabilities.shape)\nnp.save('found.npy', model.call(np.load('images.npy')))\n"
    assert run_plain(snippet + more) == "(8, 4)\n"
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), vit_scale.load(run)(images), 1e-5)
    assert json.loads((tmp_path / "model.jax.json").read_text()) == {
        "classes": list(CLASSES),
        "size": [16, 16],
    }

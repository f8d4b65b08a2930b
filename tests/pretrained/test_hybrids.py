"""Hybrids on BiT's ResNets: logits of Google's .npz and timm's files are those of their own code.

golden/hybrids.npz has what they computed (golden/make_hybrids.py); the weights are drawn anew.
"""

import functools
import pathlib
import re
import tempfile

import jax
import numpy as np
import pytest

from tests.golden.draw_by_name import draw, draw_images
from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.build import build
from vit_scale.models.parameters import named
from vit_scale.pretrained import Hints, adapt, convert, weight_files

EXPECTED = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "hybrids.npz"))
VARIANTS = {"R": "R+Ti/32", "R26": "R26+Ti/32", "R50-16": "R50+Ti/16", "R50-32": "R50+Ti/32"}
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("R50-16", "R50-32")]
NAMES = pytest.mark.parametrize("name", ["R", "R26", *LARGE])
HEADS = Hints(heads=3)


def arrays(case: str) -> dict[str, np.ndarray]:
    """The arrays of a file, by name."""
    rows = (row.split(" ") for row in EXPECTED[f"{case}/arrays"])
    return {key: draw(key, tuple(map(int, shape.split(",")))) for key, shape in rows}


def pixels(case: str) -> np.ndarray:
    return draw_images(case, tuple(EXPECTED[f"{case}/size"]))


def write(case: str, file: pathlib.Path, **changes: np.ndarray) -> pathlib.Path:
    stored = {key: x for key, x in (arrays(case) | changes).items() if x is not None}
    writer = weight_files.write_npz if file.suffix == ".npz" else weight_files.write_safetensors
    writer(file, stored)
    return file


@functools.cache
def golden(case: str) -> pretrained.Pretrained:
    name = "weights.npz" if case.startswith("google") else weight_files.SAFETENSORS
    with tempfile.TemporaryDirectory() as folder:
        return pretrained.load_model(write(case, pathlib.Path(folder) / name), HEADS)


def close(loaded: pretrained.Pretrained, case: str) -> None:
    images, expected = pixels(case), EXPECTED[f"{case}/logits"]
    assert np.ptp(expected) > 1
    logits = jax.jit(loaded.model.apply)(loaded.params, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@NAMES
def test_logits_of_googles_files_are_those_of_googles_code(name):
    loaded = golden(f"google-{name}")
    assert "init.dialect=google)" in loaded.notes[0]
    assert loaded.cfg.model.variant == VARIANTS[name]
    assert (loaded.cfg.model.stem_epsilon, loaded.cfg.model.gelu) == ("google", "tanh")
    close(loaded, f"google-{name}")


@NAMES
def test_logits_of_timms_files_are_those_of_timm(name):
    loaded = golden(f"timm-{name}")
    assert "init.dialect=timm)" in loaded.notes[0]
    assert loaded.cfg.model.variant == VARIANTS[name]
    assert (loaded.cfg.model.stem_epsilon, loaded.cfg.model.gelu) == ("timm", "exact")
    close(loaded, f"timm-{name}")


@pytest.mark.parametrize("name", ["R", pytest.param("R26", marks=pytest.mark.slow)])
def test_timm_reads_googles_files_with_its_own_epsilons(name):
    """The same weights, of Google's file, as timm computes with them: not as Google's code does."""
    loaded = golden(f"google-{name}")
    images, theirs = pixels(f"google-{name}"), EXPECTED[f"google-{name}/timm"]
    cfg = loaded.cfg.model.copy_and_resolve_references()
    cfg.stem_epsilon = "timm"
    logits = jax.jit(build(cfg, images.shape[1:3]).apply)(loaded.params, images)
    np.testing.assert_allclose(logits, theirs, atol=1e-4)
    assert np.abs(EXPECTED[f"google-{name}/logits"] - theirs).max() > 2e-4


@NAMES
def test_another_resolution_equals_timm(name):
    loaded, case = golden(f"timm-{name}"), f"timm-{name}-larger"
    model = build(loaded.cfg.model, tuple(EXPECTED[f"{case}/size"]))
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract_params)
    params, rows = adapt(loaded.params, target, "cubic", same_classes=True)
    assert [row.name for row in rows if row.action != "kept"] == ["posemb"]
    close(loaded._replace(model=model, params=params), case)


def test_norms_of_googles_files_may_be_vectors(tmp_path):
    """As its code writes them today; the published ones have three axes of size 1."""
    vectors = {key: x.reshape(-1) for key, x in arrays("google-R").items() if "gn" in key}
    loaded = pretrained.load_model(write("google-R", tmp_path / "x.npz", **vectors))
    for name, leaf in named(loaded.params).items():
        np.testing.assert_array_equal(leaf, named(golden("google-R").params)[name], err_msg=name)


def refused(message: str, source: pathlib.Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pretrained.load_model(source, HEADS)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_of_another_depth_is_refused(tmp_path):
    file = tmp_path / "x.npz"
    one, stage = "block2/unit1/conv2/kernel", "block3/unit2/"
    refused(f"missing: {one}", write("google-R26", file, **{one: None}))
    gone = {key: None for key in arrays("google-R26") if key.startswith(stage)}
    refused(r"\(2, 2, 1, 2\) blocks per stage.*is no stem", write("google-R26", file, **gone))
    more = {"block1/unit4/conv1/kernel": np.zeros((1, 1, 256, 64), np.float32)}
    refused(r"unexpected arrays: block1/unit4", write("google-R26", file, **more))


def test_a_hybrid_becomes_a_run_and_is_exported(tmp_path):
    source = write("timm-R", tmp_path / weight_files.SAFETENSORS)
    made, _ = convert(source, tmp_path / "run", ["model.heads=3", "data.resolution=64"])
    lines = export(tmp_path / "run", "npz", tmp_path / "x.npz")
    assert any("model.stem_epsilon=timm" in line for line in lines)
    again = pretrained.load_model(tmp_path / "x.npz")
    assert again.cfg.model.stem_epsilon == "timm" and again.cfg.model.variant == "R+Ti/32"
    close(again, "timm-R")
    for name, leaf in named(again.params).items():
        np.testing.assert_array_equal(leaf, named(made.params)[name], err_msg=name)
    export(tmp_path / "run", "safetensors-timm", tmp_path / "timm")
    written = weight_files.read_arrays(tmp_path / "timm" / weight_files.SAFETENSORS)
    assert written.keys() == arrays("timm-R").keys()
    for key in filter(re.compile("patch_embed").match, written):
        np.testing.assert_array_equal(written[key], arrays("timm-R")[key], err_msg=key)
    with pytest.raises(UserError, match=r"has the stem of R\+Ti/32, which Hugging Face"):
        export(tmp_path / "run", "safetensors-hf", tmp_path / "folder")
    gap = ["model.heads=3", "data.resolution=64", "model.pool=cls_gap", "init.head=new"]
    convert(source, tmp_path / "gap", gap)
    with pytest.raises(UserError, match="has pool=cls_gap, but transformers' ViT"):  # as Dinov2
        export(tmp_path / "gap", "safetensors-hf", tmp_path / "folder")

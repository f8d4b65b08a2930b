"""adapt and load_model: every parameter is kept, resampled, replaced or refused."""

import shutil

import jax
import numpy as np
import pytest

from tests.helpers.tiny import CLASSES, random_params, tiny_config, tiny_model, write_run
from vit_scale import checkpoint, pretrained
from vit_scale.errors import UserError
from vit_scale.models.parameters import named, stack, unstack
from vit_scale.models.patch_embeddings import resample_patches
from vit_scale.models.position_embeddings import resample
from vit_scale.pretrained import adapt, adaptation_table


def actions(rows) -> dict[str, str]:
    return {row.name: row.action for row in rows}


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_of_the_same_shape_is_copied():
    source, target = random_params(tiny_model()), random_params(tiny_model(), seed=1)
    adapted, rows = adapt(source, target, "cubic", same_classes=True)
    jax.tree.map(np.testing.assert_array_equal, adapted, source)
    assert set(actions(rows).values()) == {"kept"}
    assert actions(rows).keys() == named(target).keys()
    assert jax.tree.structure(adapted) == jax.tree.structure(target)


@pytest.mark.parametrize("classes", [4, 7])
def test_the_head_is_replaced_if_the_classes_differ(classes):
    """Also if there are as many classes: the fourth was another one."""
    source = random_params(tiny_model())
    target = random_params(tiny_model(f"model.classes={classes}"), seed=1)
    adapted, rows = adapt(source, target, "cubic", same_classes=False)
    jax.tree.map(np.testing.assert_array_equal, adapted["head"], target["head"])
    jax.tree.map(np.testing.assert_array_equal, adapted["blocks"], source["blocks"])
    new = {name for name, action in actions(rows).items() if action == "new: the classes differ"}
    assert new == {"head/kernel", "head/bias"}


@pytest.mark.parametrize("method", ["cubic", "corners"])
def test_positions_are_resampled(method):
    source = random_params(tiny_model())
    target = random_params(tiny_model("data.resolution=32", "data.width=24"), seed=1)
    adapted, rows = adapt(source, target, method, same_classes=True)
    expected = resample(source["posemb"], (4, 3), method)
    np.testing.assert_array_equal(adapted["posemb"], expected)
    assert actions(rows)["posemb"] == f"resampled 2 x 2 -> 4 x 3, {method}"
    assert set(actions(rows).values()) == {"kept", actions(rows)["posemb"]}


def test_blocks_are_stacked_and_unstacked():
    stacked = random_params(tiny_model())
    unstacked = unstack(random_params(tiny_model(), seed=1))
    adapted, _ = adapt(stacked, unstacked, "cubic", same_classes=True)
    jax.tree.map(np.testing.assert_array_equal, adapted, unstack(stacked))
    adapted, rows = adapt(unstacked, stacked, "cubic", same_classes=True)
    jax.tree.map(np.testing.assert_array_equal, adapted, stack(unstacked))
    assert set(actions(rows).values()) == {"kept"}


def test_mismatches_are_listed_for_both_sides():
    source = random_params(tiny_model("model.pool=map"))
    target = random_params(tiny_model("model.mlp=32"))
    message = refusal(adapt, source, target, "cubic", True)
    assert "blocks/mlp/up/kernel: source (2, 16, 24), model (2, 16, 32)" in message
    assert "cls (16,) is not in the source" in message
    assert "pool/probe (1, 16) is not in the model" in message
    assert "norm/scale" not in message.replace("pool/norm/scale", ""), "what fits is not listed"


def test_patches_are_resampled_to_another_size():
    """8 px to 4 px: FlexiViT's PI-resize, and positions to the finer grid."""
    source = random_params(tiny_model())
    target = random_params(tiny_model("model.variant=Ti/4"), seed=1)
    adapted, rows = adapt(source, target, "cubic", same_classes=True)
    assert actions(rows)["embed/kernel"] == "resampled 8 x 8 -> 4 x 4, FlexiViT's PI-resize"
    assert actions(rows)["posemb"] == "resampled 2 x 2 -> 4 x 4, cubic"
    expected = resample_patches(source["embed"]["kernel"], (4, 4))
    np.testing.assert_array_equal(adapted["embed"]["kernel"], expected)


@pytest.mark.parametrize("override", ["model.depth=3", "model.swiglu=true", "model.width=20"])
def test_another_architecture_is_refused(override):
    source, target = random_params(tiny_model()), random_params(tiny_model(override))
    assert "don't fit" in refusal(adapt, source, target, "cubic", True)


def test_the_table_has_a_line_for_each_leaf():
    source = random_params(tiny_model())
    target = random_params(tiny_model("data.resolution=32"))
    lines = adaptation_table(adapt(source, target, "cubic", same_classes=True)[1]).splitlines()
    assert len(lines) == len(named(target))
    (positions,) = [line for line in lines if line.startswith("posemb")]
    assert positions.split(maxsplit=6)[1:6] == ["4", "x", "4", "x", "16"]
    assert positions.endswith("resampled 2 x 2 -> 4 x 4, cubic")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), tiny_config(), random_params(tiny_model()))


def test_load_model_returns_a_usable_model(run):
    loaded = pretrained.load_model(run)
    assert (loaded.classes, loaded.step) == (CLASSES, 5)
    assert loaded.path == run / "checkpoints" / "5"
    assert loaded.cfg.model.width == 16 and loaded.model.shape.grid == (2, 2)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, random_params(tiny_model()))


def test_load_model_prefers_the_moving_average(tmp_path):
    params, ema = random_params(tiny_model()), random_params(tiny_model(), seed=1)
    run = write_run(tmp_path / "averaged", tiny_config("optim.ema=0.9"), params, ema=ema)
    loaded = pretrained.load_model(str(run))
    np.testing.assert_array_equal(loaded.params["cls"], ema["cls"])
    assert np.abs(ema["cls"] - params["cls"]).max() > 0.01


def test_load_model_takes_the_newest_checkpoint_or_the_named_one(tmp_path):
    old, new = random_params(tiny_model()), random_params(tiny_model(), seed=1)
    run = write_run(tmp_path / "run", tiny_config(), new, step=12)
    other = write_run(tmp_path / "other", tiny_config(), old, step=9)
    shutil.move(other / checkpoint.FOLDER / "9", run / checkpoint.FOLDER / "9")
    assert pretrained.load_model(run).step == 12
    loaded = pretrained.load_model(run / checkpoint.FOLDER / "9")
    assert loaded.step == 9
    np.testing.assert_array_equal(loaded.params["cls"], old["cls"])


def test_other_folders_are_refused(tmp_path, run):
    assert "is not a run folder, a checkpoint" in refusal(pretrained.load_model, tmp_path)
    missing = run / checkpoint.FOLDER / "77"
    assert f"{missing} is not a run folder" in refusal(pretrained.load_model, missing)
    shutil.copy(run / "run.json", tmp_path)
    assert "has no finished checkpoint yet" in refusal(pretrained.load_model, tmp_path)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("dialect", {"format": "timm"}),
        ("tree", {"tree": "ema"}),
        ("image", {"trained_size": (16, 16)}),
    ],
)
def test_hints_for_external_weights_are_refused_for_a_run(run, field, hint):
    message = refusal(pretrained.load_model, run, pretrained.Hints(**hint))
    assert f"init.{field} only applies to external weights" in message
    assert (
        pretrained.load_model(run, pretrained.Hints(heads=7, target_size=(32, 32))).classes
        == CLASSES
    )

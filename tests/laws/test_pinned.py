"""A run of commit c062dd0 stays a run: read, evaluated, exported and resumed by every later commit.

tests/golden/make_pinned.py wrote it, and says when its golden values are made anew.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import vit_scale
from tests.golden.make_pinned import CLASSES, HERE, STOP, images, reached, resumed
from vit_scale import config
from vit_scale.checkpoint import finished_steps
from vit_scale.distributed import preemption
from vit_scale.distributed.preemption import Preempted
from vit_scale.errors import UserError
from vit_scale.models.parameters import named
from vit_scale.training import trainer

pytestmark = pytest.mark.usefixtures("default_compile")

CLOSE = 1e-5  # another processor and another jax round otherwise
# A key's bias adds the same to all scores of a query: its gradient is zero but for rounding, which
# Adam divides by its own size. So it moves by up to the learning rate a step, by the noise of one
# jax and one processor; no output depends on it. Measured: 1.45e-5 between jax 0.10 and 0.12,
# 1.53e-5 between two processors.
ONLY_NOISE = "blocks/attention/key/bias"
LEARNING_RATE = 3e-3


@pytest.fixture(scope="module")
def expected():
    with np.load(HERE / "expected.npz") as golden:
        yield dict(golden)


@pytest.fixture
def run(tmp_path, monkeypatch) -> pathlib.Path:
    """A copy of the run, seen from the folder that it was started in."""
    monkeypatch.chdir(HERE)
    return shutil.copytree(HERE / "run", tmp_path / "run")


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def test_it_is_read_to_the_bit(run, expected):
    predictor = vit_scale.load(run)
    stored = {name: np.asarray(leaf) for name, leaf in named(predictor.params).items()}
    golden = part(expected, "given/")
    assert stored.keys() == golden.keys() and predictor.classes == CLASSES
    for name, leaf in golden.items():
        np.testing.assert_array_equal(stored[name], leaf, err_msg=name)


def test_it_predicts_as_it_did(run, expected):
    predictor = vit_scale.load(run)
    np.testing.assert_allclose(predictor(images()), expected["probabilities"], atol=CLOSE, rtol=0)
    photo = dict(predictor.top(HERE / "data/val/eel/0.png", k=3))
    found = [photo[name] for name in CLASSES]
    np.testing.assert_allclose(found, expected["photo"], atol=CLOSE, rtol=0)


def test_it_evaluates_as_it_did(run, expected, run_cli):
    done = run_cli("eval", run, "--split", "val", "--json", cwd=HERE)
    measured = json.loads(done.stdout)
    found = [measured[key] for key in ("n", "accuracy", "loss")]
    np.testing.assert_allclose(found, expected["eval"], atol=CLOSE, rtol=0)


def test_it_is_exported_to_the_bit(run, expected, run_cli, tmp_path):
    done = run_cli("export", run, "--format", "safetensors-timm", "--out", tmp_path / "timm")
    assert done.returncode == 0, done.stderr
    arrays = load_file(tmp_path / "timm/model.safetensors")
    golden = part(expected, "given/")
    np.testing.assert_array_equal(arrays["head.weight"], golden["head/kernel"].T)
    np.testing.assert_array_equal(
        arrays["blocks.1.mlp.fc1.weight"], golden["blocks/mlp/up/kernel"][1].T
    )
    np.testing.assert_array_equal(arrays["pos_embed"][0, 1:], golden["posemb"].reshape(4, 16))


def test_it_is_resumed(run, expected):
    """Batches, draws, dropout, learning rate, slices and decoding are those of c062dd0."""
    found, golden = resumed(run), part(expected, "resumed/")
    assert found.keys() == golden.keys()
    for name, leaf in golden.items():
        close = LEARNING_RATE if name.endswith(ONLY_NOISE) else CLOSE
        np.testing.assert_allclose(found[name], leaf, atol=close, rtol=0, err_msg=name)
    report = json.loads((run / "report.json").read_text())["eval"]
    for key, result in (("last", report), ("best", report["best"])):
        values = [result[k] for k in ("step", "n", "accuracy", "loss")]
        np.testing.assert_allclose(values, expected[f"report/{key}"], atol=CLOSE, rtol=0)


@pytest.mark.slow
def test_stopped_once_more_it_comes_to_the_same_bits(run, monkeypatch, tmp_path):
    uninterrupted = resumed(shutil.copytree(run, tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: reached(STOP + 2))
        with pytest.raises(Preempted):
            trainer.train(config.load(str(HERE / "config.py")), run, "pinned", quiet=True)
    assert finished_steps(run)[-1] == STOP + 2
    again = resumed(run)
    for name, leaf in uninterrupted.items():
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)


def test_another_config_is_refused(run):
    cfg = config.load(str(HERE / "config.py"), ["optim.lr=1e-3"])
    with pytest.raises(UserError, match=r"optim\.lr: 0\.003 -> 0\.001"):
        trainer.train(cfg, run, "pinned", quiet=True)

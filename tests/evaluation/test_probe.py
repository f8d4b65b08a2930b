"""vit-scale probe: from a run or weights to a table, for any number of devices and hosts."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import vit_scale
from tests.helpers.tiny import random_params, tiny_config, tiny_model, write_run
from vit_scale import cli, config
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.evaluation import Extract, linear, similarity, statistics

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPLITS = ("--train", "train", "--split", "val")
WITHOUT_HEAD = "model.classes=0"


@pytest.fixture(scope="module")
def run(jpegs, tmp_path_factory) -> pathlib.Path:
    """A run without a head, by whose random features colours can be told apart."""
    overrides = ("data.name=folder", f"data.path={jpegs}", "data.workers=0", "eval.final=val")
    params = random_params(tiny_model(WITHOUT_HEAD))
    cfg = tiny_config(WITHOUT_HEAD, *overrides)
    folder = tmp_path_factory.mktemp("probed") / "run"
    return write_run(folder, cfg, params, classes=[], data={"name": "jpegs train"})


@pytest.fixture(scope="module")
def result(run) -> dict:
    """What one device makes of it, measured with a batch that doesn't divide the splits."""
    return vit_scale.probe(run, knn=5, shots=(4,), draws=2, **{"eval.batch": 5})


def test_a_run_is_probed(run, result):
    assert (result["run"], result["step"]) == (str(run / "checkpoints" / "5"), 5)
    assert (result["train"], result["train_n"]) == ("train", 48)
    assert (result["split"], result["n"], result["classes"]) == ("val", 12, 3)
    assert (result["feature"], result["layer"], result["dimensions"]) == ("pooled", None, 16)
    assert 0.4 < result["knn"]["accuracy"] <= 1 and result["knn"]["k"] == 5
    assert 0.4 < result["linear"]["accuracy"] <= 1 and result["linear"]["train_n"] == 48
    (few,) = result["few_shot"]
    assert (few["shots"], few["draws"], few["n"]) == (4, 2, 12)
    assert 0.4 < few["accuracy"] <= 1
    assert 1 < result["statistics"]["effective_rank"] < 12
    low, high = result["linear"]["interval"]
    assert low < result["linear"]["accuracy"] <= high + 1e-9


def test_the_command_prints_a_table_of_the_same(run, result, capsys):
    assert cli.main(["probe", str(run), "--knn", "5", "--shots", "4", "--draws", "2"]) == 0
    head, names, *rows, statistics = capsys.readouterr().out.splitlines()
    assert "48 images of train: 16 features, pooled, after the last block (step 5)" in head
    assert names.split() == ["probe", "accuracy", "95", "%", "interval", "n", "settings"]
    assert [row.split()[0] for row in rows] == ["knn", "linear", "few_shot"]
    expected = [result["knn"], result["linear"], *result["few_shot"]]
    for row, one in zip(rows, expected, strict=True):
        assert f"{100 * one['accuracy']:.2f} %" in row
    assert f"effective rank {result['statistics']['effective_rank']:.4g}" in statistics


def test_features_are_computed_once_for_a_checkpoint(run, result, monkeypatch):
    """`result` has left them in the run. Another checkpoint's are computed, and give a result."""
    assert len(list((run / "features").iterdir())) == 2
    calls: list = []
    compute = Extract.__call__

    def count(self, params, source):
        calls.append(source.name)
        return compute(self, params, source)

    monkeypatch.setattr(Extract, "__call__", count)
    again = vit_scale.probe(run, knn=5, only=("knn",))
    assert again["knn"] == result["knn"] and "linear" not in again and not calls
    cfg = json.loads((run / "run.json").read_text())["config"]
    params = random_params(tiny_model(WITHOUT_HEAD), seed=1)
    write_run(run, config.from_json(cfg), params, step=6, classes=[])
    assert vit_scale.probe(run, only=("knn",), **{"data.name": "folder"})["step"] == 6
    assert len(calls) == 2
    assert vit_scale.probe(run / "checkpoints" / "5", knn=5, only=("knn",))["knn"] == result["knn"]
    assert len(calls) == 2
    other = vit_scale.probe(
        run / "checkpoints" / "5", only=("statistics",), feature="cls_mean", layer=-2
    )
    assert len(calls) == 4 and other["dimensions"] == 32


def compare(result: dict, other: dict) -> None:
    assert other["knn"] == result["knn"]
    assert (other["n"], other["train_n"]) == (12, 48)
    assert other["linear"]["accuracy"] == result["linear"]["accuracy"]
    for name, value in result["statistics"].items():
        assert other["statistics"][name] == pytest.approx(value, rel=1e-4), name


COMMON = ("--knn", "5", "--only", "knn", "linear", "statistics", "--json")


# On a mesh of two axes, with blocks and chunks so small that every device has several.
PROGRAM = """
import json, sys
import numpy as np
import vit_scale
from vit_scale import config
from vit_scale.distributed.mesh import make_mesh
from vit_scale.evaluation import KNN, linear, similarity, statistics

golden, run, cache, out = sys.argv[1:]
similarity.BLOCK, similarity.CHUNK = 16, 64
cfg = config.override(config.base(), ["mesh.data=2", "mesh.fsdp=2"])
mesh, data = make_mesh(cfg.mesh), np.load(golden)
train, labels, test = (data[name] for name in ("train", "labels", "test"))
fit = linear.Examples(train, labels, 4, mesh).fit(0.01)
near = [np.concatenate(part) for part in zip(*similarity.Bank(train, mesh).nearest(test, 20))]
result = {"devices": mesh.size, "uniformity": statistics.uniformity(train, mesh)}
result["classes"] = KNN().predict(train, labels, test, mesh).tolist()
np.savez(out, similarities=near[0], indices=near[1], kernel=np.asarray(fit.params["kernel"]))
fields = {"mesh.data": 2, "mesh.fsdp": 2, "eval.batch": 8}
result["probe"] = vit_scale.probe(run, knn=5, only=["knn"], cache=cache, **fields)
print(json.dumps(result))
"""


def test_on_four_devices_it_is_the_same(run, result, tmp_path):
    golden, out = ROOT / "tests" / "golden" / "probes.npz", tmp_path / "out.npz"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, golden, run / "checkpoints" / "5", tmp_path / "c", out],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    other = json.loads(done.stdout)
    assert other["probe"]["knn"] == result["knn"]
    mesh = make_mesh(config.base().mesh, jax.devices()[:1])
    with np.load(golden) as data, np.load(out) as arrays:
        train, labels, test = (data[name] for name in ("train", "labels", "test"))
        assert (other["devices"], other["classes"]) == (4, data["knn/20/0.07"].tolist())
        near = zip(*similarity.Bank(train, mesh).nearest(test, 20), strict=True)
        expected = [np.concatenate(part) for part in near]
        np.testing.assert_array_equal(arrays["indices"], expected[1])
        np.testing.assert_allclose(arrays["similarities"], expected[0], rtol=0, atol=1e-6)
        fit = linear.Examples(train, labels, 4, mesh).fit(0.01)
        np.testing.assert_allclose(arrays["kernel"], fit.params["kernel"], rtol=0, atol=1e-4)
    uniformity = statistics.uniformity(train, mesh)
    assert other["uniformity"] == pytest.approx(uniformity, abs=1e-6)


@pytest.mark.slow
def test_on_two_hosts_it_is_the_same(run, result, tmp_path):
    """The second time from the cache, which only the first host has written."""
    command = [sys.executable, "-m", "vit_scale.cli", "probe", run / "checkpoints" / "5", *COMMON]
    pod = [sys.executable, ROOT / "launch" / "pod.py", "--hosts=2", "--devices=2"]
    for _ in range(2):
        done = subprocess.run(
            [*map(str, pod), *map(str, command), "--cache", str(tmp_path / "cache")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        compare(result, json.loads(done.stdout))
        assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "train[:10]"], "splits train and train[:10] share images"),
        (["--train", "val", "--split", "test"], "splits val and test share images"),
        (["--knn", "49"], "49 neighbours of 48 training images"),
        (["--temperature", "0"], "temperature 0.0 of kNN must be above 0"),
        (["--shots", "1"], "at least 2 are needed"),
        (["--layer", "-3"], "layer -3 of 2 blocks"),
        (["--feature", "tokens"], "feature 'tokens' is unknown"),
        (["--config.data.train=val"], "no use for --config.data.train; give --train"),
        (["--config.model.depth=3"], "no use for --config.model.depth"),
        (["--config.eval.final="], "has no eval.final split"),
        (["--config.data.target=classes"], "data.target=classes: probes need one class"),
        (["--config.data.mixture=(('cifar10:x',1.0),)"], "data.mixture: probes are of one set"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(run, result, capsys, arguments, message):
    assert cli.main(["probe", str(run / "checkpoints" / "5"), *arguments]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_class_with_too_few_images_is_refused(run, result):
    with pytest.raises(UserError, match="17 training images a class, and 'class_0' has 16"):
        vit_scale.probe(run / "checkpoints" / "5", shots=(17,))


def test_weights_of_another_library_need_a_data_set(jpegs, capsys):
    """At another size than their own their positions are resampled; they leave no cache."""
    weights = ROOT / "tests" / "golden" / "families" / "dinov2"
    with pytest.raises(UserError, match="has no data set of its own: give one"):
        vit_scale.probe(weights)
    files = sorted(weights.iterdir())
    data = {"data.name": "folder", "data.path": str(jpegs), "data.resolution": 16}
    result = vit_scale.probe(
        weights, split="val", only=("knn",), **data, **{"eval.batch": 12, "data.workers": 0}
    )
    assert (result["step"], result["dimensions"], result["n"]) == (0, 24, 12)
    assert "posemb: resampled 3 x 3 -> 4 x 4, cubic" in capsys.readouterr().err
    assert sorted(weights.iterdir()) == files

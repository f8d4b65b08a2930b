"""The guarantees of docs/design.md on several devices and processes: batch, curve, checkpoint.

8 virtual devices, as 1, 2 and 4 real processes, of which 1 and 2 train. Each of these pods starts
once and does all its work in one go, because starting is most of the time.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from tests.laws.test_laws import TINY
from vit_scale import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]


STEPS, MIDDLE = 8, 4  # a step takes a second, of which 8 threads on 2 cores mostly wait
# Without mixing, whose Beta distribution takes as long to compile as all the rest: the test of the
# batches has it. Everything else that draws random numbers or keeps state is on.
MIXING = ["augment.mixup=0.5", "augment.cutmix=0.5"]
FIELDS = TINY | {
    "data.batch": 16,
    "model.scan": True,
    "model.registers": 2,
    "model.rope": "mixed",
    "model.rope_rescale": 2.0,
    "model.attention_norm": True,
    "model.mlp_norm": True,
    "model.patch_drop": 0.25,
    "model.swiglu": True,
    "model.qk_norm": "rmsnorm",
    "model.layer_scale": 0.1,
    "augment.crop": "resized",
    "augment.flip": True,
    "eval.final": "test[:60]",  # which 16 do not divide
    "eval.batch": 16,
    "steps": STEPS,
    "checkpoint.every": STEPS,
    "checkpoint.keep": 2,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
}
SAVED = [f"checkpoint.every={MIDDLE}"]  # those that are resumed from the middle
LORA = ["lora.rank=2", "lora.kernels=kernel$", "optim.train=bias$|^head/"]  # every rule
MESHES = ("1-8-1", "2-2-2")  # devices along data, fsdp and tensor
DATA_PARALLEL = "8 devices, 8-1-1"


def mesh_flags(name: str) -> list[str]:
    sizes = name.split("-")
    return [f"mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), sizes, strict=True)]


class Pods:
    """Starts pods of virtual devices, each with a list of runs, and knows their folders."""

    def __init__(self, folder: pathlib.Path, cifar: pathlib.Path):
        self.folder = folder
        self.fields = [f"{name}={value}" for name, value in FIELDS.items()]
        self.fields.append(f"data.path={cifar}")

    def start(
        self, hosts: int, devices: int, runs: dict[str, list[str]], meshes=(), state=()
    ) -> None:
        jobs = {
            "folder": str(self.folder),
            "state": list(state),
            "overrides": [*self.fields, *MIXING],
            "meshes": {f"{hosts}x{devices}-{mesh}": mesh_flags(mesh) for mesh in meshes},
            "runs": [self.command(name, overrides) for name, overrides in runs.items()],
        }
        file = self.folder / f"jobs-{hosts}x{devices}.json"
        file.write_text(json.dumps(jobs))
        program = [sys.executable, str(ROOT / "tests/helpers/pod_program.py"), str(file)]
        pod = [sys.executable, str(ROOT / "launch/pod.py")]
        subprocess.run(
            [*pod, f"--hosts={hosts}", f"--devices={devices}", *program],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            timeout=600,
        )

    def command(self, name: str, overrides: list[str]) -> list[str]:
        flags = [f"--config.{field}" for field in [*self.fields, *overrides]]
        place = ["--workdir", str(self.folder / name), "--quiet"]
        return ["train", "--config", "vit_tutorial_cifar", *flags, *place]

    def copy_of_first_half(self, name: str, to: str) -> None:
        """As a run that was killed just after its checkpoint in the middle."""
        shutil.copytree(self.folder / name, self.folder / to)
        shutil.rmtree(self.folder / to / "checkpoints" / str(STEPS))
        (self.folder / to / "report.json").unlink()

    def losses(self, name: str) -> dict[int, float]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}

    def report(self, name: str) -> dict:
        return json.loads((self.folder / name / "report.json").read_text())


@pytest.fixture(scope="module")
def pods(cifar, tmp_path_factory) -> Pods:
    result = Pods(tmp_path_factory.mktemp("pods"), cifar)
    runs = {f"8 devices, {mesh}": mesh_flags(mesh) for mesh in MESHES}
    runs["8 devices, 1-8-1"] += SAVED
    result.start(1, 8, runs, ["8-1-1"], state=mesh_flags("1-8-1"))
    result.start(4, 2, {}, ["2-2-2"])
    runs = {"2 processes": mesh_flags("2-4-1") + SAVED, "LoRA": [*mesh_flags("2-2-2"), *LORA]}
    result.start(2, 4, runs, ["8-1-1"])
    result.copy_of_first_half("8 devices, 1-8-1", "8 devices to 1")
    result.copy_of_first_half("2 processes", "2 processes to 1")
    alone = {"1 device": [], "LoRA on 1 device": LORA}
    result.start(1, 1, alone | {"8 devices to 1": SAVED, "2 processes to 1": SAVED})
    return result


# Law 2: same batch, any hosts

PODS = ["1x8-8-1-1", "2x4-8-1-1", "4x2-2-2-2"]


def global_batch(folder: pathlib.Path, pod: str, step: int) -> dict[str, np.ndarray]:
    """Put together from what every device of every process held; equal where several hold it."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for file in sorted(folder.glob(f"{pod}-{step}-*.npz")):
        with np.load(file) as held:
            for key, part in held.items():
                name, row, _ = key.rsplit("/", 2)
                other = parts.setdefault(name, {}).setdefault(int(row), part)
                assert other.tobytes() == part.tobytes()
    return {
        name: np.concatenate([rows[row] for row in sorted(rows)])
        if next(iter(rows.values())).ndim
        else rows[0]
        for name, rows in parts.items()
    }


@pytest.mark.parametrize("step", [7, 8])
@pytest.mark.parametrize("pod", PODS[1:])
def test_the_global_batch_is_the_same_to_the_byte(pods, pod, step):
    expected, result = (global_batch(pods.folder, name, step) for name in (PODS[0], pod))
    assert expected["host/image"].shape == (16, 32, 32, 3)
    assert {"host/label", "host/mask", "device/image"} < expected.keys() == result.keys()
    assert any(name.startswith("draw/") for name in expected)
    for name, whole in expected.items():
        if name.startswith("device/"):
            np.testing.assert_allclose(result[name], whole, rtol=0, atol=1e-6, err_msg=name)
        else:
            assert result[name].dtype == whole.dtype
            assert result[name].tobytes() == whole.tobytes(), name


def test_batches_of_other_steps_differ(pods):
    first, second = (global_batch(pods.folder, PODS[0], step) for step in (7, 8))
    assert not np.array_equal(first["host/image"], second["host/image"])
    changed = [n for n in first if n.startswith("draw/") and np.any(first[n] != second[n])]
    assert changed


def test_each_process_loads_only_its_part(pods):
    """Of 16 rows on (2, 2, 2): 4 processes of 2 devices hold 4, and those of one row the same."""
    files = sorted(pods.folder.glob("4x2-2-2-2-7-*.npz"))
    rows = []
    for file in files:
        with np.load(file) as held:
            result = {key.rsplit("/", 2)[1] for key in held if key.startswith("host/label")}
            rows.append(sorted(map(int, result)))
    assert len(files) == 4
    assert sorted(rows) == [[0], [4], [8], [12]]


# Law 3: same curve, any mesh

CURVES = [*(f"8 devices, {mesh}" for mesh in MESHES), "2 processes"]
EVERY_CURVE = [*CURVES, pytest.param(DATA_PARALLEL, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def trained(pods) -> Callable[[str], str]:
    """Return a run's name; the one whose axes other runs have too is trained when it is used."""

    def train(name: str) -> str:
        if name == DATA_PARALLEL and not (pods.folder / name).exists():
            pods.start(1, 8, {name: mesh_flags("8-1-1")})
        return name

    return train


@pytest.mark.parametrize("name", EVERY_CURVE)
def test_the_loss_curve_is_that_of_one_device(pods, trained, name):
    expected, result = pods.losses("1 device"), pods.losses(trained(name))
    assert list(result) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(result.values()), list(expected.values()), rtol=0, atol=1e-5)


def test_the_loss_curve_of_adapters_is_that_of_one_device(pods):
    """On two processes and a mesh of all axes; the base is written by both together."""
    expected, result = pods.losses("LoRA on 1 device"), pods.losses("LoRA")
    assert list(result) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(result.values()), list(expected.values()), rtol=0, atol=1e-5)
    whole = pods.losses("1 device")
    assert abs(expected[1] - whole[1]) < 1e-6 < abs(expected[STEPS] - whole[STEPS])


def test_it_learned_something_to_agree_on(pods):
    losses = pods.losses("1 device")
    assert min(losses.values()) < losses[1] - 0.02


@pytest.mark.parametrize("name", EVERY_CURVE)
def test_evaluation_counts_every_image_once(pods, trained, name):
    expected, result = (pods.report(run)["eval"] for run in ("1 device", trained(name)))
    assert result["n"] == expected["n"] == 60
    assert result["accuracy"] == expected["accuracy"]
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5)


# Law 1 on other devices: a checkpoint moves


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        pytest.param("8 devices to 2", "8 devices, 1-8-1", marks=pytest.mark.slow),
        ("8 devices to 1", "8 devices, 1-8-1"),
        ("2 processes to 1", "2 processes"),
    ],
)
def test_a_checkpoint_continues_on_fewer(pods, name, whole):
    if name == "8 devices to 2":
        pods.copy_of_first_half(whole, name)
        pods.start(1, 2, {name: ["mesh.tensor=2", *SAVED]})
    assert checkpoint.finished_steps(pods.folder / name) == [MIDDLE, STEPS]
    expected, result = pods.losses(whole), pods.losses(name)
    assert list(result) == list(range(1, STEPS + 1))
    first = range(1, MIDDLE + 1)
    assert [result[step] for step in first] == [expected[step] for step in first]
    assert any(result[step] != expected[step] for step in range(MIDDLE + 1, STEPS + 1)) or (
        pods.report(name)["devices"] != pods.report(whole)["devices"]
    )
    np.testing.assert_allclose(list(result.values()), list(expected.values()), rtol=0, atol=1e-5)


def test_the_pods_were_what_they_are_called(pods):
    result = {name: pods.report(name)["devices"] for name in ("1 device", *CURVES)}
    assert result["1 device"] == {"kind": "cpu", "count": 1, "hosts": 1}
    assert {(d["count"], d["hosts"]) for n, d in result.items() if n[0] == "8"} == {(8, 1)}
    assert result["2 processes"] == {"kind": "cpu", "count": 8, "hosts": 2}
    assert jax.device_count() == 1  # nothing of this is in the test's own process


# Parameters and optimizer are split


def test_fsdp_over_8_holds_an_eighth_on_each_device(pods):
    """Of the ViT-Ti/16 with AdamW: 5.7 M parameters of 4 bytes, moments of 2 and of 4."""
    result = json.loads((pods.folder / "state_bytes.json").read_text())
    for name, whole in (("params", 4 * 5_717_224), ("opt_state", 6 * 5_717_224)):
        assert len(result[name]) == 8
        for held in result[name].values():
            assert whole / 8 <= held <= 1.1 * whole / 8

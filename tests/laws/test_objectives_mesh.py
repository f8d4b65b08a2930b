"""Self-supervised objectives on several devices and processes: the same curve on any mesh."""

import pathlib

import numpy as np
import pytest

from tests.helpers.objectives import SELF_SUPERVISED
from tests.laws.test_mesh import Pods, mesh_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 5
FIELDS = {
    "data.batch": 16,
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.mlp": 16,
    "data.resolution": 16,
    "steps": STEPS,
    "checkpoint.every": 0,
    "optim.lr": 0.003,
    "optim.warmup": 2,
    "log.every": 1,
    "log.images": 0,
    "model.dropout": 0.0,
    "log.wandb": False,
    "log.tensorboard": False,
    "checkpoint.programs": False,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "augment.smoothing": 0.0,
}
EVERY = [
    name if name == "dinov2" else pytest.param(name, marks=pytest.mark.slow)
    for name in SELF_SUPERVISED
]


class ObjectivePods(Pods):
    """Pods that train each objective when a test asks for it."""

    def __init__(self, folder: pathlib.Path, cifar: pathlib.Path):
        super().__init__(folder, cifar)
        self.fields = [f"{name}={value}" for name, value in FIELDS.items()]
        self.fields.append(f"data.path={cifar}")

    def curve(self, name: str, hosts: int, devices: int, mesh: str) -> list[float]:
        run = f"{name} {hosts}x{devices}"
        fields = [*SELF_SUPERVISED[name], "data.resolution=16", *mesh_flags(mesh)]
        self.start(hosts, devices, {run: fields})
        losses = self.losses(run)
        assert list(losses) == list(range(1, STEPS + 1))
        return list(losses.values())


@pytest.fixture(scope="module")
def pods(cifar, tmp_path_factory) -> ObjectivePods:
    return ObjectivePods(tmp_path_factory.mktemp("pods"), cifar)


@pytest.mark.parametrize("name", EVERY)
def test_the_curve_is_that_of_one_device(pods, name):
    """Two processes of 4 devices, all axes of the mesh in use."""
    expected = pods.curve(name, 1, 1, "1-1-1")
    result = pods.curve(name, 2, 4, "2-2-2")
    assert len(set(expected)) == STEPS
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)

"""A config to track, and no key of Weights & Biases."""

import pytest
import wandb

from tests.helpers.tracking import BATCH
from vit_scale.config import base


@pytest.fixture
def cfg():
    cfg = base()
    cfg.data.batch = BATCH
    cfg.log.every, cfg.log.wandb, cfg.log.tensorboard = 2, False, False
    return cfg


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """No test may find the key, or the settings, of the person who runs it."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def forgotten():
    """wandb remembers the key that it has found, and the variables that it has read."""
    yield
    wandb.teardown()

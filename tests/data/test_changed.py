"""Resuming a run whose data changed: refused before anything is compiled, unless accepted."""

import json
import shutil

import numpy as np
import pytest

from tests.data.test_image_folder import picture, save
from tests.helpers.tiny import tiny_config
from vit_scale import checkpoint
from vit_scale.distributed import preemption
from vit_scale.distributed.preemption import Preempted
from vit_scale.errors import UserError
from vit_scale.training import trainer


@pytest.fixture
def photos(tmp_path):
    """Two classes of 8 in `train`, of 2 in `val`."""
    for split, n in (("train", 16), ("val", 4)):
        for i in range(n):
            save(tmp_path / "set" / split / f"class_{i % 2}" / f"{i}.png", picture(16, 16, i))
    return tmp_path / "set"


def config_of(photos, *more: str):
    fields = ("data.name=folder", f"data.path={photos}", "data.batch=4", "eval.batch=4", "steps=4")
    parts = ("data.train=train[:75%]", "eval.split=train[75%:]", "eval.final=val", "eval.every=2")
    few = ("model.classes=2", "data.workers=0", "log.wandb=False", "log.images=0")
    return tiny_config(*fields, *parts, *few, *more)


@pytest.fixture
def stopped(photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: (run / "checkpoints/2").exists())
        with pytest.raises(Preempted):
            trainer.train(config_of(photos), run, "changed", quiet=True)
    return run


def refusal(photos, run, monkeypatch, *more: str) -> str:
    def compile(program):
        raise AssertionError("refused too late")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "jit_train_step", compile)
        with pytest.raises(UserError) as caught:
            trainer.train(config_of(photos, *more), run, "changed", quiet=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_records_its_data(stopped, photos):
    metadata = json.loads((stopped / "run.json").read_text())
    sets = metadata["data"]["sets"]
    assert list(sets) == ["train", "selection", "final"]
    assert [(part["images"], part.get("of")) for part in sets.values()] == [
        (12, 16),
        (4, 16),
        (4, None),
    ]
    assert len({part["fingerprint"] for part in sets.values()}) == 3
    step = stopped / checkpoint.FOLDER / str(checkpoint.finished_steps(stopped)[-1])
    assert checkpoint.read_description(step)["data"] == metadata["data"]


def test_added_images_are_refused_or_accepted(stopped, photos, monkeypatch, capsys):
    save(photos / "train/class_0/new.png", picture(16, 16, 99))
    message = refusal(photos, stopped, monkeypatch)
    assert "went from 16 to 17 images, 1 more; " in message and "data.changed=True" in message
    cfg = config_of(photos, "data.changed=True")
    assert trainer.train(cfg, stopped, "changed", quiet=True)["step"] == 4
    assert "data.changed: since this run began, " in capsys.readouterr().err


def test_a_removed_image_of_the_final_set_is_refused(stopped, photos, monkeypatch):
    (photos / "val/class_1/3.png").unlink()
    message = refusal(photos, stopped, monkeypatch)
    assert "(final: set val went from 4 to 3 images, 1 fewer)" in message


def test_an_image_moved_to_another_class_is_refused(stopped, photos, monkeypatch):
    (photos / "val/class_1/3.png").rename(photos / "val/class_0/3.png")
    message = refusal(photos, stopped, monkeypatch)
    assert "(final: set val still has 4 images, but their paths or labels changed)" in message


def test_a_renamed_class_is_refused(stopped, photos, monkeypatch):
    for split in ("train", "val"):
        (photos / split / "class_0").rename(photos / split / "other")
    for more in ((), ("data.changed=True",)):
        message = refusal(photos, stopped, monkeypatch, *more)
        assert "removed 'class_0', added 'other', class 0 was 'class_0', is now" in message


def test_moved_data_loaded_into_memory_is_the_same_data(stopped, photos, tmp_path):
    """Bit for bit, compared with a run that resumes with the original folder."""
    other = shutil.copytree(stopped, tmp_path / "other")
    shutil.copytree(photos, tmp_path / "moved" / "set")
    trainer.train(config_of(photos), stopped, "changed", quiet=True)
    moved = config_of(tmp_path / "moved" / "set", "data.memory=True")
    trainer.train(moved, other, "changed", quiet=True)
    one, two = (json.loads((run / "report.json").read_text())["eval"] for run in (stopped, other))
    np.testing.assert_equal(one, two)


def test_a_finished_run_ignores_changed_data(stopped, photos):
    """It has no steps left to train."""
    done = trainer.train(config_of(photos), stopped, "changed", quiet=True)
    save(photos / "train/class_0/new.png", picture(16, 16, 99))
    assert trainer.train(config_of(photos), stopped, "changed", quiet=True) == done

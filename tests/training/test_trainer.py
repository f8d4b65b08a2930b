"""trainer: what the loop holds in memory; what it computes is in tests/laws."""

import jax

from tests.helpers.tiny import tiny_config, write_images
from vit_scale.training import trainer


def test_the_train_state_is_gone_when_checkpoints_are_evaluated(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", "train")
    fields = ("data.name=folder", f"data.path={tmp_path}/photos", "data.train=train[:50%]")
    splits = ("eval.split=", "eval.final=train[50%:]", "data.workers=0", "data.batch=4", "steps=2")
    cfg = tiny_config(*fields, *splits, "log.wandb=False", "log.tensorboard=False")
    held = []

    def restore(setup, *args):
        kernel = setup.state.params["blocks"]["mlp"]["up"]["kernel"]
        held.append(sum(array.shape == kernel.shape for array in jax.live_arrays()))
        return real(setup, *args)

    real = trainer.restore
    monkeypatch.setattr(trainer, "restore", restore)
    before = sum(array.shape == (2, 16, 24) for array in jax.live_arrays())
    trainer.train(cfg, tmp_path / "run", "tiny", quiet=True)
    assert held == [before]

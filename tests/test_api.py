"""api: what the command line does, as functions."""

import pytest

import vit_scale
from tests.helpers.tiny import tiny_config
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.training import stages, trainer


@pytest.fixture
def trained(monkeypatch) -> list:
    """The (config, workdir, name) of each run that would be trained."""
    runs: list = []

    def train(cfg, workdir, name, quiet=False, until=None):
        runs.append((cfg, str(workdir), name))
        return {"step": cfg.steps}

    monkeypatch.setattr("vit_scale.api.train_run", train)
    monkeypatch.setattr(stages, "train", train)
    assert trainer.train is not train
    return runs


def test_a_config_is_overridden_in_a_copy(trained, tmp_path):
    cfg = tiny_config()
    report = vit_scale.train(cfg, tmp_path / "run", **{"optim.lr": 0.5, "optim.freeze": ("head",)})
    ((used, workdir, name),) = trained
    assert report == {"step": 10} and (workdir, name) == (str(tmp_path / "run"), "run")
    assert (used.optim.lr, used.optim.freeze) == (0.5, ("head",))
    assert (cfg.optim.lr, cfg.optim.freeze) == (0.001, ())


def test_the_watchdog_is_off_unless_it_is_wanted(trained, tmp_path):
    """It ends the process, which in a notebook is everything."""
    vit_scale.train(tiny_config(), tmp_path)
    vit_scale.train(tiny_config(), tmp_path, watchdog=True)
    vit_scale.train(tiny_config(), tmp_path, **{"watchdog.step": 7.0})
    limits = [set(run[0].watchdog.values()) for run in trained]
    assert limits == [{0.0}, set(config.base().watchdog.values()), {0.0, 7.0}]


def test_a_name_is_trained_in_the_folder_of_the_command_line(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit_scale.train("vit_cifar:Ti/16", steps=600)
    ((cfg, workdir, name),) = trained
    assert (cfg.steps, workdir, name) == (600, "runs/vit_cifar-Ti-16", "vit_cifar-Ti-16")
    reports = vit_scale.train("quickstart", tmp_path / "quick")
    assert list(reports) == list(config.load("quickstart").stages)


def test_what_is_no_run_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="needs a workdir"):
        vit_scale.train(tiny_config())
    with pytest.raises(UserError, match=r"has stages=\('pretrain', .*NAME:STAGE"):
        vit_scale.train(config.load("quickstart"), tmp_path)
    with pytest.raises(UserError, match=r"did you mean optim\.lr"):
        vit_scale.train(tiny_config(), tmp_path, **{"optim.l": 1.0})
    assert trained == []


def test_show_is_of_a_name_or_of_a_config():
    shown = vit_scale.show(tiny_config(), steps=7)
    assert (shown["steps"], shown["tokens"], shown["config"]["steps"]) == (7, 5, 7)
    assert vit_scale.show("cnn_cifar")["config"] == config.to_json(config.load("cnn_cifar"))

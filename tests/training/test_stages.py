"""stages: several runs are one config, wherever their folder lies."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from vit_scale import checkpoint, config, pretrained
from vit_scale.errors import UserError
from vit_scale.models.parameters import named
from vit_scale.training import trainer
from vit_scale.training.stages import train_stages

STEPS = 3
CONFIG = """
from vit_scale.config import base

def get_config(stage=""):
    cfg = base()
    cfg.stages = () if stage else ("first", "second")
    cfg.steps = 3
    cfg.checkpoint.every = 1
    cfg.init.source = "first" if stage == "second" else ""
    cfg.data.name, cfg.data.workers, cfg.data.batch = "folder", 0, 8
    cfg.data.resolution = 16 if stage == "second" else 8
    cfg.model.variant, cfg.model.width, cfg.model.depth = "Ti/4", 8, 1
    cfg.model.heads, cfg.model.mlp, cfg.model.classes = 2, 8, 3
    cfg.eval.split, cfg.eval.final = "", ""
    cfg.log.wandb = cfg.log.tensorboard = False
    cfg.log.images = 0
    return cfg
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, jpegs):
    """(overrides, the folder of the config and of its two runs, which were started from there)."""
    top, before = tmp_path_factory.mktemp("stages"), pathlib.Path.cwd()
    (top / "two.py").write_text(CONFIG)
    os.chdir(top)
    try:
        train_stages("./two.py", [f"data.path={jpegs}"], "runs", quiet=True)
    finally:
        os.chdir(before)
    return [f"data.path={jpegs}"], top


@pytest.fixture
def moved(trained, tmp_path) -> pathlib.Path:
    """All of it in another place."""
    return shutil.copytree(trained[1], tmp_path / "moved")


def parameters(run: pathlib.Path) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in named(pretrained.load_model(run).params).items()}


def stop_after(run: pathlib.Path, step: int) -> None:
    """As if it had been killed then; 0: before its first checkpoint."""
    (run / "report.json").unlink()
    for later in checkpoint.finished_steps(run):
        if later > step:
            shutil.rmtree(run / "checkpoints" / str(later))


def without_cwd(*about, describe=trainer.describe) -> dict:
    found = describe(*about)
    del found["cwd"]
    return found


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_run_names_by_relative_paths_is_found_from_anywhere(
    trained, jpegs, tmp_path, monkeypatch, older
):
    """Its pretraining, in a report on it, and its data; a run of before has no "cwd"."""
    pytest.importorskip("matplotlib", reason="launch/environment.sh inspect")
    from vit_scale.inspect import sections
    from vit_scale.inspect.inspected_run import InspectedRun

    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(trained[1], project)
    (project / "images").symlink_to(jpegs)
    monkeypatch.chdir(project)
    shutil.rmtree("runs")
    if older:
        monkeypatch.setattr(trainer, "describe", without_cwd)
    train_stages("./two.py", ["data.path=images"], "runs", quiet=True)
    monkeypatch.chdir(elsewhere)
    subject = InspectedRun(project / "runs" / "second")
    assert subject.cfg.init.source == "runs/first", "as it was typed"
    tables, missing = sections._positions_before(subject)
    assert missing is None and [table.shape for table in tables.values()] == [(2, 2, 8), (4, 4, 8)]
    assert subject.cfg.data.path == str(project / "images")
    assert len(subject.open_split("test")) == 12
    given = pretrained.load_model(project / "runs" / "second")
    assert given.cfg.data.path == str(project / "images")


RESOLVED = """

def resolve(cfg, stage, begun):
    names = [cfg.optim.name for cfg in begun.values()]
    cfg.optim.name = names[0] if names else ("sgd" if cfg.steps == 1 else "lion")
    cfg.optim.weight_decay = 0.25
"""


def test_what_a_config_decides_by_itself_is_decided_once(jpegs, tmp_path, monkeypatch):
    """By its fields with the overrides applied, which count more; and by what has begun."""
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "two.py").write_text(CONFIG + RESOLVED)
    name, fields = str(tmp_path / "two.py"), [f"data.path={jpegs}", "steps=1"]
    optimizer = config.load(f"{name}:first", fields).optim
    assert (optimizer.name, optimizer.weight_decay) == ("sgd", 0.25)
    assert config.load(f"{name}:first").optim.name == "lion"
    given = config.load(f"{name}:first", [*fields, "optim.weight_decay=0.5"]).optim
    assert (given.name, given.weight_decay) == ("sgd", 0.5)
    for workdir, asked in ((tmp_path / "runs", name), (tmp_path / "alone", f"{name}:first")):
        train_stages(asked, fields, workdir, quiet=True)
    # Its own choice would be another one now, and the run of another config.
    (tmp_path / "two.py").write_text((CONFIG + RESOLVED).replace('"sgd"', '"adamw"'))
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    for workdir, asked in ((tmp_path / "runs", name), (tmp_path / "alone", f"{name}:first")):
        train_stages(asked, fields, workdir, quiet=True)
        files = list(workdir.rglob("run.json"))
        assert files
        for file in files:
            begun = json.loads(file.read_text())["config"]
            assert begun["optim"]["name"] == "sgd"
    assert config.load(f"{name}:first", fields).optim.name == "adamw"


def test_a_resolve_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "two.py").write_text(CONFIG + "def resolve(cfg, stage, begun): cfg.optm.lr = 1")
    with pytest.raises(UserError, match=r"two.py: .*optm") as caught:
        config.load(str(tmp_path / "two.py"))
    assert "\n" not in str(caught.value)


def test_a_finished_one_is_finished_in_another_place(trained, moved):
    reports = train_stages(str(moved / "two.py"), trained[0], moved / "runs", quiet=True)
    assert list(reports) == ["first", "second"]
    for stage, report in reports.items():
        before = (trained[1] / "runs" / stage / "report.json").read_bytes()
        assert (moved / "runs" / stage / "report.json").read_bytes() == before
        assert report == json.loads(before)


def test_one_that_was_stopped_goes_on_in_another_place(trained, moved):
    run, undisturbed = moved / "runs" / "second", trained[1] / "runs" / "second"
    stop_after(run, STEPS - 1)
    assert checkpoint.finished_steps(run) == [STEPS - 1]
    train_stages(str(moved / "two.py"), trained[0], moved / "runs", quiet=True)
    found, wanted = parameters(run), parameters(undisturbed)
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    report = json.loads((run / "report.json").read_text())
    assert report["init"] == str(moved / "runs" / "first")


def test_before_it_has_begun_another_source_is_another_run(trained, moved):
    stop_after(moved / "runs" / "second", 0)
    with pytest.raises(
        UserError, match=r"different config \(init.source: runs/first -> .*/first\);"
    ):
        train_stages(str(moved / "two.py"), trained[0], moved / "runs", quiet=True)

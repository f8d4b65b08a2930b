"""wandb_sweep: what W&B's agent makes of a sweep's configuration is a command of ours."""

import json
import os
import sys

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps import utils

from vit_scale import api, cli, config
from vit_scale.cli.parser import parser, split_overrides
from vit_scale.errors import FAILED, UserError
from vit_scale.tracking import wandb_sweep, wandb_writer
from vit_scale.tracking.wandb_sweep import describe_sweep, run_wandb_sweep

GRID = {"optim.lr": ["1e-3", "3e-3"], "model.scan": ["True"], "optim.freeze": ["('embed',)"]}


def test_a_sweep_in_their_format():
    ranges = {
        "uniform": {"optim.warmup": (10, 99)},
        "log_uniform_values": {"optim.weight_decay": (0.01, 0.1)},
    }
    integers = ["optim.warmup"]
    content = describe_sweep("vit_cifar:S/16", ["steps=9"], GRID, ranges, integers, "accuracy", 5)
    assert content["method"] == "random" and content["run_cap"] == 5
    assert content["metric"] == {"name": "eval/accuracy", "goal": "maximize"}
    assert content["parameters"] == {
        "config.optim.lr": {"values": [1e-3, 3e-3]},
        "config.model.scan": {"values": [True]},
        "config.optim.freeze": {"values": ["('embed',)"]},
        "config.optim.warmup": {"distribution": "q_uniform", "q": 1, "min": 10, "max": 99},
        "config.optim.weight_decay": {
            "distribution": "log_uniform_values", "min": 0.01, "max": 0.1,
        },
    }  # fmt: skip
    assert describe_sweep("vit_cifar", [], GRID, {}, [], "mAP", None)["method"] == "grid"


def test_their_agent_starts_a_training_of_ours():
    """The command as W&B's own code makes it of a drawn point."""
    content = describe_sweep("vit_cifar:S/16", ["steps=9"], GRID, {}, [], "accuracy", None)
    drawn = {name: {"value": one["values"][0]} for name, one in content["parameters"].items()}
    command = utils.create_sweep_command(content["command"])
    words = utils.create_sweep_command_args({"args": drawn})["args"]
    position = command.index("${args}")
    program, *arguments = [*command[:position], *words, *command[position + 1 :]]
    rest, overrides = split_overrides(arguments)
    args = parser().parse_args(rest)
    assert (program, args.verb, args.config) == ("vit-scale", "train", "vit_cifar:S/16")
    cfg = config.load(args.config, overrides)
    assert (cfg.steps, cfg.optim.lr, cfg.optim.freeze) == (9, 1e-3, ("embed",))


def test_an_agents_runs_have_folders_and_ids_of_their_own(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert api.default_workdir("vit_cifar:S/16") == "runs/vit_cifar-S-16"
    assert wandb_writer._run_id(tmp_path / "one") != "r1", "all runs would have this id"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s9")
    assert api.default_workdir("vit_cifar:S/16") == "runs/vit_cifar-S-16-sweep-s9/r1"
    assert wandb_writer._run_id(tmp_path / "two") == "r1"
    monkeypatch.setenv("WANDB_RUN_ID", "r2")
    assert wandb_writer._run_id(tmp_path / "two") == "r1", "a run keeps its id"


def test_a_sweep_is_registered_once_and_its_agent_takes_over(monkeypatch, tmp_path):
    calls: list = []
    monkeypatch.setattr(wandb_sweep, "has_key", lambda wandb: True)
    monkeypatch.setattr(wandb, "sweep", lambda content, project: calls.append(content) or "abc")
    monkeypatch.setattr(os, "execv", lambda program, words: calls.append(words[2:]))
    monkeypatch.setenv("PATH", "/usr/bin")
    content = describe_sweep("vit_cifar", [], GRID, {}, [], "accuracy", None)
    agent = ["wandb", "agent", "--forward-signals", "--project", "vit", "abc"]
    for expected in ([content, agent], [content, agent, agent]):
        run_wandb_sweep(content, tmp_path / "sweep", "vit")
        assert calls == expected
    assert os.environ["PATH"].startswith(f"{os.path.dirname(sys.executable)}:")
    assert yaml.safe_load((tmp_path / "sweep" / "wandb-sweep.yaml").read_text()) == content
    other = describe_sweep("vit_cifar", ["steps=9"], GRID, {}, [], "accuracy", None)
    with pytest.raises(UserError, match="holds another sweep"):
        run_wandb_sweep(other, tmp_path / "sweep", "vit")
    assert yaml.safe_load((tmp_path / "sweep" / "wandb-sweep.yaml").read_text()) == content


def test_without_a_key_the_sweep_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(wandb_sweep, "has_key", lambda wandb: False)
    code = cli.main([
        "sweep", "--config", "vit_imagenet:S/16", "--grid", "optim.lr=1e-3,3e-3", "--wandb",
        "--config.data.train=train[:99%]", "--config.eval.split=train[99%:]",
        "--workdir", str(tmp_path),
    ])  # fmt: skip
    assert code == FAILED and "run wandb login" in capsys.readouterr().err
    content = yaml.safe_load((tmp_path / "wandb-sweep.yaml").read_text())
    assert json.dumps(content["parameters"]) == '{"config.optim.lr": {"values": [0.001, 0.003]}}'

"""launch/tpu_vm.sh with the real trainer: the hosts of a fake slice train as one process."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from launch.tpu import preflight
from launch.tpu.exit_codes import Stop
from tests.helpers.fake_cloud import ROOT, Rig, script
from tests.helpers.tiny import tiny_config

TRAINER = """#!/bin/bash
exec {python} -m vit_scale.cli "$@" --coordinator "localhost:$JAX_COORDINATOR_PORT" \\
  --processes "$FAKE_WORKERS" --process "$FAKE_WORKER"
"""
PYTHON = shlex.quote(sys.executable)
SMALL = ["--config.model.width=32", "--config.model.depth=2", "--config.model.mlp=64"]
SMALL += ["--config.data.batch=16", "--config.data.fractal.classes=16"]
SMALL += ["--config.model.classes=16", "--config.steps=4", "--config.log.every=1"]
SMALL += ["--config.optim.warmup=0"]
QUIET = ["--config.log.wandb=False", "--config.log.tensorboard=False", "--config.log.images=0"]


def real_rig(folder: pathlib.Path, hosts: int, devices: int) -> Rig:
    """A rig whose clone is the whole project, and whose hosts have virtual CPU devices."""
    rig = Rig(folder, hosts=hosts, timelines=[["WAITING_FOR_RESOURCES", "ACTIVE"]])
    for part in ("vit_scale", "configs"):
        shutil.copytree(ROOT / part, rig.root / part, dirs_exist_ok=True)
    script(rig.tools / "trainer", TRAINER.format(python=PYTHON))
    command = f'#!/bin/bash\nexec {PYTHON} -m vit_scale.cli "$@"\n'
    script(rig.root / ".venv" / "bin" / "vit-scale", command)
    same = {key: value for key, value in os.environ.items() if key.startswith(("JAX_", "WANDB_"))}
    trainer = shlex.quote(str(rig.tools / "trainer"))
    rig.profile(**same, FAKE_TRAINER=trainer, JAX_NUM_CPU_DEVICES=str(devices))
    return rig


def losses(workdir: pathlib.Path) -> dict[str, list[float]]:
    """Return each run's training losses; a config with stages has a run for each."""
    result = {}
    for file in sorted(workdir.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        result[file.parent.name] = [row["train/loss"] for row in rows if "train/loss" in row]
    return result


def results(workdir: pathlib.Path) -> dict[str, tuple[float, int]]:
    """Return (accuracy, n) of each run that was evaluated."""
    reports = {f.parent.name: json.loads(f.read_text()) for f in workdir.rglob("report.json")}
    return {
        run: (report["eval"]["accuracy"], report["eval"]["n"])
        for run, report in reports.items()
        if "eval" in report
    }


def train_in_one_process(rig: Rig, workdir: pathlib.Path, words: list[str], devices: int) -> None:
    command = [sys.executable, "-m", "vit_scale.cli", "train", "--workdir", str(workdir), *words]
    environment = {**os.environ, "PYTHONPATH": str(rig.root)}
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    subprocess.run([*command, "--quiet"], cwd=rig.root, env=environment, check=True)


def check_equal(folder: pathlib.Path, hosts: int, words: list[str], **variables: str) -> None:
    rig = real_rig(folder, hosts, devices=1)
    try:
        ended = rig.run(*words, "--name", "vit", timeout=7200, LAUNCH_LEAST="60", **variables)
        assert ended.code == 0, ended.err[-4000:]
        assert ended.result["attempts"] == 1 and rig.is_empty()
        assert len(rig.calls("agent.sh start")) == hosts
        one = rig.elsewhere / "one" / rig.workdir.name
        train_in_one_process(rig, one, words, devices=1)
        check_same_results(rig.workdir, one)
        beats = list(
            pathlib.Path(rig.cloud_folder).glob("workers/*/*/home/.vit_scale/runs/*/a1/*.json")
        )
        assert len(beats) == hosts, "the trainer writes a heartbeat for the launcher on each host"
    finally:
        rig.close()


def check_same_results(workdir: pathlib.Path, one: pathlib.Path) -> None:
    mine, alone = losses(workdir), losses(one)
    assert mine.keys() == alone.keys()
    for run, expected in alone.items():
        apart = max(abs(a - b) for a, b in zip(mine[run], expected, strict=True))
        print(f"{run}: {len(expected)} losses, last {expected[-1]:.6f}, at most {apart:.1e} apart")
        assert len(expected) > 1 and apart < 1e-5
    print(f"(accuracy, n): {results(workdir)}")
    assert results(workdir) == results(one)


@pytest.mark.slow
def test_hosts_train_as_one_process(tmp_path):
    check_equal(tmp_path, 2, ["--config", "quickstart:pretrain", *SMALL, *QUIET], **TIME)


TIME = {"LAUNCH_TIME_SCALE": "0.1"}


@pytest.mark.slow
def test_the_quickstart_on_a_slice_of_four_hosts(tmp_path):
    """All five stages, to the end: takes a quarter of an hour on two cores."""
    check_equal(tmp_path, 4, ["--config", "quickstart", "--config.log.every=5", *QUIET], **TIME)


VIT = sorted(file.stem for file in (ROOT / "configs").glob("vit_*.py"))


@pytest.mark.parametrize(
    ("overrides", "result"),
    [
        (["data.name=huggingface", "data.path=ylecun/mnist"], []),
        (["data.name=mnist"], ["vit-scale data download mnist --out .data"]),
        (["data.name=folder", "data.path=pets"], "data.path=pets is a folder on this machine"),
        (
            ["data.mixture=(('folder:gs://b/c', 1.0), ('tar:shards', 1.0))"],
            "data.mixture=shards is a folder",
        ),
        (["objective=distillation", "distill.teacher=runs/cnn"], "distill.teacher=runs/cnn is a"),
        (["objective=distillation", "distill.teacher=gs://b/cnn"], None),
        (["init.source=runs/vit"], "init.source=runs/vit is a folder on this machine"),
    ],
)
def test_what_workers_can_not_reach_is_refused(overrides, result):
    from vit_scale import config

    resolved = {"config": json.loads(json.dumps(config.to_json(tiny_config(*overrides))))}
    if isinstance(result, str):
        with pytest.raises(Stop, match=re.escape(result)):
            preflight.check_data(resolved, local=False)
        return
    expected = ["vit-scale data download cifar10 --out .data"] if result is None else result
    assert preflight.check_data(resolved, local=False) == expected


@pytest.mark.parametrize("name", VIT)
def test_every_config_passes_the_preflight_check(name):
    """ImageNet is in a bucket; AugReg's weights are at https://, which every machine can read."""
    from vit_scale import config

    overrides = ["data.path=gs://b/imagenet"] if name.endswith("_imagenet") else []
    resolved = {"config": config.to_json(config.load(name, overrides))}
    expected = [] if overrides else ["vit-scale data download cifar10 --out .data"]
    assert preflight.check_data(resolved, local=False) == expected

"""launch/tpu_vm.sh with the real trainer: the hosts of a fake slice train as one process does."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.fake_cloud import ROOT, Rig, script

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


def losses(run: pathlib.Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def single(rig: Rig, workdir: pathlib.Path, words: list[str], devices: int) -> None:
    command = [sys.executable, "-m", "vit_scale.cli", "train", "--workdir", str(workdir), *words]
    environment = {**os.environ, "PYTHONPATH": str(rig.root)}
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    subprocess.run([*command, "--quiet"], cwd=rig.root, env=environment, check=True)


def check_equal(folder: pathlib.Path, hosts: int, words: list[str], **variables: str) -> None:
    rig = real_rig(folder, hosts, devices=1)
    try:
        ended = rig.run(*words, "--name", "vit", timeout=1500, LAUNCH_LEAST="60", **variables)
        assert ended.code == 0, ended.err[-4000:]
        assert ended.result["attempts"] == 1 and rig.is_empty()
        assert len(rig.calls("agent.sh start")) == hosts
        single(rig, rig.elsewhere / "one", words, devices=1)
        mine, alone = losses(rig.workdir), losses(rig.elsewhere / "one")
        assert len(mine) == len(alone) and len(mine) > 1
        assert mine == pytest.approx(alone, rel=0, abs=1e-5)
        beats = list(
            pathlib.Path(rig.cloud_folder).glob("workers/*/*/home/.vit_scale/runs/*/a1/*.json")
        )
        assert len(beats) == hosts, "the trainer writes a heartbeat for the launcher on each host"
    finally:
        rig.close()


def test_hosts_train_as_one_process(tmp_path, quick_compile):
    check_equal(tmp_path, 2, ["--config", "quickstart:pretrain", *SMALL, *QUIET], **TIME)


TIME = {"LAUNCH_TIME_SCALE": "0.1"}


@pytest.mark.slow
def test_the_quickstart_on_a_slice_of_four_hosts(tmp_path):
    """Its pretraining, for 60 of its 400 steps."""
    words = ["--config", "quickstart:pretrain", "--config.steps=60", "--config.log.every=5", *QUIET]
    check_equal(tmp_path, 4, words, **TIME)

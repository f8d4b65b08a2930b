"""launch/sky.yaml, as a shell runs it and as the real SkyPilot reads it."""

import json
import os
import subprocess

import pytest
import yaml

from launch.tpu import accelerators
from tests.helpers.documents import ROOT
from tests.helpers.fake_cloud import script
from tests.helpers.real_tools import python_of

FILE = ROOT / "launch" / "sky.yaml"
TASK = yaml.safe_load(FILE.read_text())
# Exit codes of a run's hosts, one failure after another, and whether SkyPilot restarts the run.
FAILURES = [[42, 42], [42, 137], [1, 137], [137, 137], [139, 137], [42, 137], [1, 137]]
READ = """
import asyncio, json, sys, yaml
import sky
from sky import backends
from sky.jobs.recovery_strategy import StrategyExecutor
from sky.utils import dag_utils

task = sky.Task.from_yaml_config(
    yaml.safe_load(open(sys.argv[1])), env_overrides=[("WORKDIR", "gs://b/vit")],
    secrets_overrides=[("WANDB_API_KEY", "k")])
dag = sky.Dag()
dag.add(task)
dag_utils.fill_default_config_in_dag_for_job_launch(dag)
(resources,) = task.resources
result = {
    "name": task.name, "workdir": task.workdir, "setup": task.setup, "run": task.run,
    "envs": task.envs, "spot": resources.use_spot, "accelerators": resources.accelerators,
    "runtime": resources.accelerator_args["runtime_version"], "cloud": str(resources.cloud),
}
executor = StrategyExecutor.make("c", backends.CloudVmRayBackend(), task, 1, 0, None, set(),
                                 asyncio.Lock(), asyncio.Condition())
restart = executor.should_restart_on_failure
result["restarts"] = [restart(codes) for codes in json.loads(sys.argv[2])]
print("RESULT" + json.dumps(result))
"""


def test_the_trainer_gets_the_environment_as_words(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script(
        tmp_path / ".venv" / "bin" / "vit-scale", "#!/bin/bash\nprintf '%s\\n' \"$@\"\nexit 42\n"
    )
    values = {"WORKDIR": "gs://b/a run", "ARGUMENTS": "--config.seed=1 --config.steps=2"}
    environment = {**os.environ, **TASK["envs"], **values}
    done = subprocess.run(
        ["bash", "-c", TASK["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    expected = ["train", "--config", "quickstart:pretrain", "--workdir", "gs://b/a run"]
    assert done.stdout.splitlines() == [*expected, "--config.seed=1", "--config.steps=2"]
    assert done.returncode == 42


@pytest.mark.parametrize("has_uv", [True, False])
def test_setup_has_uv_where_python_is_too_old(tmp_path, has_uv):
    """SkyPilot's own in ~/.local/bin, which need not be on PATH, or else pip's."""
    home, tools = tmp_path / "home", tmp_path / "tools"
    uv = home / ".local" / "bin" / "uv"
    for folder in (tools, uv.parent, tmp_path / "launch"):
        folder.mkdir(parents=True)
    if has_uv:
        script(uv, "#!/bin/sh\n")
    script(tmp_path / "launch" / "environment.sh", '#!/bin/sh\necho "$1"; command -v uv\nexit 3\n')
    pip = f'#!/bin/sh\necho "$*"; echo "#!/bin/sh" >{uv}; /bin/chmod +x {uv}\n'
    script(tools / "python3", pip)
    environment = {"HOME": str(home), "PATH": str(tools)}
    done = subprocess.run(
        ["/bin/bash", "-c", TASK["setup"]], cwd=tmp_path, env=environment, capture_output=True
    )
    first = str(uv) if has_uv else "-m pip install --user uv"
    assert done.stdout.decode().splitlines() == [first, "tpu", str(uv)]
    assert done.returncode == 3


def test_the_slice_has_its_software():
    resources = TASK["resources"]
    slice_ = accelerators.parse(resources["accelerators"].removeprefix("tpu-"))
    assert resources["accelerator_args"] == {"runtime_version": slice_.runtime}
    for name in ("v5e-16", "v5p-16"):
        assert accelerators.parse(name).runtime in FILE.read_text()


@pytest.mark.slow
def test_the_real_skypilot_reads_it(tmp_path):
    """It recovers a resumable run each time, and another failure three times."""
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [python_of("sky", "skypilot[gcp]==0.14.1"), "-c", READ]
    done = subprocess.run(
        [*command, str(FILE), json.dumps(FAILURES)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert json.loads(line.removeprefix("RESULT")) == {
        "name": "vit",
        "workdir": ".",
        "setup": TASK["setup"],
        "run": TASK["run"],
        "envs": {**TASK["envs"], "WORKDIR": "gs://b/vit"},
        "spot": True,
        "accelerators": {"tpu-v6e-16": 1},
        "runtime": "v2-alpha-tpuv6e",
        "cloud": "GCP",
        "restarts": [True, True, True, True, True, True, False],
    }

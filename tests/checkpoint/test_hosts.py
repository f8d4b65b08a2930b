"""Checkpoints of several hosts: a part that only one can't read, and no question by Orbax."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Each of two processes holds one half of each array.
PROGRAM = """
import json, os, pathlib, sys
from vit_scale.distributed import multihost

folder = pathlib.Path(sys.argv[1])
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
number = int(given["--process"])
multihost.join(given["--coordinator"], int(given["--processes"]), number)

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from vit_scale.checkpoint import Checkpoints

questions, ask = [], multihost_utils.reached_preemption_sync_point
multihost_utils.reached_preemption_sync_point = lambda step: questions.append(step) or ask(step)

mesh = jax.sharding.Mesh(jax.devices(), "x")
halves = NamedSharding(mesh, PartitionSpec("x"))
shape = jax.ShapeDtypeStruct((2, 1000), np.float32, sharding=halves)
target = {"params": {"w": shape}, "ema": None, "opt_state": {"m": shape}}

def array(step):
    mine = np.random.RandomState(10 * step + number).randn(1, 1000).astype(np.float32)
    return jax.make_array_from_process_local_data(halves, mine)

seen = {}
with Checkpoints(folder / "run", keep=3) as checkpoints:
    for step in (1, 2):
        trees = {"params": {"w": array(step)}, "ema": None, "opt_state": {"m": array(step)}}
        checkpoints.save(step, trees, {"config": {}})
        checkpoints.wait()
    seen["asked by Orbax"] = len(questions)
    if number == 0:
        theirs = folder / "run" / "checkpoints" / "2" / "params" / "ocdbt.process_1"
        for file in (theirs / "d").iterdir():
            os.truncate(file, 10)
    multihost.broadcast(None)
    step, trees = checkpoints.recover(target)
    mine = np.asarray(trees["params"]["w"].addressable_shards[0].data)
    expected = np.random.RandomState(10 + number).randn(1, 1000).astype(np.float32)
    seen |= {"step": step, "exact": bool((mine == expected).all())}
    seen["damaged"] = sorted(f.name for f in (folder / "run" / "damaged").iterdir())
    seen["left"] = checkpoints.find_latest()
(folder / f"seen-{number}.json").write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("pod")
    command = [sys.executable, str(ROOT / "launch" / "pod.py"), "--hosts", "2", sys.executable]
    done = subprocess.run(
        [*command, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"seen-{n}.json").read_text()) for n in range(2)]


def test_what_one_host_can_t_read_is_set_aside_by_all(results):
    for host in results:
        assert (host["step"], host["exact"]) == (1, True)
        assert (host["damaged"], host["left"]) == (["2"], 1)


def test_only_the_loop_asks_whether_to_stop(results):
    """jax announces a preemption at one number: a second caller would hide it from the loop."""
    assert [host["asked by Orbax"] for host in results] == [0, 0]

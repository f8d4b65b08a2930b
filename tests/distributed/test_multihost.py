"""multihost: processes that connect, share values, and raise what one of them raises."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from vit_scale.distributed import multihost
from vit_scale.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Writes the results of each process as JSON; `number` is its index.
PROGRAM = """
import json, os, pathlib, sys
from vit_scale.distributed import multihost
from vit_scale.errors import UserError

number, folder = int(os.environ["SLURM_PROCID"]), pathlib.Path(sys.argv[1])
multihost.join(wait=60)
seen = {"several": multihost.has_peers(), "first": multihost.is_first()}
seen["agreed"] = multihost.broadcast({"from": number, "long": "x" * 5000 + "\u00e9"})
seen["nothing"] = multihost.broadcast(None)

def attempt(action):
    try:
        with multihost.shared_errors():
            return action()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "code", None)]

def fail_on(which, error):
    if number == which:
        raise error
    return "fine"

seen["mistake"] = attempt(lambda: fail_on(1, UserError("no such split", 2)))
seen["defect"] = attempt(lambda: fail_on(2, KeyError("heads")))
seen["long"] = attempt(lambda: fail_on(0, UserError("y" * 5000 + "\\nsecond line")))
seen["well"] = attempt(lambda: fail_on(7, UserError("nobody")))

def share(name):
    (folder / name).mkdir(exist_ok=True)
    multihost.check_shared(folder / name)
    return sorted(path.name for path in (folder / name).iterdir())

seen["shared"] = attempt(lambda: share("all"))
seen["apart"] = attempt(lambda: share(f"of-{number // 2}"))
multihost.check_same({"seed": (1, 2)})
try:
    multihost.check_same({"seed": 0, "lr": 1e-3 if number == 1 else 1e-2})
except UserError as error:
    seen["unlike"] = str(error)
(folder / f"seen-{number}.json").write_text(json.dumps(seen))
if number == 1:
    multihost.leave(9)
os._exit(0)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """The results of three processes that connect by SLURM's variables; the second then fails."""
    folder = tmp_path_factory.mktemp("hosts")
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    cluster = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "3",
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)],
            env={**os.environ, **cluster, "SLURM_PROCID": str(number)},
        )
        for number in range(3)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 9, 0]
    return [json.loads((folder / f"seen-{n}.json").read_text()) for n in range(3)]


def test_a_cluster_tells_processes_of_each_other(results):
    assert [result["several"] for result in results] == [True] * 3
    assert [result["first"] for result in results] == [True, False, False]


def test_all_agree_with_process_0(results):
    assert [result["agreed"] for result in results] == [{"from": 0, "long": "x" * 5000 + "é"}] * 3
    assert [result["nothing"] for result in results] == [None] * 3


def test_what_one_raises_all_raise(results):
    own, others = ["UserError", "no such split", 2], ["UserError", "process 1: no such split", 2]
    assert [result["mistake"] for result in results] == [others, own, others]
    own, others = ["KeyError", "'heads'", None], ["UserError", "process 2: 'heads'", 1]
    assert [result["defect"] for result in results] == [others, others, own]
    assert [result["well"] for result in results] == ["fine"] * 3


def test_a_long_line_is_cut_for_the_others(results):
    assert results[0]["long"][1].startswith("y" * 5000)
    kind, line, code = results[1]["long"]
    assert (kind, code) == ("UserError", 1)
    assert line.startswith("process 0: yyyy") and 500 < len(line) < 1000 and "\n" not in line


def test_a_folder_that_is_not_shared_is_refused_by_all(results):
    assert [result["shared"] for result in results] == [[]] * 3  # nothing is left in it
    lines = [result["apart"][1] for result in results]
    assert all("is not the same folder on process 2 and on process 0" in line for line in lines)
    assert all("such as gs://bucket/run or NFS" in line for line in lines)


def test_a_host_that_would_train_something_else_is_refused_by_all(results):
    line = (
        "hosts disagree: process 1 differs from process 0 (lr: 0.001 instead of "
        "0.01): run the same command, code and data on every host"
    )
    assert [result["unlike"] for result in results] == [
        f"process 1: {line}",
        line,
        f"process 1: {line}",
    ]


def test_alone_everything_is_as_it_was():
    multihost.join()
    assert not multihost.has_peers() and multihost.is_first()
    assert multihost.broadcast({"any": object}) == {"any": object}
    with pytest.raises(KeyError), multihost.shared_errors():
        raise KeyError
    multihost.leave(3)  # returns
    multihost.check_shared(pathlib.Path("/nowhere"))
    multihost.check_same({"seed": object})


@pytest.mark.parametrize("options", [("h:1", None, None), (None, 2, 0), ("h:1", 2, None)])
def test_the_flags_belong_together(options):
    with pytest.raises(UserError, match="must be given together") as caught:
        multihost.join(*options)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("process", "code", "line"),
    [
        (0, 42, "vit-scale: not all 2 processes connected within 3 s; start the same command"),
        (1, 42, "vit-scale: not all 2 processes connected within 3 s; start the same command"),
        (2, 2, "vit-scale: --process 2, --processes 2: process_id and num_processes must be"),
    ],
)
def test_a_missing_process_is_an_error_after_the_stated_time(run_cli, process, code, line):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    where = ("--coordinator", f"localhost:{port}", "--processes", 2, "--process", process)
    done = run_cli("train", "--config", "quickstart", *where, "--wait", 3)
    assert done.returncode == code
    output = [text for text in done.stderr.splitlines() if text.startswith("vit-scale")]
    assert len(output) == 1 and output[0].startswith(line)
    assert "Traceback" not in done.stderr and "stack trace" not in done.stderr


HELD = "The TPU is already in use by process with pid 7. Not attempting to load libtpu.so"


@pytest.mark.parametrize(
    ("words", "explicit"),
    [
        (f"Unable to initialize backend 'tpu': ABORTED: {HELD}\nin this process.", True),
        (f"Backend 'tpu' failed to initialize: ABORTED: {HELD} in this process.", False),
        ("UNKNOWN: TPU initialization failed: open(/dev/vfio/0): Device or resource busy", True),
    ],
)
def test_an_accelerator_of_another_process_may_be_free_later(monkeypatch, words, explicit):
    """Jax uses the CPU instead, unless it was told which platform to use."""

    def devices(platform=None, devices=jax.devices):
        if platform == "tpu" or explicit:
            raise RuntimeError(words)
        return devices()

    monkeypatch.setattr(jax, "devices", devices)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", before if explicit else None)
    try:
        with pytest.raises(UserError) as caught:
            multihost.open_devices()
    finally:
        jax.config.update("jax_platforms", before)
    assert caught.value.code == 42
    line = str(caught.value)
    assert line.startswith("the accelerator is in use by another process (") and "\n" not in line
    assert words.splitlines()[0].rpartition(": ")[2] in line


def test_a_machine_without_a_tpu_uses_its_cpu(monkeypatch):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        assert multihost.open_devices() == jax.devices()
    finally:
        jax.config.update("jax_platforms", before)

    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu': UNAVAILABLE: no TPU")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        multihost.open_devices()

"""Profiles: a trace has the steps asked for and the model's parts, and changes no result."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.tiny import random_batch, tiny_config
from tests.laws.test_laws import (
    ROOT,
    command,
    final_state,
    losses,
    rows,
    same_bits,
    settings,
)
from vit_scale import cli
from vit_scale.distributed import profile_request
from vit_scale.errors import UserError
from vit_scale.storage import cache, files, paths
from vit_scale.tracking import Profiler
from vit_scale.training import validation
from vit_scale.training.setup import make_setup
from vit_scale.training.train_step import jit_train_step

PARTS = ("(patch_embedding)", "(head)", "/optimizer/", "/augmentation/")


def traced(folder) -> list[int]:
    """The numbers of the steps in the one trace in `folder`."""
    (file,) = folder.glob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    steps = (dict(event.stats) for event in events if event.name == "train")
    return sorted({int(stats["step_num"]) for stats in steps})


@pytest.fixture
def names_in_cache():
    """Else a program from the cache has the names of the code that compiled it first."""
    option = "jax_compilation_cache_include_metadata_in_key"
    jax.config.update(option, True)
    yield
    jax.config.update(option, False)


def test_a_profiled_run_is_the_same_to_the_bit(cifar, tmp_path, names_in_cache):
    fields = settings(cifar, steps=6, model__scan=False, eval__final="")
    fields |= {"augment__mixup": 0.0, "augment__cutmix": 0.0}  # which take long to compile
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert cli.main([*command(plain, **fields), "--quiet"]) == 0
    fields |= {"log__profile": (3, 2), "log__tensorboard": True}
    assert cli.main([*command(run, **fields), "--quiet"]) == 0
    same_bits(final_state(run), final_state(plain))
    assert losses(run) == losses(plain) and len(losses(run)) == 6
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(plain)]
    assert not (plain / "profile").exists()

    session = run / "profile/plugins/profile/steps_3-4"
    assert traced(session) == [3, 4]
    assert [path.name for path in (run / "profile").iterdir()] == ["plugins"]
    assert all(path.name.startswith("process_0.") for path in session.iterdir())
    (file,) = session.glob("*.xplane.pb")
    names = file.read_bytes()  # of operations: they are in the compiled program, which is in it
    for part in (*PARTS, "(block_00)/attention", "(block_01)/mlp"):
        assert part.encode() in names, part
    (events,) = (run / "tensorboard").iterdir()
    assert str(session).encode() in events.read_bytes()


def test_scanned_blocks_share_their_names():
    program = make_setup(tiny_config("model.scan=true"))
    step = jit_train_step(program).lower(program.state, random_batch())
    names = step.as_text(debug_info=True)
    for part in (*PARTS, "blocks/attention", "blocks/mlp"):
        assert part in names, part


@pytest.mark.slow
def test_sigusr2_to_all_processes_traces_the_next_ten_steps(jpegs, tmp_path):
    """A cluster's tool signals data workers too, which must survive it."""
    fields = {"data__name": "folder", "data__path": jpegs, "data__train": "train"}
    fields |= {"data__workers": 1, "data__batch": 8, "model__classes": 3, "steps": 200}
    fields |= {"eval__final": "", "checkpoint__every": 0, "augment__mixup": 0.0}
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "vit_scale.cli", *command(run, **fields, augment__cutmix=0.0)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGUSR2)
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    (session,) = (run / "profile/plugins/profile").iterdir()
    steps = traced(session)
    assert steps == list(range(steps[0], steps[0] + 10)) and steps[0] > 1
    assert session.name == f"steps_{steps[0]}-{steps[-1]}"
    line = f"vit-scale: profile of steps {steps[0]} to {steps[-1]}: {session}; to open it: "
    assert f"{line}xprof --logdir {run / 'profile'}" in errors


def profile(run, planned, steps: int, written: list) -> None:
    """Go through so many steps of nothing, with a tracker that keeps texts in `written`."""
    cfg = tiny_config(f"log.profile={planned}", f"steps={steps}")
    track = SimpleNamespace(
        timer=lambda name: contextlib.nullcontext(), text=lambda *text: written.append(text)
    )
    with Profiler(run, cfg, track) as profiler:
        for step in range(1, steps + 1):
            with profiler.step(step):
                (jnp.ones(3) + 1).block_until_ready()
            profiler.after(step)


def test_a_trace_of_a_run_in_a_bucket_is_there_alone(bucket):
    run, written = paths.parse(f"{bucket}/profiled"), []
    profile(run, (1, 1), 3, written)
    session = run / "profile/plugins/profile/steps_1-1"
    assert written == [(1, "profile", str(session))]
    assert any(name.endswith(".xplane.pb") for name, _ in paths.entries(session))
    assert not [path for path in cache.local(run).rglob("*") if path.is_file()]


def test_training_goes_on_where_a_trace_fails(tmp_path, monkeypatch, capsys):
    written: list = []
    with jax.profiler.trace(tmp_path / "other"):  # of a notebook, say: there can be only one
        profile(tmp_path / "run", (1, 2), 3, written)
    assert capsys.readouterr().err.startswith("vit-scale: no profile of steps 1 to 2: Profile has")
    assert written == []
    monkeypatch.setattr(files, "move", lambda *paths: 1 / 0)
    profile(tmp_path / "run", (1, 2), 3, written)
    assert "division by zero; training continues" in capsys.readouterr().err
    assert written == []
    assert [path.name for path in (tmp_path / "run/profile").iterdir()] == ["plugins"]


def test_a_request_leaves_the_planned_trace(tmp_path, monkeypatch):
    requests, written = iter([False, True]), []
    monkeypatch.setattr(profile_request, "take", lambda: next(requests, False))
    profile(tmp_path, (14, 2), 16, written)
    sessions = tmp_path / "profile/plugins/profile"
    assert [traced(sessions / name) for name in ("steps_2-11", "steps_14-15")] == [
        list(range(2, 12)),
        [14, 15],
    ]
    assert len(written) == 2


def test_a_trace_that_training_leaves_early_is_written(tmp_path):
    cfg = tiny_config("log.profile=(1, 5)")
    track = SimpleNamespace(timer=lambda name: contextlib.nullcontext())
    with pytest.raises(KeyboardInterrupt), Profiler(tmp_path, cfg, track) as profiler:
        with profiler.step(1):
            pass
        raise KeyboardInterrupt
    assert traced(tmp_path / "profile/plugins/profile/steps_1-5") == [1]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ((3,), "log.profile=(3,) is not (STEP, STEPS), such as (100, 5)"),
        ((3, 1.5), "log.profile=(3, 1.5) is not (STEP, STEPS), such as (100, 5)"),
        ((-1, 2), "log.profile=(-1, 2) is not (STEP, STEPS), such as (100, 5)"),
        ((0, 2), "log.profile=(0, 2) are the steps 0 to 1, and the run has steps 1 to 10"),
        ((9, 3), "log.profile=(9, 3) are the steps 9 to 11, and the run has steps 1 to 10"),
    ],
)
def test_steps_that_the_run_does_not_have_are_refused(value, line):
    with pytest.raises(UserError) as caught:
        validation.check_profile(tiny_config(f"log.profile={value}"))
    assert str(caught.value) == line
    validation.check_profile(tiny_config("log.profile=(9, 2)"))

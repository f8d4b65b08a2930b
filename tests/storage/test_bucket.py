"""Runs in a bucket behave as on a disk; tested against an emulator of the storage."""

import http.server
import json
import os
import pathlib
import pickle
import sys
import threading
import time

import jax
import numpy as np
import pytest

from tests.checkpoint.test_checkpointer import like, save, trees
from tests.checkpoint.test_checkpointer import same_bits as same_trees
from tests.helpers.tiny import random_params, tiny_config, tiny_model, write_run
from tests.helpers.tracking import events, loss, tracker
from tests.laws.test_laws import (
    Killed,
    command,
    final_state,
    kill_at_random,
    losses,
    same_bits,
    undisturbed,
)
from vit_scale import checkpoint, cli, config, pretrained, sweep
from vit_scale.errors import FAILED, RESUMABLE, UserError
from vit_scale.runs import lock
from vit_scale.runs.extension import extend
from vit_scale.runs.json_files import read_json, write_json
from vit_scale.runs.lock import Lease
from vit_scale.runs.run_folder import Run
from vit_scale.storage import cache, compare_and_swap, files, paths
from vit_scale.storage.bucket import ObjectPath, check_bucket, file_system
from vit_scale.training import trainer

STEPS, EVERY = 12, 3


def fields(data_path, **more) -> dict:
    return {
        "data__name": "folder",
        "data__path": data_path,
        "data__train": "train",
        "data__workers": 1,
        "data__batch": 8,
        "augment__mixup": 0.0,  # whose Beta distribution takes long to compile
        "augment__cutmix": 0.0,
        "model__classes": 3,
        "steps": STEPS,
        "checkpoint__every": EVERY,
        "eval__final": "val",
        "eval__batch": 8,
        **more,
    }


# A run


@pytest.fixture(scope="module")
def on_disk(jpegs, tmp_path_factory) -> pathlib.Path:
    """An undisturbed run, with its data and its folder on a disk."""
    return undisturbed(tmp_path_factory.mktemp("disk"), fields(jpegs, data__workers=0))


@pytest.fixture(scope="module")
def killed(bucket, images, on_disk) -> pathlib.Path:
    """The same run in a bucket, from data in a bucket, killed while it saved."""
    run = paths.parse(f"{bucket}/killed")

    def saved():
        time.sleep(0.2)  # the server is one process: polling all the time would slow the run down
        return checkpoint.finished_steps(run) != []

    kill_at_random(command(run, **fields(images)), saved, 0.0, on_disk.parent)
    last = max(checkpoint.finished_steps(run))
    assert 0 < last < STEPS and not (run / "report.json").exists()
    # The steps up to a checkpoint are logged before it is saved.
    assert [step for step, _ in losses(run) if step <= last] == list(range(1, last + 1))
    return run


@pytest.fixture(scope="module")
def resumed(killed, images) -> pathlib.Path:
    """The killed run, finished by rerunning the same command."""
    assert cli.main([*command(killed, **fields(images)), "--quiet"]) == 0
    return killed


@pytest.fixture(scope="module")
def finished(bucket, images) -> pathlib.Path:
    """A run in a bucket that nothing disturbed."""
    run = paths.parse(f"{bucket}/finished")
    assert cli.main([*command(run, **fields(images)), "--quiet"]) == 0
    return run


@pytest.mark.slow
def test_killed_and_resumed_in_a_bucket_equals_the_undisturbed_run_on_a_disk(resumed, on_disk):
    same_bits(final_state(resumed), final_state(on_disk))
    assert losses(resumed) == losses(on_disk)  # each row once, with the same numbers
    assert (
        checkpoint.finished_steps(resumed)
        == checkpoint.finished_steps(on_disk)
        == [STEPS - EVERY, STEPS]
    )


@pytest.mark.slow
def test_commands_treat_a_bucket_like_a_disk(resumed, on_disk, images, jpegs, capsys):
    def run_json(*arguments):
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    there, here = run_json("eval", resumed), run_json("eval", on_disk)
    assert there.pop("run") == f"{resumed}/checkpoints/{STEPS}" and here.pop("run")
    assert there.pop("set") == "jpegs val" and here.pop("set")
    assert there == here and there["n"] == 12
    name = "val/class_1/001.jpg"
    scores = {run: run_json("predict", run, f"{images}/{name}") for run in (resumed, on_disk)}
    assert list(scores[resumed]) == [f"{images}/{name}"] and scores[resumed] == scores[on_disk]
    assert (
        run_json("predict", on_disk, jpegs / name)[str(jpegs / name)]
        == scores[on_disk][f"{images}/{name}"]
    )
    (shown,), (other,) = (run_json("show", run)["runs"] for run in (resumed, on_disk))
    changed = ("run", "trained on", "images/s")
    assert shown == other | {name: shown[name] for name in changed}
    assert [shown[name] for name in changed[:2]] == [str(resumed), "jpegs train"]
    assert run_json("eval", f"{resumed}/checkpoints/{STEPS}")["n"] == 12


def test_fine_tuning_starts_from_a_run_in_a_bucket(finished, jpegs, tmp_path, capsys):
    initial, init_state = [], trainer.init_state

    def record(*arguments):
        initial.append(jax.tree.map(np.asarray, init_state(*arguments).params))
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "init_state", record)
        cli.main(command(tmp_path / "run", **fields(jpegs, init__source=finished)))
    assert f"initialised from {finished}/checkpoints/{STEPS}\n" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, initial[0], pretrained.load_model(finished).params)


def test_imported_weights_in_a_bucket_are_read_with_their_metadata(bucket):
    golden = pathlib.Path(__file__).parents[1] / "golden" / "weights" / "huggingface"
    for file in golden.iterdir():
        files.write(paths.parse(f"{bucket}/weights/{file.name}"), file.read_bytes())
    for source in (f"{bucket}/weights", f"{bucket}/weights/model.safetensors"):
        loaded = pretrained.load_model(source)
        assert loaded.classes == ("ant", "bee", "cat", "dog", "eel")
        assert loaded.cfg.augment.mean == (0.4, 0.5, 0.6)
        here = pretrained.load_model(golden)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, here.params)


def test_stages_in_a_bucket_start_from_each_other(bucket, monkeypatch):
    """Without training: run folders are passed on complete, with both slashes of gs://."""
    from vit_scale.training import stages

    calls = []
    monkeypatch.setattr(stages, "train", lambda cfg, run, *_: calls.append((run, cfg.init.source)))
    stages.train_stages("quickstart", [], f"{bucket}/quick", quiet=True)
    folders = [str(run) for run, _ in calls]
    assert folders[:2] == [f"{bucket}/quick/pretrain", f"{bucket}/quick/scratch-32"]
    assert calls[2][1] == f"{bucket}/quick/pretrain"


def metadata() -> dict:
    return {"name": "x", "config": config.to_json(config.base())}


def test_a_second_process_on_this_machine_is_locked_out(bucket):
    with Run(f"{bucket}/locked", metadata()) as run:
        with pytest.raises(UserError, match=f"gs://bucket/locked is in use .* {os.getpid()};"):
            Run(run.path, metadata()).__enter__()
        assert read_json(run.path / "run.json") == metadata()
    with Run(f"{bucket}/locked", metadata()) as run:
        run.write_report({"step": 3})
        assert run.report == {"step": 3}


@pytest.fixture
def quick_lease(monkeypatch):
    monkeypatch.setattr(lock, "RENEW", 0.2)
    monkeypatch.setattr(lock, "LEASE", 2.0)


def write_lock(run: pathlib.Path, **holder) -> None:
    content = {
        "pid": os.getpid(),
        "host": "another",
        "boot": lock.boot_id(),
        "pids": lock.pid_namespace(),
    }
    (run / lock.NAME).write_bytes(json.dumps(content | holder).encode())


def test_another_machine_is_locked_out_while_the_lease_is_renewed(bucket, quick_lease, monkeypatch):
    run = paths.parse(f"{bucket}/leased")
    first = Lease(run)
    first.acquire()
    generation, content = compare_and_swap.read(run / lock.NAME)
    assert content["pid"] == os.getpid()
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "another")
    with pytest.raises(UserError, match=f"leased is in use by process {os.getpid()} on "):
        Lease(run).acquire()
    assert compare_and_swap.read(run / lock.NAME)[0] != generation  # it was renewed
    first.release()
    assert compare_and_swap.read(run / lock.NAME) == ("0", {})
    second = Lease(run)
    second.acquire()
    second.release()


@pytest.mark.parametrize(
    ("holder", "waits"),
    [
        ({"host": "another"}, True),
        ({"host": "this", "pid": 2**30}, False),
        ({"host": "this", "boot": "the one before"}, False),
        ({"host": "this"}, True),  # alive, but frozen too long to renew it
        ({"host": "this", "pid": 2**30, "pids": "of another container"}, True),
    ],
)
def test_the_lock_of_a_dead_process_is_taken_over(bucket, quick_lease, monkeypatch, holder, waits):
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "this")
    run = paths.parse(f"{bucket}/left")
    write_lock(run, **holder)
    began, this = time.monotonic(), Lease(run)
    this.acquire()
    assert (time.monotonic() - began >= lock.LEASE) == waits
    this.release()


def test_a_renewal_whose_response_is_lost_is_recognised_as_ours(bucket, quick_lease, monkeypatch):
    """gcsfs repeats the request, which is refused because the first one already took effect."""
    this, write, codes = Lease(paths.parse(f"{bucket}/repeated")), compare_and_swap.write, []
    monkeypatch.setattr(lock.os, "_exit", codes.append)

    def twice(target, data, generation):
        write(target, data, generation)
        return write(target, data, generation)

    monkeypatch.setattr(compare_and_swap, "write", twice)
    this.acquire()
    first = compare_and_swap.read(this.object)[0]
    while compare_and_swap.read(this.object)[0] == first:
        time.sleep(0.05)
    this.release()
    assert codes == [] and compare_and_swap.read(this.object) == ("0", {})


def test_only_one_of_two_writers_wins_the_compare_and_swap(bucket, quick_lease):
    target = paths.parse(f"{bucket}/raced") / lock.NAME
    assert compare_and_swap.write(target, b"{}", "0")
    assert compare_and_swap.write(target, b"{}", "0") is None
    generation, _ = compare_and_swap.read(target)
    assert compare_and_swap.write(target, b"{}", generation)
    assert compare_and_swap.write(target, b"{}", generation) is None
    compare_and_swap.remove(target, generation)  # an old generation: nothing happens
    assert target.exists()


def test_a_process_that_lost_its_lock_exits(bucket, quick_lease, monkeypatch, capsys):
    codes: list[int] = []
    this = Lease(paths.parse(f"{bucket}/stolen"))

    def leave(code):
        codes.append(code)
        this._ended.set()  # as the process would

    monkeypatch.setattr(lock.os, "_exit", leave)
    this.acquire()
    write_lock(this.run)
    this._thread.join(timeout=20)
    assert codes == [RESUMABLE]
    assert "lost the lock of gs://bucket/stolen: another process has" in capsys.readouterr().err


def test_an_unfinished_first_checkpoint_is_not_recovered(bucket):
    """In a bucket, an unfinished checkpoint already has its final name; Orbax removes it later."""
    run = paths.parse(f"{bucket}/first")
    save(run, {1: None})
    (run / checkpoint.FOLDER / "1" / checkpoint.COMMITTED).unlink()
    with checkpoint.Checkpoints(run) as checkpoints:
        assert checkpoints.recover(like(trees(0))) is None


def test_a_damaged_checkpoint_in_a_bucket_is_moved_aside(bucket, capsys):
    run = paths.parse(f"{bucket}/damaged")
    save(run, {1: None, 2: None}, keep=2)
    spoilt = {}
    for file in [f for f in walk(run / "checkpoints" / "2" / "params") if f.parent.name == "d"]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(bytes(content))
        spoilt[file.name] = bytes(content)
    with checkpoint.Checkpoints(run) as checkpoints:
        step, actual = checkpoints.recover(like(trees(0)))
    assert step == 1 and checkpoint.all_steps(run) == [1]
    same_trees(actual["params"], trees(1)["params"])
    aside = run / checkpoint.DAMAGED / "2"
    assert f"moved to {aside}" in capsys.readouterr().err
    moved = {f.name: f.read_bytes() for f in walk(aside / "params") if f.name in spoilt}
    assert moved == spoilt


def walk(folder: pathlib.Path):
    for name, is_folder in paths.entries(folder):
        if is_folder:
            yield from walk(folder / name)
        else:
            yield folder / name


# What a run reports


@pytest.fixture
def watched():
    cfg = config.base()
    cfg.data.batch, cfg.log.every, cfg.log.wandb, cfg.log.tensorboard = 10, 1, False, True
    return cfg


def shown(run: pathlib.Path) -> list[int]:
    return [
        event.step for event in events(run) for value in event.summary.value if "loss" in value.tag
    ]


def test_metrics_are_uploaded_before_each_checkpoint_and_at_the_end(bucket, watched):
    run = paths.parse(f"{bucket}/reported")
    with tracker(run, watched, steps=9) as track:
        track(1, loss(1))
        track(2, loss(2))
        assert not (run / "metrics.jsonl").exists()
        with track.timer("checkpoint"):
            assert losses(run) == [(1, 1), (2, 2)] and shown(run) == [1, 2]
        track(3, loss(3))
        track.scalars(3, {"eval/accuracy": 0.5})
        assert losses(run) == [(1, 1), (2, 2)]
    assert losses(run) == [(1, 1), (2, 2), (3, 3)] and shown(run) == [1, 2, 3]
    assert list(cache.local(run).rglob("*.jsonl")) == []
    with tracker(run, watched, steps=9, start=2) as track:
        track(3, loss(7))
    assert losses(run) == [(1, 1), (2, 2), (3, 7)]
    assert len(list((run / "tensorboard").iterdir())) == 2


def test_metrics_are_uploaded_at_least_every_minute(bucket, watched):
    run, now = paths.parse(f"{bucket}/slow"), [0.0]
    with tracker(run, watched, steps=9, clock=lambda: now[0]) as track:
        track.scalars(1, {"train/loss": 1})
        now[0] = 59.0
        track.scalars(2, {"train/loss": 1})
        assert not (run / "metrics.jsonl").exists()
        now[0] = 61.0
        track.scalars(3, {"train/loss": 1})
        assert [step for step, _ in losses(run)] == [1, 2, 3]


def test_another_machine_continues_the_metrics_in_the_bucket(bucket, watched):
    """Metrics from the bucket take precedence over stale ones on this machine's disk."""
    run = paths.parse(f"{bucket}/moved")
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "train/loss": 4}\n{"step": 2, "train/lo')
    stale = cache.local(run / "metrics.jsonl")
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text('{"step": 1, "train/loss": 5}\n{"step": 2, "train/loss": 5}\n')
    with tracker(run, watched, steps=9, start=2) as track:
        track(3, loss(7))
    assert losses(run) == [(1, 4), (3, 7)]


def test_weights_and_biases_writes_to_the_local_disk(bucket, watched):
    """What is offline is copied to the bucket, where it outlives this machine."""
    run, watched.log.wandb = paths.parse(f"{bucket}/wandb"), True
    ids = set()
    for start in (0, 1):
        with tracker(run, watched, start=start) as track:
            track(start + 1, loss(1))
        time.sleep(1)  # W&B names an offline folder by the second
        ids.add((run / "wandb_id.txt").read_text().strip())
    (number,) = ids
    files = [*(cache.local(run) / "wandb").glob(f"offline-run-*-{number}/**/*.wandb")]
    assert len(files) == 2
    for file in files:
        copy = run / file.relative_to(cache.local(run))
        assert copy.read_bytes() == file.read_bytes() != b""
    assert [name for name, _ in paths.entries(run)] == [
        "metrics.jsonl",
        "tensorboard",
        "wandb",
        "wandb_id.txt",
    ]


# Refusals


@pytest.fixture
def new_process():
    """Forget all file systems and buckets, as in a new process."""
    file_system.cache_clear(), check_bucket.cache_clear()
    yield
    file_system.cache_clear(), check_bucket.cache_clear()


def refusal(capsys, *arguments, codes=(1, 2)) -> str:
    assert cli.main([*map(str, arguments)]) in codes
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "gs://no-such-bucket/run",
            "bucket gs://no-such-bucket does not exist: create it, or correct the name",
        ),
        (
            "gs://bucket/no-run",
            "gs://bucket/no-run is not a run folder, a checkpoint",
        ),
        ("gs:///run", "gs:///run has no bucket name"),
        ("s3://bucket/run", "s3://bucket/run: s3:// is not supported; give a path, or gs://"),
    ],
)
def test_a_wrong_address_is_a_one_line_error(bucket, capsys, address, message):
    assert message in refusal(capsys, "eval", address)
    assert message.split("; ")[0].split(" is ")[0] in refusal(capsys, "show", address)


def test_a_missing_object_is_a_one_line_error(bucket, finished, capsys):
    line = refusal(capsys, "predict", finished, f"{bucket}/none.jpg")
    assert line == f"vit-scale: cannot read image {bucket}/none.jpg: no such object"
    line = refusal(capsys, "data", "download", "cifar10", "--out", f"{bucket}/data")
    assert "--out gs://bucket/data" in line


def test_a_missing_package_is_named_with_the_command_to_install_it(bucket, tmp_path, run_cli):
    (tmp_path / "gcsfs.py").write_text("raise ImportError")
    search = os.pathsep.join([str(tmp_path), *sys.path])
    result = run_cli("show", f"{bucket}/run", env={"PYTHONPATH": search})
    expected = "vit-scale: gs://bucket needs the package gcsfs: launch/environment.sh gs "
    expected += "in a clone, or pip install gcsfs\n"
    assert (result.returncode, result.stderr) == (1, expected)


def test_a_storage_error_midway_is_a_one_line_error(monkeypatch, capsys):
    from gcsfs.retry import HttpError

    from vit_scale.runs import report

    def refuse(runs):
        raise HttpError({"code": 503, "message": "backend\nerror"})

    monkeypatch.setattr(report, "rows", refuse)
    line = refusal(capsys, "show", "run", codes=(RESUMABLE,))
    assert line == "vit-scale: storage: backend error, 503"


def test_an_address_leads_to_no_file_outside_of_the_cache(bucket):
    for address in ("gs://bucket/../../run", "gs://../run", "gs://bucket/a/../../../run"):
        with pytest.raises(UserError, match=r"can't be cached: \.\. leads to another folder"):
            cache.local(ObjectPath(address))


def test_a_bucket_that_can_t_be_reached_is_resumable(new_process, monkeypatch, capsys):
    """At the start of training, and after all of gcsfs's own tries."""
    import asyncio

    pause = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *rest: pause(0, *rest))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    arguments = ("train", "--config", "quickstart", "--workdir", "gs://bucket/lost")
    line = refusal(capsys, *arguments, codes=(RESUMABLE,))
    assert line.startswith("vit-scale: cannot read gs://bucket: ")


@pytest.mark.parametrize(
    ("code", "message", "exit_code"),
    [
        (401, "no credentials: run `gcloud auth", FAILED),
        (403, "Forb", FAILED),
        (503, "caller may not, 503", RESUMABLE),
    ],
)
def test_a_refused_bucket_is_a_one_line_error(
    new_process, monkeypatch, capsys, code, message, exit_code
):
    """Without credentials, without permission, and while it is down."""
    import asyncio

    import fsspec

    pause = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *rest: pause(0, *rest))

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(
                json.dumps({"error": {"code": code, "message": "caller may not"}}).encode()
            )

        def log_message(self, *arguments): ...

    with http.server.ThreadingHTTPServer(("localhost", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{server.server_port}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        line = refusal(capsys, "eval", "gs://bucket/run", codes=(exit_code,))
        server.shutdown()
    assert line.startswith(f"vit-scale: cannot read gs://bucket: {message}")
    fsspec.get_filesystem_class("gcs").clear_instance_cache()


# Paths


def test_an_unfinished_checkpoint_is_not_listed(bucket):
    run = paths.parse(f"{bucket}/unfinished")
    for step in (2, 4):
        (run / "checkpoints" / str(step) / "description" / "metadata").write_bytes(b"{}")
    (run / "checkpoints" / "2" / "commit_success.txt").write_bytes(b"done")
    assert checkpoint.finished_steps(run) == [2]


def test_writes_of_other_processes_are_visible(bucket):
    import fsspec

    other = fsspec.filesystem("gcs", skip_instance_cache=True)
    folder = paths.parse(f"{bucket}/shared")
    for count, name in enumerate("abc", start=1):
        other.pipe_file(f"{folder}/{name}", b"12345"[:count])
        assert list(paths.sizes(folder).values()) == list(range(1, count + 1))
        assert (folder / name).is_file() and not (folder / name).is_dir() and folder.is_dir()


def test_a_folder_created_in_the_console_does_not_contain_itself(bucket):
    folder = paths.parse(f"{bucket}/made")
    file_system().pipe_file(f"{folder}/", b"")
    assert folder.is_dir() and paths.entries(folder) == []
    (folder / "sub" / "a.txt").write_bytes(b"a")
    (folder / "b.txt").write_bytes(b"bc")
    assert paths.entries(folder) == [("b.txt", False), ("sub", True)]
    assert list(folder.iterdir()) == [folder / "b.txt", folder / "sub"]


def test_a_changed_object_is_copied_again(bucket):
    file = paths.parse(f"{bucket}/staged/a.bin")
    for content in (b"one", b"two"):
        file.write_bytes(content)
        (copy,) = cache.stage([file])
        assert copy.read_bytes() == content


def test_paths_in_a_bucket_are_absolute_and_picklable(bucket):
    run = paths.parse(f"{bucket}/run")
    assert str(run.absolute() / "a") == f"{bucket}/run/a" == str(run.resolve() / "a")
    copied = pickle.loads(pickle.dumps(run / "a"))
    assert paths.in_bucket(copied) and copied == run / "a" and copied.parent == run


def test_a_path_on_a_disk_is_a_pathlib_path(tmp_path):
    assert type(paths.parse("runs/x")) is type(pathlib.Path("runs/x"))
    assert paths.parse(tmp_path) == tmp_path and cache.local(tmp_path) is tmp_path
    assert cache.stage([tmp_path / "a"]) == [tmp_path / "a"]


def test_a_run_in_a_bucket_gets_more_steps(bucket):
    fields = ("optim.schedule=constant", "optim.cooldown=2")
    run, params = paths.parse(f"{bucket}/extended"), random_params(tiny_model())
    for step in (8, 10):
        write_run(run, tiny_config(*fields), params, step=step)
    write_json(run / "report.json", {"step": 10})
    description = read_json(run / "run.json")
    description["config"]["steps"] = 20
    extend(run, description)
    assert checkpoint.finished_steps(run) == [8]
    assert read_json(run / "run.json")["config"]["steps"] == 20
    assert not (run / "report.json").exists()
    archive = run / "extended" / "10"
    assert checkpoint.finished_steps(archive) == [10]
    assert read_json(archive / "report.json") == {"step": 10}
    assert pretrained.load_model(str(archive)).step == 10


def test_a_sweep_in_a_bucket_is_compared(bucket, monkeypatch):
    """Its runs were trained elsewhere."""
    fields = ("steps=2", "optim.warmup=0", "data.train=train[:98%]", "eval.split=train[98%:]")
    points = [{"optim.lr": "1e-3"}, {"optim.lr": "1e-2"}]
    one = sweep.Sweep("vit_imagenet:S/16", fields, points, paths.parse(f"{bucket}/sweep"))
    for point, accuracy in zip(points, (0.3, 0.4), strict=True):
        run = one.run_folder(point)
        write_json(run / "report.json", {"eval": {"split": "val", "accuracy": 0.5, "n": 9}})
        row = {"step": 2, "eval/accuracy": accuracy, "eval/n": 7}
        files.write(run / "metrics.jsonl", json.dumps(row).encode())
    result = sweep.run_sweep(one, quiet=True)
    assert result["best"] == "optim.lr=1e-2" and read_json(one.folder / "sweep.json") == result
    assert sweep.write_picture(one, result) == f"{bucket}/sweep/sweep.png"
    assert (one.folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert sweep.describe_best(one, result)[1] == "on val: accuracy 50.00 %, n 9"

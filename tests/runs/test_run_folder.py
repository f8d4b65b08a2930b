"""run: one live writer, one config, whole files or none."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vit_scale import config
from vit_scale.checkpoint import Checkpoints
from vit_scale.distributed import multihost
from vit_scale.errors import UserError
from vit_scale.runs import lock
from vit_scale.runs.lock import Lock
from vit_scale.runs.run_folder import Run, continued, read_json, write_json
from vit_scale.storage import cache, compare_and_swap, paths


def about(*overrides: str) -> dict:
    return {"name": "x", "config": config.to_json(config.override(config.base(), overrides))}


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def enter(folder, *overrides: str):
    def call():
        with Run(folder, about(*overrides)):
            pass

    return call


def test_a_run_describes_itself_before_and_after(tmp_path):
    folder = tmp_path / "runs" / "x"
    with Run(folder, about()) as run:
        assert read_json(folder / "run.json") == about()
        assert run.report is None
        run.write_report({"step": 3})
        assert run.report == {"step": 3}
    with Run(str(folder), about()) as again:
        assert again.report == {"step": 3}


HOLDER = """
import json, sys, time
from vit_scale.runs.run_folder import Run
with Run(sys.argv[1], json.loads(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_live_process_keeps_others_out_until_it_dies(tmp_path):
    """By SIGKILL: nothing of its own could clean up."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), json.dumps(about())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = refusal(enter(tmp_path))
        assert f"workdir {tmp_path} is in use by the live process {holder.pid}; " in message
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with Run(tmp_path, about()):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.fixture
def locks(monkeypatch):
    """Gives a function: both kinds of the kernel's locks fail with these errors; the calls."""

    def fail(flock: int, lockf: int) -> list[str]:
        calls: list[str] = []

        def refuse(name, number):
            def lock(file, operation):
                calls.append(name)
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(fcntl, name, lock)

        refuse("flock", flock)
        if lockf:
            refuse("lockf", lockf)
        return calls

    return fail


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, locks, capsys, number):
    """Lustre, some NFS: nobody else is there."""
    calls = locks(number, number)
    with Run(tmp_path, about()) as run:
        assert run.report is None
    said = capsys.readouterr().err
    assert said == (
        f"vit-scale: {tmp_path} can't be locked on this file system ({os.strerror(number)}); "
        "training goes on: see to it that no other process trains in it\n"
    )
    assert calls == ["flock", "lockf"]


def test_where_flock_is_missing_posix_locks_keep_others_out(tmp_path, locks, capsys):
    locks(errno.ENOSYS, 0)
    program = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "f.write('77\\n'); f.flush(); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert "is in use by the live process 77;" in refusal(enter(tmp_path))
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    enter(tmp_path)()
    assert capsys.readouterr().err == "", "it is locked: nothing to say"


def test_a_disk_that_fails_is_not_another_process(tmp_path, locks):
    locks(errno.EIO, 0)
    line = refusal(enter(tmp_path))
    assert "cannot lock workdir" in line and "Input/output error" in line and "in use" not in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError, UserError("x")])
@pytest.mark.parametrize("where", ["_claim", "_read_report", "check_shared", "agree"])
def test_whatever_ends_the_opening_releases_the_lock(tmp_path, monkeypatch, where, error):
    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Run if where.startswith("_") else multihost, where, fail)
        opened = Run(tmp_path, about())
        with pytest.raises(type(error) if isinstance(error, UserError) else error):
            opened.__enter__()
    enter(tmp_path)()  # by this process, while what failed is still there


class Objects:
    """generations, of one bucket in memory; `lost`: the first write does it, and raises."""

    def __init__(self, lost: BaseException | None):
        self.lost, self.there = lost, {}

    def read(self, place):
        number, data = self.there.get(str(place), ("0", b"{}"))
        return number, json.loads(data)

    def write(self, place, data, generation):
        if self.read(place)[0] != generation:
            return None
        self.there[str(place)] = (str(int(generation) + 1), data)
        if self.lost:
            raise self.lost
        return str(int(generation) + 1)

    def remove(self, place, generation):
        if self.read(place)[0] == generation:
            del self.there[str(place)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("session is closed")])
def test_a_buckets_lock_is_released_whatever_ends_its_holder(tmp_path, monkeypatch, error):
    """Also where the object was written, and its answer never came."""
    objects = Objects(error)
    for name in ("read", "write", "remove"):
        monkeypatch.setattr(compare_and_swap, name, getattr(objects, name))
    monkeypatch.setattr(paths, "in_bucket", lambda place: True)
    monkeypatch.setattr(cache, "local", lambda place: tmp_path / "local")
    this = Lock(tmp_path)
    with pytest.raises(type(error)):
        this.acquire()
    assert objects.there == {}
    objects.lost = None
    this.acquire()
    assert list(objects.there) == [str(tmp_path / ".lock")]
    with pytest.raises(UserError, match="in use by the live process"):
        Lock(tmp_path).acquire()
    assert list(objects.there) == [str(tmp_path / ".lock")], "it is not the other's to remove"
    this.release()
    assert objects.there == {}


def test_a_lease_is_renewed_whatever_a_renewal_raises(tmp_path, monkeypatch):
    objects, codes = Objects(None), []
    for name in ("read", "write", "remove"):
        monkeypatch.setattr(compare_and_swap, name, getattr(objects, name))
    monkeypatch.setattr(lock, "RENEW", 0.01)
    monkeypatch.setattr(lock.os, "_exit", codes.append)
    this = lock.Lease(tmp_path)
    this.acquire()
    objects.lost = RuntimeError("session is closed")
    while objects.read(this.object)[0] == "1":
        time.sleep(0.01)
    assert this._thread.is_alive()
    objects.lost = None
    seen = objects.read(this.object)[0]
    while objects.read(this.object)[0] == seen:
        time.sleep(0.01)
    this.release()
    assert codes == [] and objects.there == {}


def test_another_config_is_refused_with_the_differences(tmp_path):
    enter(tmp_path)()
    with pytest.raises(UserError) as caught:
        enter(tmp_path, "optim.lr=0.5", "model.depth=3")()
    message = str(caught.value)
    assert "model.depth: None -> 3; optim.lr: 0.001 -> 0.5" in message
    assert "give another --workdir" in message
    assert read_json(tmp_path / "run.json") == about(), "it is what it was"
    enter(tmp_path)()  # free again, though `caught` keeps the refused run alive


@pytest.mark.parametrize(
    "override",
    [
        "log.every=3",
        "checkpoint.keep=4",
        "data.workers=0",
        "data.path=elsewhere",
        "data.memory=True",
        "data.on_corrupt=skip",
        "eval.batch=7",
        "mesh.fsdp=2",
    ],
)
def test_how_a_run_is_watched_may_change(tmp_path, override):
    enter(tmp_path)()
    enter(tmp_path, override)()
    assert read_json(tmp_path / "run.json") == about(), "written once"


@pytest.mark.parametrize(
    "override", ["seed=1", "steps=2000", "data.batch=64", "eval.split=train[98%:]", "optim.ema=0.9"]
)
def test_what_a_run_computes_may_not_change(tmp_path, override):
    enter(tmp_path)()
    assert override.partition("=")[0] in refusal(enter(tmp_path, override))


def test_where_a_run_started_from_may_change_once_it_is_not_read_any_more(tmp_path):
    enter(tmp_path, "init.source=runs/old")()
    moved = enter(tmp_path, "init.source=gs://bucket/new")
    assert "(init.source: runs/old -> gs://bucket/new); " in refusal(moved)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)  # one that was never finished
    assert "(init.source: runs/old -> gs://bucket/new); " in refusal(moved)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {"params": {"x": np.ones(2)}, "ema": None, "opt_state": None}, about())
    moved()
    enter(tmp_path)()
    assert "(init.head: auto -> new); " in refusal(enter(tmp_path, "init.head=new"))
    assert read_json(tmp_path / "run.json") == about("init.source=runs/old"), "written once"


def paths_of(source: str, cwd: str | None = None) -> dict:
    found = about(f"init.source={source}")
    return found if cwd is None else {**found, "cwd": cwd}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """PROJECT/runs/pre and PROJECT/runs/fine; the process is in another folder."""
    (tmp_path / "project" / "runs" / "pre").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


@pytest.mark.parametrize("cwd", ["", "project", "gone"])
def test_a_recorded_path_is_found_from_any_folder(project, monkeypatch, cwd):
    """Where the run began, or around the run: an older one doesn't say where it began."""
    run, cwd = project / "runs" / "fine", cwd and str(project.parent / cwd)
    assert paths.resolve("runs/pre", run, cwd) == str(project / "runs/pre")
    assert paths.resolve("runs/none", run, cwd) == "runs/none"
    for name in ("", "gs://bucket/pre", "https://a.b/c.npz", str(project / "runs/pre")):
        assert paths.resolve(name, run, cwd) == name
    monkeypatch.chdir(project)
    assert paths.resolve("runs/pre", run, cwd) == "runs/pre", "as it was typed, where it is right"


def test_where_a_run_began_counts_more_than_what_is_here(project, tmp_path):
    (tmp_path / "elsewhere" / "runs" / "pre").mkdir(parents=True)
    far = tmp_path / "disk" / "fine"
    assert paths.resolve("runs/pre", far, str(project)) == str(project / "runs/pre")
    assert paths.resolve("runs/pre", far) == "runs/pre", "nothing is known of it: it is here"


@pytest.mark.parametrize("cwd", [None, "project"])
def test_resuming_from_another_folder_is_the_same_run(project, cwd):
    """Before its first checkpoint, when its source still counts: however that is written."""
    run, began = project / "runs" / "fine", cwd and str(project)
    with Run(run, paths_of("runs/pre", began)):
        pass
    with Run(run, paths_of(str(project / "runs" / "pre"))):
        pass
    (project / "runs" / "other").mkdir()
    line = refusal(lambda: Run(run, paths_of(str(project / "runs" / "other"))).__enter__())
    assert "another config (init.source: runs/pre -> " in line


@pytest.mark.parametrize("field", ["init.source", "distill.teacher"])
def test_a_path_that_was_typed_elsewhere_is_found_again(project, monkeypatch, field):
    """The same command, from another folder."""
    run, given = project / "runs" / "fine", about(f"{field}=runs/pre")
    with Run(run, {**given, "cwd": str(project)}):
        pass
    cfg = continued(config.from_json(given["config"]), run)
    assert config.fields(cfg)[field] == str(project / "runs" / "pre")
    other = continued(config.override(config.base(), [f"{field}=runs/else"]), run)
    assert config.fields(other)[field] == "runs/else", "another path is another path"
    monkeypatch.chdir(project)
    cfg = continued(config.from_json(given["config"]), run)
    assert config.fields(cfg)[field] == "runs/pre"


def test_a_run_of_before_a_field_was_removed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(config.REMOVED, "model.fused", "all kernels are apart")
    old = about("optim.lr=0.5")
    old["config"]["model"]["fused"] = True
    write_json(tmp_path / "run.json", old)
    enter(tmp_path, "optim.lr=0.5")()
    assert "of another config (optim.lr: 0.5 -> 0.001); " in refusal(enter(tmp_path))
    assert read_json(tmp_path / "run.json") == old


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '"x"', "\0", "{}", '{"config": 3}', '{"config": {"steps": "x"}}']
)
def test_a_damaged_description_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    refusal(enter(tmp_path))
    assert (tmp_path / "run.json").read_text() == content, "left as it was found"


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(enter(tmp_path / "file" / "run"))
    assert f"cannot write to workdir {tmp_path}/file/run: Not a directory" in message


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_json(file, {"ä": [1, None]})
    assert json.loads(file.read_text()) == read_json(file) == {"ä": [1, None]}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = refusal(lambda: write_json(file, {"b": 2}))
    assert message == f"cannot write {file}: No space left on device; free space, then rerun"
    assert read_json(file) == {"ä": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_missing_file_says_what_the_folder_is_not(tmp_path):
    message = refusal(lambda: read_json(tmp_path / "run.json"))
    assert message == f"{tmp_path}/run.json is missing: {tmp_path} is not the folder of a run"


# Data that changed

SET = {"name": "set train", "images": 16, "classes": 2, "fingerprint": "0f"}
PART = SET | {"name": "set train[:75%]", "images": 12, "of": 16, "slices": "example"}


def of_data(train: dict, *overrides: str, classes=("down", "up"), **others: dict) -> dict:
    data = {**train, "sets": {"train": train, **others}}
    return {**about(*overrides), "classes": list(classes), "data": data}


def begin(folder, description: dict):
    def call():
        with Run(folder, description):
            pass

    return call


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("above", "down"), "without 'up', with 'above', class 0 was 'down', is 'above'"),
        (("up", "down"), "class 0 was 'down', is 'up'"),
        (("down", "up", "zebra"), "with 'zebra', 2 -> 3 classes"),
        (("down",), "without 'up', 2 -> 1 classes"),
    ],
)
def test_other_classes_are_refused_whatever_is_accepted(tmp_path, classes, said):
    begin(tmp_path, of_data(SET))()
    changed = of_data(SET, "data.changed=True", classes=classes)
    assert f"holds a run of other classes ({said}); give" in refusal(begin(tmp_path, changed))


CHANGES = {
    "train: set train is of 16 -> 18 images, 2 more": {"images": 18, "fingerprint": "1f"},
    "train: set train is of 16 -> 9 images, 7 fewer": {"images": 9, "fingerprint": "1f"},
    "train: set train has as many images, 16, but other paths or labels": {"fingerprint": "1f"},
}


@pytest.mark.parametrize("said", CHANGES)
def test_images_added_or_removed_are_refused_and_can_be_accepted(tmp_path, said, capsys):
    begin(tmp_path, of_data(SET))()
    now = SET | CHANGES[said]
    message = refusal(begin(tmp_path, of_data(now)))
    assert f"holds a run of other data ({said}); give another --workdir" in message
    assert "--config.data.changed=True" in message and capsys.readouterr().err == ""
    begin(tmp_path, of_data(now, "data.changed=True"))()
    assert capsys.readouterr().err == f"vit-scale: data.changed: since this run began, {said}\n"
    begin(tmp_path, of_data(SET))()
    assert capsys.readouterr().err == "", "what it began with needs no word"


def test_every_set_of_a_run_is_compared(tmp_path):
    final = SET | {"name": "set val"}
    begin(tmp_path, of_data(PART, final=final))()
    now = of_data(PART | {"fingerprint": "2f", "of": 17}, final=final | {"images": 15})
    message = refusal(begin(tmp_path, now))
    assert "(train: set train[:75%] is of 16 -> 17 images, 1 more; final: set val is of" in message
    begin(tmp_path, of_data(PART | {"of": 17}, final=final))(), "added where nothing is read"


def test_another_cut_is_refused_whatever_is_accepted(tmp_path):
    begin(tmp_path, of_data(PART | {"slices": "position", "fingerprint": None}))()
    message = refusal(begin(tmp_path, of_data(PART, "data.changed=True")))
    assert "another cut (train: set train[:75%] by example, was by position)" in message


def test_a_run_of_before_is_compared_by_what_it_has(tmp_path):
    old = {"name": "set train", "images": 12, "classes": 2}
    before = {**about(), "classes": ["down", "up"], "data": old}
    write_json(tmp_path / "run.json", before)
    begin(tmp_path, of_data(PART))()
    more = PART | {"images": 13}
    assert "12 -> 13 images, 1 more" in refusal(begin(tmp_path, of_data(more)))
    assert "other classes" in refusal(begin(tmp_path, of_data(PART, classes=("a", "b"))))

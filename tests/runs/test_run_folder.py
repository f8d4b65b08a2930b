"""run_folder and lock: one live writer, however the last one ended."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vit_scale import config
from vit_scale.distributed import multihost
from vit_scale.errors import UserError
from vit_scale.runs import lock
from vit_scale.runs.json_files import read_json
from vit_scale.runs.lock import Lock
from vit_scale.runs.run_folder import Run
from vit_scale.storage import cache, compare_and_swap, paths


def metadata(*overrides: str) -> dict:
    return {"name": "x", "config": config.to_json(config.override(config.base(), overrides))}


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def enter(folder, *overrides: str):
    def call():
        with Run(folder, metadata(*overrides)):
            pass

    return call


def test_a_run_stores_its_description_and_report(tmp_path):
    folder = tmp_path / "runs" / "x"
    with Run(folder, metadata()) as run:
        assert read_json(folder / "run.json") == metadata()
        assert run.report is None
        run.write_report({"step": 3})
        assert run.report == {"step": 3}
    with Run(str(folder), metadata()) as again:
        assert again.report == {"step": 3}


HOLDER = """
import json, sys, time
from vit_scale.runs.run_folder import Run
with Run(sys.argv[1], json.loads(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_live_process_locks_others_out_until_it_dies(tmp_path):
    """Even by SIGKILL, which allows no cleanup."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), json.dumps(metadata())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = refusal(enter(tmp_path))
        assert f"workdir {tmp_path} is in use by process {holder.pid}; " in message
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with Run(tmp_path, metadata()):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.fixture
def locks(monkeypatch):
    """A function that makes flock and lockf fail with these errors, and returns the calls."""

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
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, locks, capsys, number):
    """As on Lustre and some NFS mounts."""
    calls = locks(number, number)
    with Run(tmp_path, metadata()) as run:
        assert run.report is None
    output = capsys.readouterr().err
    assert output == (
        f"vit-scale: cannot lock {tmp_path} on this file system ({os.strerror(number)}); "
        "training continues: make sure that no other process uses this workdir\n"
    )
    assert calls == ["flock", "lockf"]


def test_posix_locks_are_used_if_flock_is_missing(tmp_path, locks, capsys):
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
        assert "is in use by process 77;" in refusal(enter(tmp_path))
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    enter(tmp_path)()
    assert capsys.readouterr().err == "", "it is locked, so no warning"


def test_a_disk_error_is_not_reported_as_in_use(tmp_path, locks):
    locks(errno.EIO, 0)
    line = refusal(enter(tmp_path))
    assert f"cannot lock workdir {tmp_path}: Input/output error" in line and "in use" not in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError, UserError("x")])
@pytest.mark.parametrize("where", ["_claim", "_read_report", "check_shared", "broadcast"])
def test_any_error_while_opening_releases_the_lock(tmp_path, monkeypatch, where, error):
    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Run if where.startswith("_") else multihost, where, fail)
        opened = Run(tmp_path, metadata())
        with pytest.raises(type(error) if isinstance(error, UserError) else error):
            opened.__enter__()
    enter(tmp_path)()  # in this process, while `opened` is still alive


class Objects:
    """A bucket in memory; with `lost`, the first write succeeds and raises."""

    def __init__(self, lost: BaseException | None):
        self.lost, self.contents = lost, {}

    def read(self, target):
        number, data = self.contents.get(str(target), ("0", b"{}"))
        return number, json.loads(data)

    def write(self, target, data, generation):
        if self.read(target)[0] != generation:
            return None
        self.contents[str(target)] = (str(int(generation) + 1), data)
        if self.lost:
            raise self.lost
        return str(int(generation) + 1)

    def remove(self, target, generation):
        if self.read(target)[0] == generation:
            del self.contents[str(target)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("session is closed")])
def test_a_bucket_lock_is_released_on_any_error(tmp_path, monkeypatch, error):
    """Even if the object was written and only the response was lost."""
    objects = Objects(error)
    for name in ("read", "write", "remove"):
        monkeypatch.setattr(compare_and_swap, name, getattr(objects, name))
    monkeypatch.setattr(paths, "in_bucket", lambda target: True)
    monkeypatch.setattr(cache, "local", lambda target: tmp_path / "local")
    this = Lock(tmp_path)
    with pytest.raises(type(error)):
        this.acquire()
    assert objects.contents == {}
    objects.lost = None
    this.acquire()
    assert list(objects.contents) == [str(tmp_path / ".lock")]
    with pytest.raises(UserError, match="in use by process"):
        Lock(tmp_path).acquire()
    assert list(objects.contents) == [str(tmp_path / ".lock")], "only its holder removes it"
    this.release()
    assert objects.contents == {}


def test_a_lease_is_renewed_after_any_error(tmp_path, monkeypatch):
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
    generation = objects.read(this.object)[0]
    while objects.read(this.object)[0] == generation:
        time.sleep(0.01)
    this.release()
    assert codes == [] and objects.contents == {}


def test_a_workdir_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(enter(tmp_path / "file" / "run"))
    assert f"cannot write to workdir {tmp_path}/file/run: Not a directory" in message

"""A worker's log in its run's bucket: complete, bounded, without secrets, also after a kill."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from launch.tpu.secret import encode, redactable
from tests.helpers.fake_cloud import ROOT
from vit_scale.errors import UserError
from vit_scale.storage import log_upload, paths
from vit_scale.storage.log_upload import LogUpload

SECRET = """k"ey'\\7"""
AWKWARD = """it's "p\\a" ünï $x"""  # as in tests/launch/test_parts.py


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name, _ in paths.entries(folder)}


def test_parts_are_bounded_and_end_with_a_line(bucket, tmp_path, monkeypatch):
    """The newest parts remain; a line that is not complete waits for its end."""
    monkeypatch.setattr(log_upload, "PART", 100)
    monkeypatch.setattr(log_upload, "KEEP", 3)
    target, log = paths.parse(f"{bucket}/parts"), tmp_path / "train.log"
    log.write_text("begin")
    upload = LogUpload(log, target, "host")
    upload.save()
    assert not target.exists()
    lines = "".join(f"line {number:02}\n" for number in range(60))
    with log.open("a") as stream:
        stream.write("\n" + lines + "no end")
    upload.save()
    upload.save(last=True)
    parts = contents(target)
    assert list(parts) == ["host.002.log", "host.003.log", "host.004.log", "host.005.log"]
    whole = f"begin\n{lines}no end".encode()
    assert whole.endswith(b"".join(parts.values())) and max(map(len, parts.values())) <= 100
    assert all(part.endswith(b"\n") for part in list(parts.values())[:-1])


def test_a_bucket_that_does_not_answer_is_asked_again(bucket, tmp_path, monkeypatch):
    """When it is opened, and at the end, whose lines explain a failure."""
    workdir, log = f"{bucket}/asked-again", tmp_path / "train.log"
    log.write_text("why it failed\n")
    (tmp_path / "rc").write_text("1")
    parse, write, failures = paths.parse, log_upload.files.write, [UserError("no"), OSError("no")]

    def failing(real):
        def call(*arguments):
            if failures:
                raise failures.pop(0)
            return real(*arguments)

        return call

    monkeypatch.setattr(log_upload.paths, "parse", failing(parse))
    monkeypatch.setattr(log_upload.files, "write", failing(write))
    monkeypatch.setattr(log_upload, "RETRY", 0)
    log_upload.main(str(log), ["train", "--workdir", workdir])
    assert failures == []
    assert list(contents(parse(workdir) / "logs" / "a1").values()) == [b"why it failed\n"]


def test_secrets_are_redacted_however_they_are_quoted(tmp_path):
    """By JSON, Python and a shell, also one within another; a log keeps its length in bytes."""
    shell = shlex.quote(f"--key={AWKWARD}")
    texts = [AWKWARD, json.dumps(AWKWARD), json.dumps(AWKWARD, ensure_ascii=False), repr(AWKWARD)]
    texts += [ascii(AWKWARD), repr(ValueError(f"no {AWKWARD}")), shell]
    texts += [json.dumps({"argv": [shell]}), "not \udcff\U0001f600UTF-8"]
    lines = [*texts, *map(json.dumps, texts), *map(repr, texts), *map(ascii, texts)]
    log = tmp_path / "train.log"
    log.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    (tmp_path / "logs").mkdir()
    secrets = {"a": AWKWARD[:8], "b": AWKWARD, "c": "\udcff\U0001f600UTF-8"}
    LogUpload(log, tmp_path / "logs", "host", "|".join(redactable(secrets))).save(last=True)
    shown = (tmp_path / "logs" / "host.000.log").read_bytes()
    assert len(shown) == log.stat().st_size
    for line, redacted in zip(lines, shown.splitlines(), strict=True):
        assert b"***" in redacted, line
        assert not re.search(rb"p.*a|n.*x|\$|UTF", redacted), (line, redacted)


@pytest.fixture
def worker(tmp_path):
    """Start launch/agent.sh's verbs on a worker whose trainer is a script."""
    home = tmp_path / "home"
    venv, code = home / "venv" / "bin", home / "code" / "c0de"
    venv.mkdir(parents=True)
    code.mkdir(parents=True)
    (code / "vit_scale").symlink_to(ROOT / "vit_scale")
    python = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    for name, text in {"python": python, "vit-scale": ""}.items():
        (venv / name).write_text(text)
        (venv / name).chmod(0o755)
    shutil.copy(ROOT / "launch" / "agent.sh", home / "agent.sh")

    def call(*words: str, stdin: str = "") -> str:
        environment = {**os.environ, "VIT_SCALE_HOME": str(home), "VIT_SCALE_DEVICES": "/none"}
        command = ["bash", str(home / "agent.sh"), *words]
        done = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.trainer = venv / "vit-scale"
    yield call
    call("stop", "run", "1", "0")


def test_a_killed_trainers_log_is_in_the_bucket_before_the_attempt_has_ended(bucket, worker):
    """Secrets that it printed are not, however they are quoted."""
    script = f"#!/bin/bash\ncat <<'X'\nfirst {SECRET}\n{SECRET!r}\nX\n"
    script += 'echo "pattern ${VIT_SCALE_REDACT-absent}"\nsleep 1\nkill -KILL $$\n'
    worker.trainer.write_text(script)
    worker("secrets", "run", stdin=encode({"KEY": SECRET}).decode())
    worker("start", "run", "1", "c0de", "1", "train", "--workdir", f"{bucket}/run", "--process=3")
    until = time.monotonic() + 60
    while '"running"' in (status := worker("status", "run", "1")):
        assert time.monotonic() < until
    assert '"state": "ended", "code": 137' in status
    ((name, text),) = contents(paths.parse(f"{bucket}/run/logs/a1")).items()
    assert name.endswith("-3.000.log") and text.startswith(b"first ******")
    assert b"ey" not in text and b"pattern absent" in text

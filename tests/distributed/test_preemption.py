"""preemption: SIGTERM in processes of their own. tests/helpers/soak.py trains under it."""

import signal
import subprocess
import sys
import threading
import time

from vit_scale.distributed import preemption
from vit_scale.errors import RESUMABLE, UserError

BEGIN = """
import hashlib, os, signal, sys
from vit_scale import cli
from vit_scale.cli import commands
from vit_scale.distributed import preemption
from vit_scale.errors import UserError
def ready():
    print("ready", flush=True)
def verb(args, overrides):
    preemption.install()
"""
END = """
commands.show = verb
sys.exit(cli.main(["show"]))
"""
RERUN = "rerun the same command to resume"
# Python runs signal handlers between bytecode instructions: not in here, for a minute.
BUSY = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)'


def ended(body: str, signals: int, between: float = 0.5) -> tuple[int, str, str]:
    """Exit code, output and errors of a verb that received this many SIGTERMs once ready."""
    script = BEGIN + "".join(f"    {line}\n" for line in body.splitlines()) + END
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(between)
    try:
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, out, errors


def test_before_training_it_ends_the_verb():
    code, _, errors = ended("ready()\nwhile True: pass", signals=1)
    assert code == RESUMABLE
    assert errors == f"vit-scale: stopped by SIGTERM before training began; {RERUN}\n"


def test_before_training_it_ends_the_process_whatever_catches_exceptions():
    body = """
for _ in range(100):
    try:
        ready()
        while True: pass
    except BaseException:
        print("swallowed", flush=True)
"""
    code, out, errors = ended(body, signals=1)
    assert (code, out) == (RESUMABLE, "") and errors.startswith("vit-scale: stopped by SIGTERM")


def test_in_training_it_waits_to_be_asked():
    body = """
with preemption.deferred():
    assert not preemption.requested()
    preemption.check("too early")
    ready()
    while not preemption.requested(): pass
    print("saving", flush=True)
    preemption.check("after step 7")
"""
    code, out, errors = ended(body, signals=1)
    assert (code, out) == (RESUMABLE, "saving\n")
    assert errors == f"vit-scale: stopped by SIGTERM after step 7; {RERUN}\n"


def test_a_second_one_ends_it_at_once_whatever_it_does():
    code, out, errors = ended(f"with preemption.deferred():\n    ready()\n    {BUSY}", signals=2)
    assert (code, out) == (RESUMABLE, "")
    assert errors == "vit-scale: second SIGTERM: exiting without saving\n"


STOPPED_WITH_ITS_PEERS = """
import jax.experimental.multihost_utils as utils
from vit_scale.distributed import multihost
multihost.has_peers = lambda: True
utils.reached_preemption_sync_point = lambda number: True
with preemption.deferred():
    assert preemption.requested()
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
    print("saved", flush=True)
    preemption.check("after step 7")
"""


def test_the_first_signal_may_reach_a_host_while_it_is_saving():
    """Its peers had theirs, and all stopped."""
    code, out, errors = ended(STOPPED_WITH_ITS_PEERS, signals=1)
    assert (code, out) == (RESUMABLE, "saved\n") and "stopped by SIGTERM after step 7" in errors
    code, out, errors = ended(STOPPED_WITH_ITS_PEERS, signals=2, between=0.2)
    assert (code, out) == (RESUMABLE, "") and "exiting without saving" in errors


def test_without_a_signal_nothing_happens():
    assert not preemption.requested()
    preemption.check("never")
    assert issubclass(preemption.Preempted, UserError)


def test_a_notebook_s_thread_takes_no_signals_over():
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=preemption.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before

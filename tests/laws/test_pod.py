"""launch/pod.py: hosts as processes, each a small script; tests/laws/test_mesh.py trains in it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Each host writes its arguments and its devices, then does what the test says for its number.
HOST = """
import os, pathlib, signal, subprocess, sys, time
number, folder = int(sys.argv[-1]), pathlib.Path(sys.argv[1])
devices = os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"]
(folder / f".host-{number}").write_text(repr((os.getpid(), sys.argv[2:], devices)))
(folder / f".host-{number}").rename(folder / f"host-{number}")  # complete as soon as it is listed
def say(text):
    print(text, flush=True)
def complain(text):
    print(text, file=sys.stderr, flush=True)
def all_started():
    while len(list(folder.glob("host-*"))) < int(sys.argv[-3]):
        time.sleep(0.01)
"""


def start(folder: pathlib.Path, script: str, hosts: int = 3) -> subprocess.Popen:
    (folder / "host.py").write_text(HOST + script)
    pod = [sys.executable, str(ROOT / "launch" / "pod.py"), f"--hosts={hosts}", "--devices=2"]
    return subprocess.Popen(
        [*pod, sys.executable, str(folder / "host.py"), str(folder), "--config", "a b"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, list[str], list[str]]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines()


def started(folder: pathlib.Path) -> list[tuple]:
    return [eval(file.read_text()) for file in sorted(folder.glob("host-*"))]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def all_gone(folder: pathlib.Path) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid, *_ in started(folder))


def test_each_host_gets_its_number_and_host_0_is_heard(tmp_path):
    noise = "say('[Gloo] Rank 1 is connected to 3 peer ranks.')"
    script = f"say(f'out {{number}}'); complain(f'err {{number}}'); {noise}"
    assert end(start(tmp_path, script)) == (0, ["out 0"], ["err 0"])
    hosts = started(tmp_path)
    ports = {arguments[3] for _, arguments, _ in hosts}
    assert len(ports) == 1 and ports.pop().startswith("localhost:")
    for number, (_, arguments, devices) in enumerate(hosts):
        assert arguments[:3] == ["--config", "a b", "--coordinator"]
        assert arguments[4:] == ["--processes", "3", "--process", str(number)]
        assert devices == ("cpu", "2")


def test_the_first_failure_is_shown_first_and_stops_all(tmp_path):
    script = """
all_started()
if number == 2:
    subprocess.Popen(["sleep", "3"])  # a worker that still holds its output
    say("step 7"); complain("vit-scale: image 3 is corrupt"); sys.exit(3)
while os.path.exists(f"/proc/{eval((folder / 'host-2').read_text())[0]}"):
    time.sleep(0.01)
time.sleep(0.5)
complain("Connection closed by peer")
time.sleep(600)
"""
    code, out, err = end(start(tmp_path, script))
    assert code == 3
    assert out == []
    assert sorted(err[:2]) == ["step 7", "vit-scale: image 3 is corrupt"]
    assert err[2:] == ["pod: host 2 of 3 ended with exit code 3"]
    wait_until(lambda: all_gone(tmp_path))


def test_a_failure_of_host_0_is_shown_once(tmp_path):
    script = """
all_started()
if number == 0:
    complain("vit-scale: no config is named 'x'"); sys.exit(2)
time.sleep(600)
"""
    code, _, err = end(start(tmp_path, script))
    assert code == 2
    assert err == ["vit-scale: no config is named 'x'", "pod: host 0 of 3 ended with exit code 2"]


def test_a_killed_host_ends_all(tmp_path):
    process = start(tmp_path, "time.sleep(600)")
    wait_until(lambda: len(list(tmp_path.glob("host-*"))) == 3)
    os.kill(started(tmp_path)[1][0], signal.SIGKILL)
    code, _, err = end(process)
    assert (code, err) == (137, ["pod: host 1 of 3 ended with exit code 137"])
    assert all_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_hosts_may_save(tmp_path, number):
    script = """
def stop(*_):
    time.sleep(0.2 * number)
    complain(f"saved {number}")
    sys.exit(42)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / f"ready-{number}").touch()
time.sleep(600)
"""
    process = start(tmp_path, script)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    process.send_signal(number)
    code, _, err = end(process)
    assert code == 42
    assert err == ["saved 0", "pod: host 0 of 3 ended with exit code 42"]


def test_a_second_signal_ends_at_once(tmp_path):
    script = """
def stop(*_):
    (folder / f"told-{number}").touch()
signal.signal(signal.SIGTERM, stop)
(folder / f"ready-{number}").touch()
while True:
    time.sleep(1)
"""
    process = start(tmp_path, script)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: len(list(tmp_path.glob("told-*"))) == 3)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 137
    assert all_gone(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="a process can follow its parent on Linux only")
def test_hosts_do_not_outlive_it(tmp_path):
    process = start(tmp_path, "time.sleep(600)")
    wait_until(lambda: len(list(tmp_path.glob("host-*"))) == 3)
    process.kill()
    process.communicate()
    wait_until(lambda: all_gone(tmp_path))
    assert len(list(tmp_path.glob("host-*"))) == 3


def test_refusals(tmp_path):
    pod = [sys.executable, str(ROOT / "launch" / "pod.py")]
    for arguments in (["--hosts=0", "x"], ["--hosts=2"], ["--hosts=2", "--devices=0", "x"]):
        done = subprocess.run([*pod, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert "at least 1, followed by a command" in done.stderr.splitlines()[-1]

"""A pod on one machine: real processes with virtual CPU devices, which train as so many hosts do.

    python launch/pod.py --hosts 4 --devices 2 COMMAND...

COMMAND runs once for each host, with the flags by which they find each other. What host 0 prints is
printed here. When a host fails, all are stopped, and the last lines of the one that failed first
are shown before anything that its end made others say. The exit code is that host's: 42 means
stopped but resumable. Ctrl-C and SIGTERM are passed on to all hosts; a second one ends them at
once, and so does the end of this process.
"""

import argparse
import collections
import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from typing import IO, TextIO

Ended = queue.Queue  # of (host number, exit code)
RESUMABLE = 42  # as in tpu/exit_codes.py
LAST_LINES = 40  # of each host, kept to be shown
PATIENCE = 30  # seconds that hosts have to end by themselves, after a signal or with another
NOISE = "peer ranks"  # in each line by which Gloo, which connects CPUs, says that it did


class Host:
    """One process of the pod; `ended` receives (number, exit code) when it is over."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str], ended: Ended):
        self.number = number
        self.lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self.heard = number == 0
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # the terminal's Ctrl-C reaches this process alone
            preexec_fn=_end_with_parent,
        )
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self.readers = [threading.Thread(target=self._read, args=s, daemon=True) for s in streams]
        for reader in self.readers:
            reader.start()
        threading.Thread(target=self._wait, args=(ended,), daemon=True).start()

    def _read(self, stream: IO[str], terminal: TextIO) -> None:
        for line in stream:
            if NOISE in line:
                continue
            self.lines.append(line)
            if self.heard:
                terminal.write(line)
                terminal.flush()

    def _wait(self, ended: Ended) -> None:
        code = self.process.wait()
        ended.put((self.number, code if code >= 0 else 128 - code))

    def signal(self, number: int) -> None:
        """Send a signal to the host and to the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def last_lines(self) -> str:
        for reader in self.readers:
            reader.join(timeout=1)  # a worker of the host may hold its output open
        return "".join(self.lines)


def _end_with_parent() -> None:
    """Linux ends a host whose parent is gone; elsewhere it stays."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(hosts: int, devices: int, command: list[str], ended: Ended) -> list[Host]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    where = ["--coordinator", f"localhost:{free_port()}", "--processes", str(hosts)]
    return [
        Host(number, [*command, *where, "--process", str(number)], environment, ended)
        for number in range(hosts)
    ]


def forward_signals(pod: list[Host]) -> list[int]:
    """Forward SIGINT and SIGTERM; return the list in which they are recorded."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        for host in pod:
            host.signal(signal.SIGKILL if received else number)
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return received


def follow(pod: list[Host], ended: Ended) -> int:
    """Wait for all hosts; the exit code of the first that failed, or 0."""
    running, result = {host.number for host in pod}, 0
    received = forward_signals(pod)
    while running:
        try:
            number, code = ended.get(timeout=PATIENCE if result or received else None)
        except queue.Empty:
            stop(pod)
            continue
        running.discard(number)
        if code and not result:
            result = code
            report_failure(pod, number, code)
            if code != RESUMABLE and not received:
                stop(pod)
    return result


def report_failure(pod: list[Host], number: int, code: int) -> None:
    pod[0].heard = number == 0  # what it says from now on, the end of another made it say
    lines = pod[number].last_lines()
    print(
        f"{lines if number else ''}pod: host {number} of {len(pod)} ended with exit code {code}",
        file=sys.stderr,
    )


def stop(pod: list[Host]) -> None:
    for host in pod:
        host.signal(signal.SIGKILL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--hosts", type=int, required=True, help="how many processes")
    parser.add_argument(
        "--devices", type=int, default=1, help="virtual devices of each (default: 1)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each host runs")
    args = parser.parse_args(argv)
    if args.hosts < 1 or args.devices < 1 or not args.command:
        parser.error("--hosts and --devices are at least 1, and a command follows them")
    ended: Ended = queue.Queue()
    pod = start(args.hosts, args.devices, args.command, ended)
    try:
        return follow(pod, ended)
    finally:
        stop(pod)
        for reader in pod[0].readers:
            reader.join(timeout=5)


if __name__ == "__main__":
    sys.exit(main())

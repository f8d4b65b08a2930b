"""Simulate a pod on one machine: one process per host, with virtual CPU devices.

    python launch/pod.py --hosts 4 --devices 2 COMMAND...

COMMAND runs once per host, with flags for the coordinator, the number of processes and its own
number. Only host 0's output is shown. If a host fails, all are stopped, the last lines of the first
to fail are printed, and its exit code is returned: 42 means stopped but resumable. Ctrl-C and
SIGTERM are forwarded to all hosts; a second one, or the end of this process, kills them.
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
LAST_LINES = 40  # of each host, to print if it fails
PATIENCE = 30  # seconds hosts have to exit after a signal or another host's exit
NOISE = "peer ranks"  # in every line that Gloo prints about its connections


class Host:
    """One process of the pod; its (number, exit code) is put on `ended` when it exits."""

    def __init__(self, number: int, command: list[str], environment: dict[str, str], ended: Ended):
        self.number = number
        self.lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self.printed = number == 0
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # the terminal's Ctrl-C reaches only this process
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
            if self.printed:
                terminal.write(line)
                terminal.flush()

    def _wait(self, ended: Ended) -> None:
        code = self.process.wait()
        ended.put((self.number, code if code >= 0 else 128 - code))

    def signal(self, number: int) -> None:
        """Send a signal to the host's process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def last_lines(self) -> str:
        for reader in self.readers:
            reader.join(timeout=1)  # a child of the host may hold its output open
        return "".join(self.lines)


def _end_with_parent() -> None:
    """On Linux, have the kernel kill this process when its parent exits."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(hosts: int, devices: int, command: list[str], ended: Ended) -> list[Host]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with socket.create_server(("localhost", 0)) as listener:  # on a port that is free
        port = listener.getsockname()[1]
    cluster = ["--coordinator", f"localhost:{port}", "--processes", str(hosts)]
    return [
        Host(number, [*command, *cluster, "--process", str(number)], environment, ended)
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
    """Wait for all hosts; return the exit code of the first that failed, or 0."""
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
    pod[0].printed = number == 0  # its later output is only a consequence
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
    parser.add_argument("--hosts", type=int, required=True, help="number of processes")
    parser.add_argument("--devices", type=int, default=1, help="virtual devices each (default: 1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command of each host")
    args = parser.parse_args(argv)
    if args.hosts < 1 or args.devices < 1 or not args.command:
        parser.error("--hosts and --devices must be at least 1, followed by a command")
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

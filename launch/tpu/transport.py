"""Call the agent on each worker, through gcloud or on this machine.

Each call goes to one worker, has a time limit, and may be repeated: the agent is idempotent.
"""

import concurrent.futures
import glob
import os
import pathlib
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable
from typing import Any

from launch.tpu import gcloud
from launch.tpu.clock import Clock

HOME = ".vit_scale"  # in a worker's home folder, as in agent.sh
AGENT = f"bash {HOME}/agent.sh"
PARALLEL = 16  # concurrent gcloud processes; each takes 65 MB and most of a second of CPU


def agent_command(*arguments: Any) -> str:
    """Quote a call of the agent for a worker's shell."""
    return f"{AGENT} {shlex.join(map(str, arguments))}"


class Workers:
    """The workers of a run, by number."""

    count = 0
    hosts: list[tuple[str, int]] = []  # noqa: RUF012, (node, index on it), in the cloud

    def shell(self, worker: int, line: str, stdin: bytes, limit: float) -> gcloud.Result:
        raise NotImplementedError

    def copy(self, worker: int, files: list[str], folder: str, limit: float) -> gcloud.Result:
        """Copy files to `folder` below the worker's home folder."""
        raise NotImplementedError

    def arguments(self, attempt_port: int) -> list[str]:
        """Return the trainer's flags on these workers; {worker} stands for the number."""
        return []

    def agent(self, worker: int, *arguments: Any, stdin: bytes = b"", limit: float = 60):
        return self.shell(worker, agent_command(*arguments), stdin, limit)


class GcloudWorkers(Workers):
    """The workers of TPU VMs, slice by slice; `hosts` lists (node, number of workers)."""

    def __init__(self, tpu: gcloud.Tpu, hosts: list[tuple[str, int]], clock: Clock, record):
        self.tpu, self.clock, self.record = tpu, clock, record
        self.hosts = [(node, index) for node, count in hosts for index in range(count)]
        self.count = len(self.hosts)

    def shell(self, worker, line, stdin, limit):
        node, index = self.hosts[worker]
        return self._run(gcloud.ssh(self.tpu, node, index, line), stdin, limit)

    def copy(self, worker, files, folder, limit):
        node, index = self.hosts[worker]
        return self._run(gcloud.copy(self.tpu, node, index, files, folder), b"", limit)

    def _run(self, argv, stdin, limit):
        self.record(argv)
        return gcloud.run(argv, stdin, self.clock.limit(limit))


class LocalWorkers(Workers):
    """Workers on this machine, one per home folder.

    With `devices`, each has that many virtual CPU devices. `environment`, if given, is used instead
    of one that the agent would create.
    """

    def __init__(self, homes: list[pathlib.Path], environment: str, devices: int, clock: Clock):
        self.homes, self.devices, self.clock = homes, devices, clock
        self.count = len(homes)
        self.variables = {"VIT_SCALE_VENV": environment} if environment else {}
        if devices:
            self.variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}

    def shell(self, worker, line, stdin, limit):
        home = self.homes[worker]
        home.mkdir(parents=True, exist_ok=True)
        variables = {**self.variables, "HOME": str(home)}
        argv = ["env", "-C", str(home), *(f"{name}={value}" for name, value in variables.items())]
        return gcloud.run([*argv, "bash", "-c", line], stdin, self.clock.limit(limit))

    def copy(self, worker, files, folder, limit):
        target = self.homes[worker] / folder
        try:
            for file in files:
                shutil.copy(file, target)
        except OSError as error:
            return gcloud.Result(1, b"", str(error))
        return gcloud.Result(0, b"", "")

    def arguments(self, attempt_port):
        if self.count == 1:
            return []
        coordinator = f"--coordinator=localhost:{attempt_port}"
        return [coordinator, f"--processes={self.count}", "--process={worker}"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def on_all(workers: Iterable[int], call: Callable[[int], Any]) -> dict[int, Any]:
    """Return {worker: call(worker)}, called concurrently."""
    workers = list(workers)
    with concurrent.futures.ThreadPoolExecutor(min(PARALLEL, len(workers) or 1)) as pool:
        return dict(zip(workers, pool.map(call, workers), strict=True))


def chips_here() -> int | None:
    """Count this host's TPU chips by their device files; None if there are none."""
    return len(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")) or None


def on_a_tpu_vm() -> bool:
    return any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))

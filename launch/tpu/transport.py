"""Call the agent on each worker, through gcloud or on this machine, and parse its answers.

Each call goes to one worker, has a time limit, and may be repeated: the agent is idempotent.
"""

import concurrent.futures
import glob
import json
import pathlib
import re
import shlex
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from launch.tpu import gcloud
from launch.tpu.clock import Clock

HOME = ".vit_scale"  # in a worker's home folder, as in agent.sh
AGENT = f"bash {HOME}/agent.sh"
# gcloud processes at a time; each takes 91 MB and most of a second of CPU.
FEW = threading.Semaphore(16)
RENEW = 60  # seconds


def agent_command(*arguments: Any) -> str:
    """Quote a call of the agent for a worker's shell."""
    return f"{AGENT} {shlex.join(map(str, arguments))}"


class AgentStatus(NamedTuple):
    """A worker's answer to `status`; times are seconds on the worker's clock."""

    state: str  # absent | running | ended | lost
    attempt: int
    code: int | None
    ended: float | None
    now: float
    stopped: bool  # the attempt was asked to stop
    free_gb: int
    watcher: str  # the launcher that watches the run, as HOST:PID:ID
    watched_at: float  # when that launcher last called; 0 for never
    command: str  # of the trainer, unquoted
    heartbeat: dict | None  # None before the first
    log_offset: int
    log_size: int
    log: bytes  # from the requested offset

    @staticmethod
    def parse(result: gcloud.Result) -> "AgentStatus | None":
        """Parse the answer; None if the call failed or its answer is incomplete or malformed."""
        head, complete, log = result.out.partition(b"#STATUS ")[2].partition(b"\n#LOG\n")
        if result.code or not complete:
            return None
        try:
            fields = json.loads(head.decode(errors="replace"), strict=False)
            known = {name: fields[name] for name in AgentStatus._fields[:-1]}
            return AgentStatus(**known, log=log)
        except (ValueError, TypeError, KeyError):
            return None


def last_error(text: str) -> str:
    """Return the last line of the agent's own, else the last error of gcloud's."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("agent: ")]
    errors = [line for line in lines if line.startswith("ERROR")]
    line = (own or errors or lines or ["no answer"])[-1]
    return re.sub(r"^(agent: |ERROR: \S+ )", "", line)[:300]


class Workers:
    """The workers of a run, by number."""

    count = 0
    hosts: list[tuple[str, int]] = []  # noqa: RUF012, (node, index on it), in the cloud

    def shell(self, worker: int, line: str, stdin: bytes, limit: float) -> gcloud.Result:
        raise NotImplementedError

    def arguments(self, attempt_port: int) -> list[str]:
        """Return the trainer's flags on these workers; {worker} stands for the number."""
        return []

    def agent(self, worker: int, *arguments: Any, stdin: bytes = b"", limit: float = 60):
        return self.shell(worker, agent_command(*arguments), stdin, limit)

    def agents(self, *arguments: Any) -> dict[int, gcloud.Result]:
        """Call the same verb on all workers."""
        return on_all(range(self.count), lambda i: self.agent(i, *arguments))


class GcloudWorkers(Workers):
    """The workers of TPU VMs, slice by slice; `hosts` lists (node, number of workers).

    The first call goes through gcloud, which adds the SSH key to the node; then gcloud prints
    ssh's command line for each of the node's workers, and ssh runs without it, over a connection
    that stays open. A call whose connection fails goes through gcloud again: IP addresses change.
    """

    def __init__(self, tpu: gcloud.Tpu, hosts: list[tuple[str, int]], clock: Clock, record):
        self.tpu, self.clock, self.record = tpu, clock, record
        self.hosts = [(node, index) for node, count in hosts for index in range(count)]
        self.count = len(self.hosts)
        self.direct: dict[int, list[str]] = {}  # ssh's command line, by worker
        self.asked: dict[str, float] = {}  # when gcloud was asked for a node's
        self.lock = threading.Lock()
        # The path of a socket may have only 100 bytes.
        self.sockets = tempfile.TemporaryDirectory(prefix="vit_scale-", dir="/tmp")

    def shell(self, worker, line, stdin, limit):
        node, index = self.hosts[worker]
        if worker in self.direct:
            result = self._run([*self.direct[worker], line], stdin, limit)
            if result.code not in (255, gcloud.NOT_STARTED):  # the command's own exit code
                return result
        with FEW:
            result = self._run(gcloud.ssh(self.tpu, node, index, line), stdin, limit)
        if result.code == 0 and not self.tpu.iap:  # each connection would be a gcloud process
            self._ask(node)
        return result

    def _ask(self, node: str) -> None:
        """Ask gcloud, at most once in RENEW seconds, for the command lines of a node's workers."""
        with self.lock:
            if self.clock.now() < self.asked.get(node, -RENEW) + RENEW:
                return
            self.asked[node] = self.clock.now()
        printed = self._run(gcloud.ssh_lines(self.tpu, node), b"", 60).out.decode()
        lines = [line for line in printed.splitlines() if line.endswith(" -- true")]
        workers = [i for i, (name, _) in enumerate(self.hosts) if name == node]
        if len(lines) == len(workers):  # in the order of the workers
            commands = [shared_ssh(line, self.sockets.name) for line in lines]
            self.direct.update(zip(workers, commands, strict=True))

    def _run(self, argv, stdin, limit):
        self.record(argv)
        return gcloud.run(argv, stdin, self.clock.limit(limit))


def shared_ssh(line: str, sockets: str) -> list[str]:
    """Return ssh's command line, without a command, for calls that share one connection.

    `line` is what gcloud prints to run `true`: without quotes, although paths may have spaces.
    """
    options, _, host = line.removesuffix(" -- true").rpartition(" ")
    program, *flags = re.split(r" (?=-[io])", options.replace(" -T ", " "))
    pairs = [(flag[:2], flag[3:]) if flag[2] == " " else (flag,) for flag in flags]
    shared = ("-oControlMaster=auto", f"-oControlPath={sockets}/%C", "-oControlPersist=60")
    return [program, "-T", *(word for pair in pairs for word in pair), *shared, host, "--"]


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

    def arguments(self, attempt_port):
        if self.count == 1:
            return []
        coordinator = f"--coordinator=localhost:{attempt_port}"
        return [coordinator, f"--processes={self.count}", "--process={worker}"]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return listener.getsockname()[1]


def on_all(workers: Iterable[int], call: Callable[[int], Any]) -> dict[int, Any]:
    """Return {worker: call(worker)}, called concurrently."""
    workers = list(workers)
    with concurrent.futures.ThreadPoolExecutor(len(workers) or 1) as pool:
        return dict(zip(workers, pool.map(call, workers), strict=True))


def chips_here() -> int | None:
    """Count this host's TPU chips by their device files; None if there are none."""
    return len(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")) or None

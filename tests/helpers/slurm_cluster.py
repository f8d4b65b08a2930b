"""A real SLURM cluster on this machine's loopback: a controller, and a daemon for each node.

The programs are Debian's packages, downloaded once and unpacked in `.cache`; nothing is installed.
A node is named by its address, so that jax's coordinator has one; it has two CPUs, which it shares
with the other node. Jobs of the partition "low" are preempted by those of "high", but may save.
"""

import contextlib
import ctypes
import fcntl
import getpass
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "slurm"
PACKAGES = ("slurmctld", "slurmd", "slurm-client")
TESTED = "22.05."  # another version may need another configuration
NODES = ("127.0.0.1", "127.0.0.2")
READY = (["idle"], ["mix"], ["alloc"])  # a node's state
PR_SET_PDEATHSIG = 1

# Nobody authenticates, so the daemons listen on the loopback alone. `cred_expire` is also how long
# a requeued job waits before it starts again: 120 s where it is not set.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=Cores
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
MinJobAge=3600
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def programs() -> pathlib.Path:
    """Return the folder of the unpacked packages; skip the test where they can't be had."""
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            pytest.skip(f"no SLURM: it comes from Debian's packages, and {tool} is missing")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may download them
        if not (CACHE / "root").exists():
            check_version()
            download(CACHE / "root")
    return CACHE / "root"


def check_version() -> None:
    """Skip the test if apt-get would download a version that the configuration is not for."""
    command = ["apt-cache", "policy", PACKAGES[0]]
    policy = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    version = re.search(r"Candidate: (\d[^-\s]*)", policy.stdout)
    if version and not version[1].startswith(TESTED):
        pytest.skip(f"SLURM {version[1]}: the cluster's configuration is for {TESTED}x")


def download(root: pathlib.Path) -> None:
    archives, partial = CACHE / "archives" / "partial", CACHE / "partial"
    archives.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "install", "--yes", "--download-only", "--no-install-recommends"]
    command += ["-o", f"Dir::Cache::archives={archives.parent}", "-o", "Debug::NoLocking=1"]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        pytest.skip(f"no SLURM: apt-get cannot download it: {reason}")
    shutil.rmtree(partial, ignore_errors=True)
    for package in archives.parent.glob("*.deb"):
        subprocess.run(["dpkg", "--extract", package, partial], check=True)
    partial.rename(root)
    shutil.rmtree(archives.parent)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(condition: Callable[[], object], seconds: float, failure: Callable[[], str]) -> None:
    """Return once `condition()` holds; fail the test with `failure()` after `seconds`."""
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience, f"not within {seconds:g} s:\n{failure()}"
        time.sleep(0.1)


class Cluster:
    """A context manager around a running cluster, whose files are in `folder`.

    It ends every process that has the cluster's slurm.conf in its environment, so also those of its
    jobs. The daemons end with the process that started them, however that ends.
    """

    def __init__(self, folder: pathlib.Path):
        root = programs()
        (libraries,) = root.glob("usr/lib/*-linux-gnu")
        self.folder, self.conf, self.sbin = folder, folder / "slurm.conf", root / "usr" / "sbin"
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "LD_LIBRARY_PATH": f"{libraries}:{libraries / 'slurm-wlm'}",
            "PATH": f"{root / 'usr' / 'bin'}:{os.environ['PATH']}",
        }
        self._daemons: list[subprocess.Popen] = []
        (folder / "state").mkdir()
        self._configure(libraries / "slurm-wlm")

    def _configure(self, plugins: pathlib.Path) -> None:
        port, *ports = free_ports(1 + len(NODES))
        text = CONFIGURATION.format(
            port=port,
            user=getpass.getuser(),
            folder=self.folder,
            plugins=plugins,
            first_job=random.randrange(1, 10**6),  # jax takes its port from the job's number
        )
        nodes = "".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=localhost Port={port} CPUs=2 "
            "RealMemory=1000\n"
            for node, port in zip(NODES, ports, strict=True)
        )
        self.conf.write_text(text + nodes)

    def __enter__(self) -> "Cluster":
        try:
            self._spawn("slurmctld-wlm", "-D", "-c")
            for node in NODES:
                self.restore(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        while self._kill("SLURM_CONF", str(self.conf)):
            time.sleep(0.1)
        for daemon in self._daemons:
            daemon.wait()

    def _spawn(self, program: str, *options: str, **variables: str) -> None:
        def end_with_parent() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        with open(self.folder / f"{program}.out", "ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [self.sbin / program, *options],
                    cwd=self.folder,
                    env=self.environment | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )

    def processes(self, variable: str, value: str) -> list[int]:
        """Return the cluster's processes that have `variable` in their environment."""
        wanted = {f"{variable}={value}".encode(), f"SLURM_CONF={self.conf}".encode()}
        pids = []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended, or belongs to another user
            if wanted <= set(variables):
                pids.append(int(folder.name))
        return pids

    def _kill(self, variable: str, value: str) -> list[int]:
        pids = self.processes(variable, value)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return pids

    def lose(self, node: str) -> None:
        """Let a node vanish: its daemon, its steps and their tasks, and what it had on its disk."""
        assert self._kill("SLURMD_NODENAME", node)
        # slurmd would fail to start the job's script where it still has the one of before.
        shutil.rmtree(self.folder / f"spool.{node}")

    def restore(self, node: str) -> None:
        """Start a node, and wait until it can have jobs."""
        step = str(self.sbin / "slurmstepd-wlm")
        self._spawn("slurmd-wlm", "-D", "-N", node, "-d", step, SLURMD_NODENAME=node)
        states = ["sinfo", "--noheader", "--Node", "--nodes", node, "--format", "%t"]
        wait_until(lambda: self.run(*states, check=False).split()[:1] in READY, 60, self._logs)

    @contextlib.contextmanager
    def gpus(self, *models: str) -> Iterator[None]:
        """Let the nodes have two GPUs each, of these models, in SLURM's books."""
        self._set_gpus(f"gpu:{model}:2" for model in models)
        try:
            yield
        finally:  # a node that says of itself that it has none would soon be drained
            self._set_gpus("" for _ in models)

    def _set_gpus(self, lists: Iterable[str]) -> None:
        for node, gpus in zip(NODES, lists, strict=True):
            self.run("scontrol", "update", f"NodeName={node}", f"Gres={gpus}")

    def _logs(self) -> str:
        files = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        return "\n".join(f"{file}:\n{file.read_text()[-3000:]}" for file in files)

    def run(self, *command: str | pathlib.Path, check: bool = True, cwd=None, **variables: str):
        """Return what one of SLURM's commands prints."""
        environment = self.environment | variables
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

"""A launcher without processes or waiting: a fake gcloud, a fake clock, workers that answer."""

import json
import pathlib

from launch.tpu import (
    cli,
    flags,
)
from launch.tpu.bundle import Bundle
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import CloudTpu
from launch.tpu.gcloud import Result, Tpu
from launch.tpu.journal import Journal
from launch.tpu.launcher import Launcher
from launch.tpu.plan import Plan
from launch.tpu.transport import Workers

RUN = "vit-1"
OURS = {"managed-by": "vit_scale", "run": RUN, "owner": "ada"}
NOTE = "This command is authenticated as a which is the active account specified by [core/account]"


class Table:
    """A fake gcloud with nodes and requests; `on` overrides the next answers of a verb."""

    def __init__(self):
        self.requests, self.nodes, self.calls = {}, {}, []
        self.on: dict[str, list[Result]] = {}
        self.agent = lambda worker, line: Result(0, b"", "")

    def request(self, name="vit", state="ACTIVE", labels=OURS, nodes=()):
        spec = [{"nodeId": n, "node": {"labels": labels}} for n in nodes or [name]]
        self.requests[name] = {
            "name": f"projects/p/locations/z/queuedResources/{name}",
            "state": {"state": state},
            "tpu": {"nodeSpec": spec},
        }

    def node(self, name="vit", request="vit", labels=OURS, **more):
        self.nodes[name] = {
            "name": f"projects/p/locations/z/nodes/{name}",
            "state": "READY",
            "health": "HEALTHY",
            "networkEndpoints": [{}, {}],
            "labels": labels,
            "queuedResource": request and f"projects/p/locations/z/queuedResources/{request}",
            **more,
        }

    def __call__(self, argv, stdin=b"", timeout=None):
        words = [word for word in argv if word not in ("gcloud", "alpha", "compute", "tpus")]
        self.calls.append(" ".join(argv))
        if words[0] == "config":
            return Result(0, b"p", "")
        kind, verb, name = words[:3]
        entries = self.requests if kind == "queued-resources" else self.nodes
        if self.on.get(verb):
            return self.on[verb].pop(0)
        if "--dry-run" in argv:
            return Result(1, b"", "ERROR: unrecognized arguments: --dry-run")
        if verb == "ssh":
            worker = int(argv[argv.index("--worker") + 1])
            return self.agent(worker, argv[-1])
        if verb == "list":
            return Result(0, json.dumps(list(entries.values())).encode(), "")
        if verb == "create":
            if name in entries or name in self.nodes:
                return Result(1, b"", f"ERROR: ALREADY_EXISTS: Resource '{name}' already exists")
            labels = dict(pair.split("=") for pair in argv[argv.index("--labels") + 1].split(","))
            self.request(name, "WAITING_FOR_RESOURCES", labels)
            return Result(0, b"", "")
        if name not in entries:
            return Result(1, b"", f"ERROR: NOT_FOUND: Resource '{name}' was not found. {NOTE}")
        if verb == "delete":
            del entries[name]
            for node, entry in list(self.nodes.items()):
                if kind == "queued-resources" and entry["queuedResource"].endswith(f"/{name}"):
                    del self.nodes[node]
            return Result(0, b"", "")
        return Result(0, json.dumps(entries[name]).encode(), "")

    def did(self, *words) -> list[str]:
        return [line for line in self.calls if all(word in line for word in words)]


class FakeClock(Clock):
    """A clock on which sleeping takes no time."""

    def __init__(self):
        super().__init__()
        self.time, self.asleep = 1e6, 0.0

    def now(self):
        return self.time

    def wall(self):
        return self.time + self.asleep

    def sleep(self, seconds):
        self.time += seconds


def status(state: str, number: int = 1, more: str = "", command: str = "") -> Result:
    watcher, _, watched = more.partition(" ")
    content = {"attempt": number, "state": state, "code": None, "ended": None, "now": 5}
    content |= {"free_gb": 9, "stopped": False, "watcher": watcher, "watched_at": int(watched or 0)}
    content |= {"command": command, "log_offset": 0, "log_size": 0, "heartbeat": None}
    if state == "running":
        content["heartbeat"] = {"run": "x", "step": 7, "phase": "train"}
    return Result(0, f"#STATUS {json.dumps(content)}\n#LOG\n".encode(), "")


NO_ANSWER = Result(124, b"", "no answer in 60 s")


class TwoWorkers(Workers):
    """Two workers that answer `status` from lists; the last answer repeats."""

    count = 2

    def __init__(self, *answers):
        self.answers, self.lines = [list(a) for a in answers], []

    def shell(self, worker, line, stdin, limit):
        self.lines.append((worker, line))
        if "agent.sh status" not in line:
            return Result(0, b"", "")
        remaining = self.answers[worker]
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    def did(self, words: str) -> list[int]:
        return [worker for worker, line in self.lines if words in line]


def tpu(**more) -> Tpu:
    return Tpu("vit", "z", "p", "v4-16", "r", labels=dict(OURS), **more)


def plan(folder: pathlib.Path, *words: str, **more) -> Plan:
    return Plan(
        args=flags.parser().parse_args(["--config", "x", *words]),
        target="vm",
        name="vit",
        run=RUN,
        folder=folder,
        hosts=2,
        config="x",
        workdir="gs://b/x",
        arguments=["train"],
        setup="",
        secrets={},
        code=Bundle("c0de", b"", "x"),
        **{"tpu": tpu(), "zones": ["z"], **more},
    )


def launcher(folder: pathlib.Path, *words: str, **more) -> Launcher:
    clock, journal = FakeClock(), Journal(folder, quiet=True)
    made = plan(folder, *words, **more)
    return Launcher(made, CloudTpu(made.tpu, clock, journal), None, clock, journal)


def verb(*words: str) -> int:
    args = flags.parser().parse_args([*words, "--name", "vit"])
    return cli.VERBS[args.verb](args)

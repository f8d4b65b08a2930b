"""What the launcher may delete and what it must leave alone: unit tests with a fake gcloud and a
fake clock, without processes or waiting."""

import dataclasses
import errno
import json
import os
import pathlib
import time
from types import SimpleNamespace

import pytest

from launch.tpu import (
    accelerators,
    cli,
    cloud_tpu,
    flags,
    fleet,
    gcloud,
    preflight,
    verbs,
    worker_commands,
)
from launch.tpu.allocation import Gone
from launch.tpu.attempt import Attempt
from launch.tpu.billing import Billing
from launch.tpu.bundle import Bundle
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import CloudTpu
from launch.tpu.exit_codes import Stop
from launch.tpu.gcloud import Result, Tpu
from launch.tpu.journal import Journal
from launch.tpu.launcher import Launcher
from launch.tpu.plan import Plan
from launch.tpu.provision import Provisioner
from launch.tpu.transport import GcloudWorkers, Workers, on_all

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


@pytest.fixture
def table(monkeypatch) -> Table:
    made = Table()
    monkeypatch.setattr(gcloud, "run", made)
    monkeypatch.setenv("USER", "ada")
    return made


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


# --- ownership of machines


def test_a_tpu_vm_that_is_not_ours_is_refused_and_left_alone(table, tmp_path):
    """A plain TPU VM may have the queued resource's name: exit code 64, nothing created."""
    table.node(request="", labels={})
    made = launcher(tmp_path)
    assert made.run() == 64
    assert table.did("create") == table.did("delete") == [] and "vit" in table.nodes
    assert not (tmp_path / "launch.json").exists(), "`stop` must not treat it as its own"


def test_a_request_made_meanwhile_by_another_run_is_left_alone(table, tmp_path):
    """A request that appears between the status check and the creation is not ours."""

    def between(argv, **_):
        if "create" in argv:
            table.request(labels={**OURS, "run": "vit-2", "owner": "eve"})
        return table(argv)

    gcloud.run = between  # restored by the fixture `table`
    assert launcher(tmp_path).run() == 64
    assert table.did("delete") == []


def test_creation_gives_up_on_a_name_that_exists_without_a_status(table, tmp_path):
    refused = Result(1, b"", "ERROR: ALREADY_EXISTS: Resource 'vit' already exists")
    table.on["create"] = [refused] * 99
    made = launcher(tmp_path)
    began = made.clock.now()
    assert made.run() == 64
    assert len(table.did("create")) == 6 and made.clock.now() - began > 300


def test_a_node_that_outlived_our_request_is_deleted(table, tmp_path):
    journal, clock = Journal(tmp_path, quiet=True), FakeClock()
    table.node()
    assert CloudTpu(tpu(), clock, journal, owned=True).status().kind == "gone"
    CloudTpu(tpu(), clock, journal, owned=True).delete()
    assert table.nodes == {}
    for other in ({"labels": {}, "request": ""}, {"labels": {**OURS, "run": "vit-2"}}):
        table.node(**other)
        assert CloudTpu(tpu(), clock, journal, owned=True).status().kind == "not_ours"
        CloudTpu(tpu(), clock, journal, owned=True).delete()
        assert "vit" in table.nodes, other


def test_a_request_now_owned_by_another_run_is_not_deleted(table, tmp_path):
    table.request(labels={**OURS, "run": "vit-2"})
    CloudTpu(tpu(), FakeClock(), Journal(tmp_path, quiet=True), owned=True).delete()
    assert table.did("delete") == []


def test_status_recognises_nodes_with_and_without_a_request(table, tmp_path):
    """Whether created with --no-queue or by a request, it is the same run's machine."""
    table.node(request="")
    cloud = CloudTpu(tpu(), FakeClock(), Journal(tmp_path, quiet=True), owned=True)
    assert (cloud.status().kind, cloud.tpu.queue) == ("ready", False)
    table.request()
    table.node()
    cloud = CloudTpu(tpu(queue=False), FakeClock(), Journal(tmp_path, quiet=True), owned=True)
    assert (cloud.status().kind, cloud.tpu.queue) == ("ready", True)


@pytest.fixture
def run_folder(table, tmp_path, monkeypatch) -> pathlib.Path:
    """The folder of a run, as a launcher writes it."""
    folder = tmp_path / "runs" / RUN
    folder.mkdir(parents=True)
    for module in (verbs, fleet):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "runs")
    for module in (verbs, fleet, cloud_tpu):
        if hasattr(module, "Clock"):
            monkeypatch.setattr(module, "Clock", FakeClock)
    request = {"run": RUN, "name": "vit", "tpu": vars(tpu()), "existing": False, "price": None}
    (folder / "launch.json").write_text(json.dumps(request))
    return folder


def verb(*words: str) -> int:
    args = flags.parser().parse_args([*words, "--name", "vit"])
    return cli.VERBS[args.verb](args)


@pytest.mark.parametrize("words", [["stop"], ["delete", "--yes"]])
def test_another_runs_machine_is_neither_stopped_nor_deleted(table, run_folder, words):
    table.request(labels={**OURS, "run": "vit-2", "owner": "eve"})
    table.node(labels={**OURS, "run": "vit-2", "owner": "eve"})
    with pytest.raises(Stop, match="run vit-2 of eve") as stop:
        verb(*words)
    assert stop.value.code == 64 and table.did("delete") == table.did("agent.sh stop") == []
    if words[0] == "delete":
        assert verb(*words, "--owner", "eve") == 0
        assert table.requests == {}


def test_stop_retries_unreachable_workers(table, run_folder):
    """An unreachable worker may still train: it is asked again before the machine is deleted."""
    table.request()
    table.node()
    calls = []

    def agent(worker, line):
        calls.append((worker, line))
        if worker == 1 and len(calls) < 20:
            return NO_ANSWER
        return status("ended" if len(calls) > 30 else "running")

    table.agent = agent
    assert verb("stop", "--grace", "10m") == 0
    assert len(calls) > 30 and table.requests == {}
    assert sum("agent.sh stop vit-1 1" in line for worker, line in calls if worker == 1) > 3


def test_stop_with_unreachable_workers(table, run_folder):
    """With --keep an error, as they may still train; else deleted after the grace period."""
    table.request()
    table.node()
    table.agent = lambda worker, line: NO_ANSWER
    with pytest.raises(Stop, match=r"may still train: \[w00\] not reached"):
        verb("stop", "--keep")
    assert table.did("delete") == []
    assert verb("stop", "--grace", "1m") == 0 and table.requests == {}


def test_stop_withdraws_a_queued_request(table, run_folder):
    table.request(state="WAITING_FOR_RESOURCES")
    assert verb("stop") == 0 and table.requests == {}


def test_delete_finds_a_plain_node_by_name(table, run_folder):
    """Without knowing its run, or that it was created with --no-queue."""
    table.node(request="")
    assert verb("delete", "--yes") == 0 and table.nodes == {}
    (run_folder / "launch.json").unlink()
    table.node(request="")
    assert verb("delete", "--yes", "--zone", "z") == 0 and table.nodes == {}
    table.node(request="", labels={**OURS, "owner": "eve"})
    with pytest.raises(Stop, match="of eve; to delete it, pass --owner eve"):
        verb("delete", "--yes", "--zone", "z")
    assert "vit" in table.nodes


# --- running attempts


def adopt(folder, *answers, number=1) -> tuple[Launcher, Attempt | None]:
    made = launcher(folder)
    made.workers = TwoWorkers(*answers)
    made.check = lambda: None
    made.provisioner = Provisioner(
        made.plan, made.workers, made.clock, made.journal, made.check, made.pause
    )
    return made, made.find_attempt()


def test_an_attempt_is_adopted_if_a_worker_does_not_answer(table, tmp_path):
    """One failed status call does not end training."""
    running = status("running")
    made, attempt = adopt(tmp_path, [running], [running, NO_ANSWER, NO_ANSWER, running])
    assert attempt and [view.state for view in attempt.views] == ["running", "running"]
    made, attempt = adopt(tmp_path, [running], [running, NO_ANSWER])
    assert attempt and attempt.views[1].state == "unknown"
    assert made.workers.did("agent.sh stop") == []


def test_a_partially_started_attempt_is_stopped(table, tmp_path):
    """If all workers agree and no step was made."""
    started = Result(0, status("running").out.replace(b'"step": 7', b'"step": 0'), "")
    made, attempt = adopt(tmp_path, [started], [status("absent", 0), status("absent", 0)])
    assert attempt is None and made.workers.did("agent.sh stop vit-1 1 0") == [0, 1]
    made, attempt = adopt(tmp_path, [status("running")], [status("absent", 0)])
    assert attempt is not None, "an attempt that made steps is adopted"


def test_an_attempt_with_other_arguments_is_not_adopted(table, tmp_path):
    """If it runs, it is left alone; if it is over, it says nothing about this training."""
    mine = status("running", command="vit-scale train --coordinator=localhost:7 --process=0 ")
    assert adopt(tmp_path, [mine], [mine])[1] is not None
    other = status("running", command="vit-scale train --config.steps=9")
    with pytest.raises(Stop, match=r"attempt 1 still trains \(vit-scale train --config.steps=9\)"):
        adopt(tmp_path, [other], [other])
    over = status("ended", command="vit-scale train --config.steps=9")
    assert adopt(tmp_path, [over], [over])[1] is None


def test_a_malformed_status_names_the_worker(table, tmp_path):
    with pytest.raises(Stop, match=r"\[w01\] gave no valid answer") as stop:
        adopt(tmp_path, [status("running")], [Result(0, b"#STATUS {\n#LOG\n", "")])
    assert stop.value.code == 75


def test_a_lost_request_to_stop_is_repeated(table, tmp_path):
    """Else the worker would be killed without having saved."""
    made = launcher(tmp_path)
    made.workers = TwoWorkers([status("ended")], [NO_ANSWER, status("running")])
    answer, lost = made.workers.shell, [NO_ANSWER]

    def shell(worker, line, stdin, limit):
        result = answer(worker, line, stdin, limit)
        if "agent.sh stop" not in line or worker == 0:
            return result
        made.workers.answers = made.workers.answers if lost else [[status("ended")]] * 2
        return lost.pop() if lost else result

    made.workers.shell = shell
    made.new_attempt(1).stop(60)
    assert sorted(made.workers.did("agent.sh stop vit-1 1 60")) == [0, 1, 1]
    assert made.workers.did("agent.sh stop vit-1 1 0") == []


RATE = "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) RESOURCE_EXHAUSTED: Quota exceeded for quota metric"


@pytest.mark.parametrize("error, lost", [(RATE, False), ("HTTP 429: slow", False), ("255", True)])
def test_a_rate_limit_is_no_lost_worker(table, tmp_path, error, lost):
    running = status("running")
    made = launcher(tmp_path)
    made.workers = TwoWorkers([running], [running, Result(1, b"", error)])
    attempt = made.new_attempt(1)
    for _ in range(30):
        attempt.poll()
        made.clock.sleep(10)
    cause = attempt.find_cause(lambda: True)
    assert (cause is not None and "unreachable" in cause.line) == lost


class SshHosts:
    """gcloud and ssh of a TPU VM with 64 hosts: answers calls of `gcloud.run`, and counts them."""

    def __init__(self):
        self.gcloud, self.ssh, self.broken, self.moved = [], [], set(), 0
        self.code = 255  # of the broken

    def __call__(self, argv, stdin=b"", timeout=None):
        if "--dry-run" in argv:
            self.gcloud.append("--dry-run")
            options = "/bin/ssh -T -i /a b/key -o CheckHostIP=no -o File=/c d -oBatchMode=yes"
            hosts = [f"me@10.{self.moved}.0.{i}" for i in range(64)]
            lines = "".join(f"{options} {host} -- true\n" for host in hosts)
            return Result(0, f"Generating public/private rsa key pair.\n{lines}".encode(), "")
        if argv[0] == "gcloud":
            self.gcloud.append(int(argv[argv.index("--worker") + 1]))
            return Result(0, b"through gcloud", "")
        self.ssh.append(argv)
        worker = int(argv[argv.index("--") - 1].rpartition(".")[2])
        return Result(self.code if worker in self.broken else 0, stdin, "")


@pytest.fixture
def hosts(monkeypatch) -> SshHosts:
    made = SshHosts()
    monkeypatch.setattr(gcloud, "run", made)
    return made


def ask_all(workers: GcloudWorkers) -> dict:
    return on_all(range(workers.count), lambda i: workers.agent(i, "status", "x", 1, stdin=b"x"))


def test_watching_64_hosts_takes_no_gcloud_process(hosts, tmp_path):
    workers = GcloudWorkers(tpu(), [("vit", 64)], FakeClock(), lambda argv: None)
    workers.agent(0, "status", "x", 1)
    assert hosts.gcloud == [0, "--dry-run"], "one call adds the key, one prints all addresses"
    assert [result.out for result in ask_all(workers).values()] == [b"x"] * 64
    assert len(hosts.gcloud) == 2 and len(hosts.ssh) == 64
    argv = next(argv for argv in hosts.ssh if "me@10.0.0.9" in argv)
    options = ["-i", "/a b/key", "-o", "CheckHostIP=no", "-o", "File=/c d", "-oBatchMode=yes"]
    assert argv[:9] == ["/bin/ssh", "-T", *options]
    assert argv[-3:] == ["me@10.0.0.9", "--", "bash .vit_scale/agent.sh status x 1"]
    (path,) = (word.partition("=")[2] for word in argv if word.startswith("-oControlPath"))
    longest = path.replace("%C", "c" * 40) + ".0123456789abcdef"  # ssh's temporary name
    assert len(longest) < 100 and "-oControlMaster=auto" in argv
    assert pathlib.Path(path).parent.stat().st_mode & 0o777 == 0o700


def test_a_failed_connection_is_made_again_through_gcloud(hosts, tmp_path):
    """Other exit codes are the command's own; an address that has changed is asked for again."""
    clock = FakeClock()
    workers = GcloudWorkers(tpu(), [("vit", 64)], clock, lambda argv: None)
    workers.agent(0, "status", "x", 1)
    hosts.broken, hosts.moved = {7}, 9
    clock.sleep(100)
    assert workers.agent(7, "start", "x").out == b"through gcloud"
    assert hosts.gcloud == [0, "--dry-run", 7, "--dry-run"]
    workers.agent(8, "start", "x")
    assert "me@10.9.0.8" in hosts.ssh[-1]
    workers.agent(7, "start", "x")
    assert hosts.gcloud[4:] == [7], "but not for each call"
    hosts.code = gcloud.NOT_STARTED
    assert workers.agent(7, "start", "x").out == b"through gcloud"
    hosts.code, calls = 127, len(hosts.gcloud)
    assert workers.agent(7, "start", "x").code == 127, "which may have done something"
    assert len(hosts.gcloud) == calls


@pytest.mark.parametrize("training", [True, False])
def test_a_bug_in_the_launcher_does_not_end_training(table, tmp_path, capsys, training):
    """Nor does it delete the machine that trains."""
    table.request()
    table.node()
    made = launcher(tmp_path)
    made.machine.cloud.owned = made.machine.created = made.shutdown.workers_known = True
    made.machine.fresh = False

    def fail():
        if training:
            made.workers = TwoWorkers([status("running")])
            made.arm_reaper = lambda: None
            made.provisioner = SimpleNamespace(
                upload=lambda: None,
                prepare=lambda: None,
                retry_on_all=lambda what, workers, call: {0: status("running")},
            )
            made.workers.count = 1
            made.watch = lambda attempt: 1 / 0
            made.run_attempt()
        raise KeyError("a mistake")

    made.train = fail
    assert made.run() == 70
    assert bool(table.requests) == training
    assert "bug in the launcher" in json.loads(capsys.readouterr().out)["cause"]


class ClosedTerminal:
    """A closed terminal."""

    def __init__(self, number: int):
        self.number, self.writes = number, 0

    def write(self, text):
        self.writes += 1
        raise OSError(errno.EIO, "gone")

    def flush(self):
        raise BrokenPipeError

    def fileno(self):
        return self.number


def test_a_closed_terminal_and_a_full_disk_are_not_errors(table, tmp_path, monkeypatch):
    streams = [ClosedTerminal(os.open(os.devnull, os.O_WRONLY)) for _ in range(2)]
    journal = Journal(tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", streams[0])
        patch.setattr("sys.stdout", streams[1])
        journal.say("event", "x")
        journal.print_log(0, "x")
        made = launcher(tmp_path / "runs")
        made.journal.quiet = False
        made.train = lambda: None
        assert made.run() == 0
    assert [stream.writes > 0 for stream in streams] == [True, True]
    (tmp_path / "file").write_text("")  # no folder can be created below a file
    full = Journal(tmp_path / "file" / "run", quiet=True)
    full.write("event")
    full.save()
    full.add_log(1, 0, "x")
    assert full.read_log(1, 0) == "" and full.put("x", "y") is False


def test_an_unhealthy_machine_is_used_until_it_is_in_repair(table, tmp_path):
    table.request()
    table.node(health="UNHEALTHY_MAINTENANCE")
    made = launcher(tmp_path)
    made.machine.check()
    assert made.machine.acquire().kind == "unhealthy", "it is adopted, as it may be training"
    table.nodes["vit"]["state"] = "REPAIRING"
    with pytest.raises(Gone):
        made.machine.check()


def test_a_machine_in_repair_is_asked_to_save_before_it_is_deleted(table, tmp_path):
    table.request()
    table.node(state="REPAIRING")
    made = launcher(tmp_path, "--grace", "1m")
    made.journal.state["attempt"] = 3
    table.on["create"] = [Result(1, b"", "PERMISSION_DENIED: Permission 'x' denied")]
    with pytest.raises(Stop):
        made.machine.acquire()
    lines = [" ".join(line.split()) for line in table.calls]
    stop = next(i for i, line in enumerate(lines) if "agent.sh stop vit-1 3 60" in line)
    delete = next(i for i, line in enumerate(lines) if " delete " in line)
    assert stop < delete


def test_missing_slices_are_gone_after_three_status_checks(table, tmp_path):
    table.request(nodes=["vit-0", "vit-1", "vit-2"])
    cloud = CloudTpu(tpu(slices=3), FakeClock(), Journal(tmp_path, quiet=True), owned=True)
    assert [cloud.status().kind for _ in range(3)] == ["waiting", "waiting", "gone"]


def test_a_request_of_several_nodes_may_show_their_number_only(table, tmp_path, capsys):
    """The API has one spec for all slices; the names of the nodes follow from it."""
    table.request()
    many = {"nodeCount": 2, "nodeIdPrefix": "vit"}
    spec = {"multisliceParams": many, "node": {"labels": OURS, "acceleratorType": "v4-16"}}
    table.requests["vit"]["tpu"]["nodeSpec"] = [spec]
    for name in ("vit-0", "vit-1"):
        table.node(name)
    cloud = CloudTpu(tpu(slices=2), FakeClock(), Journal(tmp_path, quiet=True), owned=True)
    assert cloud.status().hosts == [("vit-0", 2), ("vit-1", 2)]
    assert verb("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["machines"]
    price = 2 * accelerators.parse("v4-16").price
    assert [(row["name"], row["usd_per_hour"]) for row in rows] == [("vit", price)]


def idle_agent(worker: int, line: str) -> Result:
    return status("absent", 0) if "agent.sh status" in line else Result(0, b"", "")


def test_an_adopted_machine_with_fewer_workers_than_its_type_goes_on(table, tmp_path):
    """It may train, and the API be wrong; if nothing runs on it, it is deleted."""
    table.request()
    table.node(networkEndpoints=[{}])
    made = launcher(tmp_path)
    made.journal.state["attempt"] = 3
    assert made.machine.acquire().kind == "short" and made.clock.now() > 1e6 + 300
    assert table.did("agent.sh stop") == table.did(" delete ") == []
    table.agent = idle_agent
    assert launcher(tmp_path).run() == 75
    assert table.did("agent.sh start") == [] and table.requests == {}


@pytest.mark.parametrize("words, waits", [([], True), (["--existing"], False)])
def test_fewer_workers_than_the_type_has_end_the_run_before_training(table, tmp_path, words, waits):
    """A new machine has five minutes to list them all; nothing is started."""
    table.request()
    table.node(networkEndpoints=[{}])
    made = launcher(tmp_path, *words)
    made.machine.created = not words
    began = made.clock.now()
    with pytest.raises(Stop, match="vit: it has 1 workers, not 2; check --type") as stop:
        made.machine.acquire()
    assert (stop.value.code, made.clock.now() - began > 300) == (75, waits)
    assert table.did("agent.sh start") == []
    table.node()
    assert made.machine.acquire().kind == "ready"


# --- the queue


def test_an_adopted_request_that_is_never_granted_is_withdrawn(table, tmp_path):
    """After --valid-until: otherwise it could be granted when no launcher runs any more."""
    table.request(state="WAITING_FOR_RESOURCES")
    made = launcher(tmp_path, "--valid-until", "10m")
    assert made.run() == 69
    assert table.requests == {}


def test_ctrl_c_withdraws_a_request_whose_creation_got_no_response(table, tmp_path):
    """A status check before the launcher exits finds the machine."""
    made = launcher(tmp_path)
    lost = Result(1, b"", "HTTP 503: the service is unavailable")
    table.on["create"] = [lost] * 5

    def interrupt(delay):
        table.request(state="ACCEPTED")
        made.shutdown.signals += 1
        made.shutdown.check_interrupt(False)

    made.machine.pause = interrupt
    assert made.run() == 130
    assert table.requests == {} and len(table.did("create")) == 5


def test_without_gcloud_nothing_is_requested(table, tmp_path):
    made = launcher(tmp_path)
    table.on["create"] = [Result(gcloud.NOT_STARTED, b"", "gcloud: No such file")]
    with pytest.raises(Stop, match="gcloud is missing; install it: https") as stop:
        made.machine.acquire()
    assert (stop.value.code, made.machine.requested) == (77, False)


def test_a_ready_machine_with_unreachable_workers_is_kept(table, tmp_path):
    table.request()
    table.node()
    table.agent = lambda worker, line: NO_ANSWER
    made = launcher(tmp_path)
    assert made.run() == 75
    assert "vit" in table.requests


@pytest.mark.parametrize(
    "later, mine", [({}, True), ({"watcher": "other"}, False), ({"sitter": "other"}, False)]
)
def test_a_kept_machine_is_deleted_unless_another_launcher_has_used_it(
    table, tmp_path, later, mine
):
    """Also one of an earlier version, which writes the key's former name."""
    (tmp_path / "state.json").write_text('{"sitter": "before"}')
    made = launcher(tmp_path)
    made.train = lambda: None
    assert made.run() == 0
    made.machine.cloud.owned = True
    state = made.journal.state
    made.journal.release_lock = lambda: made.journal.put("state.json", json.dumps(state | later))
    assert made.shutdown.keep(60) is mine


def test_labels_are_renewed(table, tmp_path):
    """At creation, at adoption, and every hour of waiting."""
    old = tpu()
    made = CloudTpu(dataclasses.replace(old, labels={**OURS, "expires": "5"}), FakeClock(), None)
    made.journal = Journal(tmp_path, quiet=True)
    made.create()
    assert "expires=5," not in table.did("create")[0]
    table.request(state="WAITING_FOR_RESOURCES")
    launcher(tmp_path, "--valid-until", "3h").run()
    assert len(table.did("update", "--update-labels")) in (3, 4)


def test_labels_are_renewed_as_soon_as_a_long_wait_ends(table, tmp_path):
    """Until a worker runs the agent, only the label shows that the machine is in use."""
    made = launcher(tmp_path)

    def pause(delay):
        made.clock.sleep(delay)
        if made.clock.now() > 1e6 + 2.02 * 3600 and not table.nodes:
            table.requests["vit"]["state"]["state"] = "ACTIVE"
            table.node()
            table.calls.append("it is there")

    made.machine.pause = pause
    made.machine.acquire()
    assert "--update-labels" in table.calls[-1] and made.machine.created


# --- gc


def collect(*words: str) -> int:
    return verb("gc", "--zone", "z", "--yes", *words)


EARLIER = Result(0, b"#STATUS attempt=1 state=ended rc=0 now=5\n#LOG\n", "")
EXPIRED = {**OURS, "expires": "1000"}


@pytest.mark.parametrize(
    "answers, deleted, message",
    [
        ([status("running"), status("running")], False, "in use: "),
        ([NO_ANSWER, NO_ANSWER], False, "in use, not reached: "),
        ([status("ended"), NO_ANSWER], False, "in use, not reached: "),
        ([status("ended"), status("running")], False, "in use: "),
        ([status("absent", 0, "me:1:x 1"), status("absent", 0)], False, "in use: "),
        ([EARLIER, EARLIER], False, "agent of an earlier version, use delete: "),
        ([EARLIER, status("running")], False, "in use: "),
        ([status("ended"), status("ended")], True, "deleted: "),
    ],
)
def test_gc_deletes_a_machine_only_if_all_workers_are_idle(
    table, run_folder, capsys, answers, deleted, message
):
    table.request(labels=EXPIRED)
    table.node(labels=EXPIRED)
    table.agent = lambda worker, line: answers[worker]
    assert collect("--iap") == 0
    assert capsys.readouterr().out.startswith(message)
    assert (table.requests == {}) == deleted
    assert all("--tunnel-through-iap" in line for line in table.did(" ssh "))


def test_gc_keeps_queued_requests_and_machines_of_other_owners(table, run_folder, capsys):
    table.request(state="WAITING_FOR_RESOURCES", labels=EXPIRED)
    table.request("other", "FAILED", labels={**EXPIRED, "owner": "eve"})
    assert collect() == 0
    output = capsys.readouterr().out
    assert output.startswith("in use: ") and "another's: " in output
    assert table.did("delete") == []
    collect("--owner", "all")
    assert list(table.requests) == ["vit"]


# --- billing and limits


def test_hours_are_billed_while_the_laptop_sleeps(table, tmp_path):
    clock = FakeClock()
    billing = Billing(1.0, clock, Journal(tmp_path, quiet=True))
    billing.begin()
    clock.asleep = 7200.0
    assert billing.hours == 2.0
    clock.asleep = 0.0
    assert billing.hours == 2.0, "setting the clock back does not reduce the hours"


def test_durations_are_checked_when_flags_are_parsed():
    with pytest.raises(Stop, match="'1h30m' is not a duration") as stop:
        flags.parser().parse_args(["--valid-until", "1h30m"])
    assert stop.value.code == 64


def test_what_is_uploaded_is_not_readable_by_others(tmp_path):
    command = f"{worker_commands.probe('c0de')} && {worker_commands.receive('x', b'code')}"
    umask = os.umask(0o022)
    try:
        done = gcloud.run(["env", "-C", str(tmp_path), "bash", "-c", command], b"code")
    finally:
        os.umask(umask)
    assert (done.code, done.out) == (0, b"ready\n")
    modes = [path.stat().st_mode & 0o077 for path in tmp_path.rglob("*")]
    assert modes == [0] * 6


# --- worker 0's reaper


def test_the_reaper_uses_the_machines_zone_and_respects_keep(tmp_path):
    machine = dataclasses.replace(tpu(), zone="elsewhere")
    assert "--zone elsewhere" in worker_commands.reap(plan(tmp_path), machine)
    assert " reap vit-1 3600 " in worker_commands.reap(plan(tmp_path), machine)
    long = plan(tmp_path, "--on-failure", "keep:3h")
    assert " reap vit-1 11400 " in worker_commands.reap(long, machine)
    for flag in ("--on-success", "--on-failure"):
        command = worker_commands.reap(plan(tmp_path, flag, "keep"), machine)
        assert command.endswith("disarm vit-1")


def test_the_lease_is_renewed_while_workers_are_prepared(table, tmp_path):
    made = launcher(tmp_path)
    made.workers = TwoWorkers([], [])
    made.clock.scale = 0.0001
    made.provisioner = SimpleNamespace(prepare=lambda: time.sleep(0.2))
    made.prepare()
    assert len(made.workers.did(f"agent.sh lease {RUN}")) > 2


# --- checks that only a worker can do


class ShowingWorkers(TwoWorkers):
    def __init__(self, reply: Result):
        super().__init__([], [])
        self.reply = reply

    def shell(self, worker, line, stdin, limit):
        self.lines.append((worker, line))
        if "agent.sh show" in line:
            return self.reply
        return Result(0, b'#FINGERPRINT {"python": "3.12"}\n', "")


def prepare_workers(folder: pathlib.Path, reply: Result) -> ShowingWorkers:
    workers, clock = ShowingWorkers(reply), FakeClock()
    made = plan(folder, show=preflight.show_arguments("x", ["--config.seed=1"], 8))
    journal = Journal(folder, quiet=True)
    Provisioner(made, workers, clock, journal, lambda: None, clock.sleep).prepare()
    return workers


def test_worker_0_checks_the_config_and_finds_the_data_it_needs(tmp_path):
    """Without Python 3.11 here, worker 0 checks the config; every worker downloads the data."""
    cifar = {"data": {"name": "cifar10", "path": ".data"}, "init": {"source": ""}}
    out = json.dumps({"config": cifar}).encode()
    workers = prepare_workers(tmp_path, Result(0, out, ""))
    show = "agent.sh show c0de show --config x --json --devices 8 --config.seed=1"
    assert workers.did(show) == [0]
    download = "'vit-scale data download cifar10 --out .data'"
    assert sorted(workers.did(download)) == [0, 1]
    assert workers.did("agent.sh prepare")[:2] in ([0, 1], [1, 0])


@pytest.mark.parametrize(
    "reply, code",
    [
        (Result(1, b"", "noise\nvit-scale: no config field is named 'x'"), 65),
        (Result(0, b'{"config": {"data": {"name": "x", "path": ".d"}}}', ""), 65),
        (Result(1, b"", "bash: vit-scale: cannot execute"), 70),
    ],
)
def test_an_error_on_worker_0_ends_the_run(tmp_path, reply, code):
    with pytest.raises(Stop) as stop:
        prepare_workers(tmp_path, reply)
    assert stop.value.code == code


def test_bad_input_releases_the_machine(table, tmp_path):
    made = launcher(tmp_path)
    table.request()
    made.machine.cloud.owned = made.shutdown.workers_known = True
    assert made.shutdown.apply_policy(65) is True and table.requests == {}


def test_workers_behind_a_rate_limit_are_asked_again_a_minute_later(tmp_path):
    """gcloud repeats nothing itself, and the limits are per minute."""
    limit = "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests'"
    answers = [Result(1, b"", limit)] * 3 + [Result(0, b"", "")]
    clock, workers = FakeClock(), TwoWorkers([], [])
    began = clock.now()
    made = Provisioner(plan(tmp_path), workers, clock, Journal(tmp_path), lambda: None, clock.sleep)
    made.retry_on_all("reach", [0], lambda worker: answers.pop(0))
    assert (answers, clock.now() - began) == ([], 180)


def test_the_output_of_a_failed_worker_is_shown(tmp_path, capsys):
    """Not only its last line."""
    failed = Result(70, b"", "pip: no such wheel\nagent: the environment could not be made")
    clock, workers = FakeClock(), TwoWorkers([], [])
    workers.shell = lambda *words: failed
    made = Provisioner(plan(tmp_path), workers, clock, Journal(tmp_path), lambda: None, clock.sleep)
    with pytest.raises(Stop):
        made.prepare_workers()
    assert "[w00] pip: no such wheel" in capsys.readouterr().err


def test_the_output_of_a_hanging_command_is_shown():
    line = "echo 'Permission denied (publickey).' >&2; sleep 30"
    result = gcloud.run(["bash", "-c", line], timeout=0.5)
    assert result.code == 124
    assert result.err.endswith("s: Permission denied (publickey).")
    assert gcloud.error(result.err).kind == "key"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--nmae", "x"], r"unrecognized arguments: --nmae \(did you mean --name\?\)"),
        (["--zoen=x"], r"unrecognized arguments: --zoen \(did you mean --zone\?\)"),
    ],
)
def test_misspelt_flags_get_a_suggestion(words, message):
    with pytest.raises(Stop, match=message):
        flags.parser().parse_args(words)

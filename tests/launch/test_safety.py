"""What the launcher may delete, and what it must leave alone: one part at a time, gcloud's answers
from a table, no process and no waiting."""

import dataclasses
import errno
import json
import os
import pathlib
import time
from types import SimpleNamespace

import pytest

from launch.tpu import cli, cloud_tpu, flags, fleet, gcloud, run_registry, verbs, worker_commands
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
from launch.tpu.transport import Workers

RUN = "vit-1"
OURS = {"managed-by": "vit_scale", "run": RUN, "owner": "ada"}
WHO = "This command is authenticated as a which is the active account specified by [core/account]"


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
        if verb == "ssh":
            worker = int(argv[argv.index("--worker") + 1])
            return self.agent(worker, argv[-1])
        if verb == "list":
            return Result(0, json.dumps(list(entries.values())).encode(), "")
        if verb == "create":
            if name in entries or name in self.nodes:
                return Result(1, b"", f"ERROR: ALREADY_EXISTS: Resource '{name}' already exists")
            marks = dict(pair.split("=") for pair in argv[argv.index("--labels") + 1].split(","))
            self.request(name, "WAITING_FOR_RESOURCES", marks)
            return Result(0, b"", "")
        if name not in entries:
            return Result(1, b"", f"ERROR: NOT_FOUND: Resource '{name}' was not found. {WHO}")
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


def status(state: str, number: int = 1, more: str = "") -> Result:
    text = f"#STATUS attempt={number} state={state} rc= ended= now=5 free_gb=9 stopped=0\n"
    beat = '{"run": "x", "step": 7, "phase": "train"}' if state == "running" else ""
    return Result(0, f"{text}#SITTER {more}\n#HEARTBEAT {beat}\n#LOG 0 0\n".encode(), "")


DEAD = Result(124, b"", "no answer in 60 s")


class Two(Workers):
    """Two workers that answer `status` from lists; the last answer repeats."""

    count = 2

    def __init__(self, *answers):
        self.answers, self.lines = [list(a) for a in answers], []

    def shell(self, worker, line, stdin, limit):
        self.lines.append((worker, line))
        if "agent.sh status" not in line:
            return Result(0, b"", "")
        left = self.answers[worker]
        return left.pop(0) if len(left) > 1 else left[0]

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
        steps=12,
        setup="",
        secrets={},
        code=Bundle("c0de", b"", "x"),
        **{"tpu": tpu(), "zones": ["z"], **more},
    )


def launcher(folder: pathlib.Path, *words: str, **more) -> Launcher:
    clock, journal = FakeClock(), Journal(folder, quiet=True)
    made = plan(folder, *words, **more)
    return Launcher(made, CloudTpu(made.tpu, clock, journal), None, clock, journal)


# --- whose machine it is


def test_anothers_tpu_vm_of_the_name_is_refused_and_left(table, tmp_path):
    """A plain TPU VM has the name of the queued resource: exit code 64, nothing created."""
    table.node(request="", labels={})
    made = launcher(tmp_path)
    assert made.run() == 64
    assert table.did("create") == table.did("delete") == [] and "vit" in table.nodes
    assert not (tmp_path / "launch.json").exists(), "`stop` must not take it for its own"


def test_what_exists_is_looked_at_before_it_is_ours(table, tmp_path):
    """A request that appears between the status check and the creation is another's."""

    def between(argv, **_):
        if "create" in argv:
            table.request(labels={**OURS, "run": "vit-2", "owner": "eve"})
        return table(argv)

    gcloud.run = between  # `table` puts it back
    assert launcher(tmp_path).run() == 64
    assert table.did("delete") == []


def test_what_exists_and_is_never_seen_is_given_up(table, tmp_path):
    refused = Result(1, b"", "ERROR: ALREADY_EXISTS: Resource 'vit' already exists")
    table.on["create"] = [refused] * 99
    made = launcher(tmp_path)
    began = made.clock.now()
    assert made.run() == 64
    assert len(table.did("create")) == 6 and made.clock.now() - began > 300


def test_a_node_is_deleted_if_it_is_left_of_our_request(table, tmp_path):
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


def test_a_request_that_is_anothers_by_now_is_not_deleted(table, tmp_path):
    table.request(labels={**OURS, "run": "vit-2"})
    CloudTpu(tpu(), FakeClock(), Journal(tmp_path, quiet=True), owned=True).delete()
    assert table.did("delete") == []


def test_a_machine_made_in_the_other_way_is_found(table, tmp_path):
    """Created with --no-queue or by a request: it is the same run's machine."""
    table.node(request="")
    found = CloudTpu(tpu(), FakeClock(), Journal(tmp_path, quiet=True), owned=True)
    assert (found.status().kind, found.tpu.queue) == ("ready", False)
    table.request()
    table.node()
    found = CloudTpu(tpu(queue=False), FakeClock(), Journal(tmp_path, quiet=True), owned=True)
    assert (found.status().kind, found.tpu.queue) == ("ready", True)


@pytest.fixture
def notes(table, tmp_path, monkeypatch) -> pathlib.Path:
    """The run's folder, as a launcher writes it."""
    folder = tmp_path / "runs" / RUN
    folder.mkdir(parents=True)
    for module in (run_registry, fleet):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "runs")
    for module in (run_registry, verbs, fleet, cloud_tpu):
        if hasattr(module, "Clock"):
            monkeypatch.setattr(module, "Clock", FakeClock)
    request = {"run": RUN, "name": "vit", "tpu": vars(tpu()), "existing": False, "price": None}
    (folder / "launch.json").write_text(json.dumps(request))
    return folder


def verb(*words: str) -> int:
    args = flags.parser().parse_args([*words, "--name", "vit"])
    return cli.VERBS[args.verb](args)


@pytest.mark.parametrize("words", [["stop"], ["delete", "--yes"]])
def test_another_runs_machine_is_neither_stopped_nor_deleted(table, notes, words):
    table.request(labels={**OURS, "run": "vit-2", "owner": "eve"})
    table.node(labels={**OURS, "run": "vit-2", "owner": "eve"})
    with pytest.raises(Stop, match="run vit-2 of eve") as stop:
        verb(*words)
    assert stop.value.code == 64 and table.did("delete") == table.did("agent.sh stop") == []
    if words[0] == "delete":
        assert verb(*words, "--owner", "eve") == 0
        assert table.requests == {}


def test_stop_waits_for_who_is_not_reached(table, notes):
    """An unreachable worker is not a stopped one: it is asked again before the deletion."""
    table.request()
    table.node()
    asked = []

    def agent(worker, line):
        asked.append((worker, line))
        if worker == 1 and len(asked) < 20:
            return DEAD
        return status("ended" if len(asked) > 30 else "running")

    table.agent = agent
    assert verb("stop", "--grace", "10m") == 0
    assert len(asked) > 30 and table.requests == {}
    assert sum("agent.sh stop vit-1 1" in line for worker, line in asked if worker == 1) > 3


def test_stop_deletes_after_the_grace_and_keeps_what_may_train(table, notes):
    table.request()
    table.node()
    table.agent = lambda worker, line: DEAD
    with pytest.raises(Stop, match=r"may still train: \[w00\] not reached"):
        verb("stop", "--keep")
    assert table.did("delete") == []
    assert verb("stop", "--grace", "1m") == 0 and table.requests == {}


def test_stop_takes_a_waiting_request_out_of_the_queue(table, notes):
    table.request(state="WAITING_FOR_RESOURCES")
    assert verb("stop") == 0 and table.requests == {}


def test_a_plain_node_is_deleted_by_its_name(table, notes):
    """The verb need not know that it was created with --no-queue, nor its run."""
    table.node(request="")
    assert verb("delete", "--yes") == 0 and table.nodes == {}
    (notes / "launch.json").unlink()
    table.node(request="")
    assert verb("delete", "--yes", "--zone", "z") == 0 and table.nodes == {}
    table.node(request="", labels={**OURS, "owner": "eve"})
    with pytest.raises(Stop, match="of eve; to delete it, pass --owner eve"):
        verb("delete", "--yes", "--zone", "z")
    assert "vit" in table.nodes


# --- what trains


def taken_up(folder, *answers, number=1) -> tuple[Launcher, Attempt | None]:
    made = launcher(folder)
    made.workers = Two(*answers)
    made.check = lambda: None
    made.provisioner = Provisioner(
        made.plan, made.workers, made.clock, made.journal, made.check, made.pause
    )
    return made, made.find_attempt()


def test_an_attempt_is_taken_up_where_a_worker_does_not_answer(table, tmp_path):
    """One failed status call does not end a training."""
    running = status("running")
    made, attempt = taken_up(tmp_path, [running], [running, DEAD, DEAD, running])
    assert attempt and [view.state for view in attempt.views] == ["running", "running"]
    made, attempt = taken_up(tmp_path, [running], [running, DEAD])
    assert attempt and attempt.views[1].state == "unknown"
    assert made.workers.did("agent.sh stop") == []


def test_an_attempt_that_began_in_part_is_ended(table, tmp_path):
    """All workers say so, and no step was made."""
    begun = Result(0, status("running").out.replace(b'"step": 7', b'"step": 0'), "")
    made, attempt = taken_up(tmp_path, [begun], [status("absent", 0), status("absent", 0)])
    assert attempt is None and made.workers.did("agent.sh stop vit-1 1 0") == [0, 1]
    made, attempt = taken_up(tmp_path, [status("running")], [status("absent", 0)])
    assert attempt is not None, "what has made steps is judged"


@pytest.mark.parametrize("training", [True, False])
def test_a_mistake_in_the_launcher_does_not_end_a_training(table, tmp_path, capsys, training):
    """Nor delete its machine."""
    table.request()
    table.node()
    made = launcher(tmp_path)
    made.machine.cloud.owned = made.machine.created = made.shutdown.workers_known = True
    made.machine.fresh = False

    def spoil():
        if training:
            made.workers = Two([status("running")])
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

    made.train = spoil
    assert made.run() == 70
    assert bool(table.requests) == training
    assert "bug in the launcher" in json.loads(capsys.readouterr().out)["cause"]


class Broken:
    """A closed terminal."""

    def __init__(self, number: int):
        self.number, self.told = number, 0

    def write(self, text):
        self.told += 1
        raise OSError(errno.EIO, "gone")

    def flush(self):
        raise BrokenPipeError

    def fileno(self):
        return self.number


def test_a_terminal_that_is_gone_and_a_full_disk_are_no_errors(table, tmp_path, monkeypatch):
    streams = [Broken(os.open(os.devnull, os.O_WRONLY)) for _ in range(2)]
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
    assert [stream.told > 0 for stream in streams] == [True, True]
    (tmp_path / "file").write_text("")  # below which no folder can be made
    full = Journal(tmp_path / "file" / "run", quiet=True)
    full.write("event")
    full.save()
    full.add_log(1, 0, "x")
    assert full.read_log(1, 0) == "" and full.put("x", "y") is False


def test_health_decides_before_training_and_not_under_it(table, tmp_path):
    table.request()
    table.node(health="UNHEALTHY_MAINTENANCE")
    made = launcher(tmp_path)
    made.machine.check()
    assert made.machine.acquire().kind == "unhealthy", "it is taken up, for it may train"
    table.nodes["vit"]["state"] = "REPAIRING"
    with pytest.raises(Gone):
        made.machine.check()


def test_a_sick_machine_is_asked_to_save_before_it_is_removed(table, tmp_path):
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


def test_one_look_that_misses_three_slices_is_not_the_end(table, tmp_path):
    table.request(nodes=["vit-0", "vit-1", "vit-2"])
    found = CloudTpu(tpu(slices=3), FakeClock(), Journal(tmp_path, quiet=True), owned=True)
    assert [found.status().kind for _ in range(3)] == ["waiting", "waiting", "gone"]


# --- the queue


def test_a_request_that_is_taken_up_and_never_ready_is_withdrawn(table, tmp_path):
    """After --valid-until: else it could be granted with no launcher left."""
    table.request(state="WAITING_FOR_RESOURCES")
    made = launcher(tmp_path, "--valid-until", "10m")
    assert made.run() == 69
    assert table.requests == {}


def test_what_was_made_without_an_answer_is_withdrawn_too(table, tmp_path):
    """Ctrl-C after a creation whose answer was lost: a status check finds the machine."""
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


def test_a_machine_that_was_ready_is_left_where_its_training_is_not_known(table, tmp_path):
    table.request()
    table.node()
    table.agent = lambda worker, line: DEAD
    made = launcher(tmp_path)
    assert made.run() == 75
    assert "vit" in table.requests


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


def test_what_waited_long_says_at_once_that_it_is_wanted(table, tmp_path):
    """Its label dates from the creation, and decides until a worker has the agent."""
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


EXPIRED = {**OURS, "expires": "1000"}


@pytest.mark.parametrize(
    "answers, deleted, said",
    [
        ([status("running"), status("running")], False, "in use: "),
        ([DEAD, DEAD], False, "in use, not reached: "),
        ([status("ended"), DEAD], False, "in use, not reached: "),
        ([status("ended"), status("running")], False, "in use: "),
        ([status("absent", 0, "me:1:x 1"), status("absent", 0)], False, "in use: "),
        ([status("ended"), status("ended")], True, "deleted: "),
    ],
)
def test_gc_deletes_what_all_workers_say_is_idle(table, notes, capsys, answers, deleted, said):
    table.request(labels=EXPIRED)
    table.node(labels=EXPIRED)
    table.agent = lambda worker, line: answers[worker]
    assert collect("--iap") == 0
    assert capsys.readouterr().out.startswith(said)
    assert (table.requests == {}) == deleted
    assert all("--tunnel-through-iap" in line for line in table.did(" ssh "))


def test_gc_leaves_what_waits_and_what_is_anothers(table, notes, capsys):
    table.request(state="WAITING_FOR_RESOURCES", labels=EXPIRED)
    table.request("other", "FAILED", labels={**EXPIRED, "owner": "eve"})
    assert collect() == 0
    output = capsys.readouterr().out
    assert output.startswith("in use: ") and "another's: " in output
    assert table.did("delete") == []
    collect("--owner", "all")
    assert list(table.requests) == ["vit"]


# --- money and limits


def test_hours_count_while_the_laptop_sleeps(table, tmp_path):
    clock = FakeClock()
    billing = Billing(1.0, clock, Journal(tmp_path, quiet=True))
    billing.begin()
    clock.asleep = 7200.0
    assert billing.hours == 2.0
    clock.asleep = 0.0
    assert billing.hours == 2.0, "a clock that is put back takes nothing back"


def test_durations_are_checked_when_they_are_given():
    with pytest.raises(Stop, match="'1h30m' is not a duration") as stop:
        flags.parser().parse_args(["--valid-until", "1h30m"])
    assert stop.value.code == 64


# --- worker 0's reaper


def test_the_reaper_is_of_the_zone_and_keeps_what_is_to_be_kept(tmp_path):
    there = dataclasses.replace(tpu(), zone="elsewhere")
    assert "--zone elsewhere" in worker_commands.reap(plan(tmp_path), there)
    assert " reap vit-1 3600 " in worker_commands.reap(plan(tmp_path), there)
    long = plan(tmp_path, "--on-failure", "keep:3h")
    assert " reap vit-1 11400 " in worker_commands.reap(long, there)
    for end in ("--on-success", "--on-failure"):
        kept = worker_commands.reap(plan(tmp_path, end, "keep"), there)
        assert kept.endswith("disarm vit-1")


def test_the_lease_is_renewed_while_workers_are_prepared(table, tmp_path):
    made = launcher(tmp_path)
    made.workers = Two([], [])
    made.clock.scale = 0.0001
    with made.lease():
        time.sleep(0.2)
    assert len(made.workers.did(f"agent.sh lease {RUN}")) > 2


# --- what only a worker can check


class Shows(Two):
    def __init__(self, shown: Result):
        super().__init__([], [])
        self.shown = shown

    def shell(self, worker, line, stdin, limit):
        self.lines.append((worker, line))
        if "agent.sh show" in line:
            return self.shown
        return Result(0, b'#FINGERPRINT {"python": "3.12"}\n', "")


def prepared(folder: pathlib.Path, shown: Result) -> Shows:
    workers, clock = Shows(shown), FakeClock()
    made = plan(folder, unchecked=True, devices=8, overrides=["--config.seed=1"])
    journal = Journal(folder, quiet=True)
    Provisioner(made, workers, clock, journal, lambda: None, clock.sleep).prepare()
    return workers


def test_worker_0_checks_the_config_and_says_what_it_needs(tmp_path):
    """Without Python 3.11 here, worker 0 checks the config and downloads the data."""
    cifar = {"data": {"name": "cifar10", "path": ".data"}, "init": {"source": ""}}
    out = json.dumps({"config": cifar}).encode()
    workers = prepared(tmp_path, Result(0, out, ""))
    show = "agent.sh show c0de show --config x --json --devices 8 --config.seed=1"
    assert workers.did(show) == [0]
    download = "'vit-scale data download cifar10 --out .data'"
    assert sorted(workers.did(download)) == [0, 1]
    assert workers.did("agent.sh prepare")[:2] in ([0, 1], [1, 0])


@pytest.mark.parametrize(
    "shown, code",
    [
        (Result(1, b"", "noise\nvit-scale: no config field is named 'x'"), 65),
        (Result(0, b'{"config": {"data": {"name": "x", "path": ".d"}}}', ""), 65),
        (Result(1, b"", "bash: vit-scale: cannot execute"), 70),
    ],
)
def test_a_mistake_that_worker_0_finds_ends_it(tmp_path, shown, code):
    with pytest.raises(Stop) as stop:
        prepared(tmp_path, shown)
    assert stop.value.code == code


def test_bad_input_releases_the_machine(table, tmp_path):
    made = launcher(tmp_path)
    table.request()
    made.machine.cloud.owned = made.shutdown.workers_known = True
    assert made.shutdown.apply_policy(65) is True and table.requests == {}


def test_what_a_worker_said_is_shown_where_the_message_is_above(tmp_path, capsys):
    """Not only "see above"."""
    failed = Result(70, b"", "pip: no such wheel\nagent: the environment could not be made")
    clock, workers = FakeClock(), Two([], [])
    workers.shell = lambda *words: failed
    made = Provisioner(plan(tmp_path), workers, clock, Journal(tmp_path), lambda: None, clock.sleep)
    with pytest.raises(Stop):
        made.prepare_workers()
    assert "[w00] pip: no such wheel" in capsys.readouterr().err


def test_what_a_hanging_command_has_said_is_shown():
    line = "echo 'Permission denied (publickey).' >&2; sleep 30"
    result = gcloud.run(["bash", "-c", line], timeout=0.5)
    assert result.code == 124
    assert result.err.endswith("s: Permission denied (publickey).")
    assert gcloud.error(result.err).kind == "key"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nmae", "x"], r"unrecognized arguments: --nmae \(did you mean --name\?\)"),
        (["--zoen=x"], r"unrecognized arguments: --zoen \(did you mean --zone\?\)"),
    ],
)
def test_a_misspelt_flag_is_named(words, said):
    with pytest.raises(Stop, match=said):
        flags.parser().parse_args(words)

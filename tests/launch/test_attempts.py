"""Attempts that are adopted, watched and stopped, on healthy machines and on others."""

import errno
import json
import os
import pathlib
from types import SimpleNamespace

import pytest

from launch.tpu import (
    accelerators,
    gcloud,
)
from launch.tpu.allocation import Gone
from launch.tpu.attempt import Attempt
from launch.tpu.cloud_tpu import CloudTpu
from launch.tpu.diagnosis import Cause
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.gcloud import Result
from launch.tpu.journal import Journal
from launch.tpu.launcher import Launcher
from launch.tpu.provision import Provisioner
from launch.tpu.transport import GcloudWorkers, on_all
from tests.helpers.fake_launcher import (
    NO_ANSWER,
    OURS,
    FakeClock,
    TwoWorkers,
    launcher,
    status,
    tpu,
    verb,
)


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


@pytest.mark.parametrize(("attempt", "code"), [(1, 0), (0, 75)])
def test_a_worker_that_cannot_be_prepared_again_costs_its_machine(table, tmp_path, attempt, code):
    """Of a run that has trained; else the first machine would only be the first of many."""
    table.request()
    made, ends = launcher(tmp_path), [Stop(Exit.INFRASTRUCTURE, "unreachable")] * 2

    def run_attempt():
        if ends:
            raise ends.pop()
        return Cause("done", None, "", "")

    made.acquire, made.run_attempt = lambda: None, run_attempt
    made.machine.created = made.machine.cloud.owned = True
    made.journal.state["attempt"] = attempt
    assert made.run() == code
    assert bool(table.did("delete")) and ends == ([] if attempt else ends)
    said = (tmp_path / "journal.jsonl").read_text()
    assert ("replacing the machine" in said) == bool(attempt)


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

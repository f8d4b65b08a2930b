"""What the launcher may delete and what it must leave alone: unit tests with a fake gcloud and a
fake clock, without processes or waiting."""

import dataclasses
import json
import os
import pathlib
import time
from types import SimpleNamespace

import pytest

from launch.tpu import (
    cloud_tpu,
    flags,
    fleet,
    gcloud,
    preflight,
    verbs,
    worker_commands,
)
from launch.tpu.billing import Billing
from launch.tpu.cloud_tpu import CloudTpu
from launch.tpu.exit_codes import Stop
from launch.tpu.gcloud import Result
from launch.tpu.journal import Journal
from launch.tpu.provision import Provisioner
from tests.helpers.fake_launcher import (
    NO_ANSWER,
    OURS,
    RUN,
    FakeClock,
    TwoWorkers,
    launcher,
    plan,
    status,
    tpu,
    verb,
)

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


def test_a_refused_deletion_is_said_at_once(table, tmp_path):
    table.request()
    table.on["delete"] = [Result(1, b"", "ERROR: PERMISSION_DENIED: tpu.nodes.delete")] * 99
    clock = FakeClock()
    began = clock.now()
    with pytest.raises(Stop, match=r"tpu\.nodes\.delete"):
        CloudTpu(tpu(), clock, Journal(tmp_path, quiet=True), owned=True).delete()
    assert clock.now() - began < 60


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


# --- the queue


def test_an_adopted_request_that_is_never_granted_is_withdrawn(table, tmp_path):
    """After --valid-until: otherwise it could be granted when no launcher runs any more."""
    table.request(state="WAITING_FOR_RESOURCES")
    made = launcher(tmp_path, "--valid-until", "10m")
    assert made.run() == 69
    assert table.requests == {}


def test_a_creation_that_comes_to_nothing_is_a_stockout(table, tmp_path):
    """Without a queue it is asynchronous: its error is in no answer."""
    more = {"tpu": tpu(queue=False), "zones": ["a", "b"]}
    assert launcher(tmp_path, "--valid-until", "10m", **more).run() == 69
    zones = [line.partition("--zone ")[2].split()[0] for line in table.did("create")]
    assert zones[:4] == ["a", "b", "a", "b"] and len(zones) < 20


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
    cifar = {
        "data": {"name": "cifar10", "path": ".data"},
        "init": {"source": ""},
        "objective": "mae",
    }
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
        (Result(0, b'{"config": {"data": {"name": "tar", "path": ".d"}}}', ""), 65),
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

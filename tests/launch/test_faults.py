"""launch/tpu_vm.sh against a fake cloud: after any fault, one trainer per worker, the root cause
reported, the documented exit code, and no machine left behind."""

import json
import os
import signal

import pytest

from tests.helpers.fake_cloud import Rig

QUICK = {"timelines": [["ACTIVE"]]}  # no waiting in the queue


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path, **QUICK)
    yield made
    made.close()
    made.check()


def fault(match: str, do: str, nth: int = 1, times: int = 1) -> dict:
    return {"match": match, "nth": nth, "times": times, "do": do}


def fault_at(worker: int, step: int, do: str, **more) -> dict:
    return {"worker": worker, "step": step, "do": do, **more}


def slow(*values):
    """Mark a case that adds little to the others: run it with -m slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def cause(rig: Rig, attempt: int = 1) -> str:
    return (rig.run_folder() / f"a{attempt}" / "cause.txt").read_text().splitlines()[0]


def test_happy_path(rig):
    """One start per worker, all logs collected, the machine deleted, one JSON line at the end."""
    rig.set(timelines=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    code, result, err = rig.run()
    assert code == 0, err
    assert (result["result"], result["steps"], result["attempts"]) == ("done", 12, 1)
    assert result["cloud"] == "deleted" and rig.is_empty()
    assert rig.attempts() == {1: [0, 1]}
    for worker in (0, 1):
        log = (rig.run_folder() / "a1" / f"w{worker:02}.log").read_text().splitlines()
        assert log == [f"worker {worker} step {step}" for step in range(1, 13)]
        assert f"[w{worker:02}] worker {worker} step 12" in err
    again = rig.run()
    assert (again.code, len(rig.calls("create"))) == (0, 1), "a finished run is not billed again"
    assert "is done" in again.err


def test_disagreeing_hosts_end_the_run_without_a_retry(rig):
    rig.trainer_faults(*(fault_at(worker, 0, "disagree") for worker in (0, 1)))
    code, result, err = rig.run()
    assert (code, result["result"], result["attempts"]) == (65, "bad input", 1), err
    assert "process 1 differs from process 0" in result["cause"]
    assert len(rig.calls("create")) == 1 and rig.is_empty()
    assert cause(rig).startswith("input: [w0")


@pytest.mark.parametrize(
    "failure, kind, message",
    [
        (fault_at(1, 5, "raise", attempt=1), "user", "[w01] exit code 1: image 3 is corrupt"),
        (fault_at(1, 5, "kill", attempt=1), "infra", "[w01] killed by signal 9: worker 1 step 5"),
        slow(fault_at(0, 6, "killall", attempt=1), "infra", "[w00] lost: its processes vanished"),
        (fault_at(1, 5, "freeze", attempt=1), "infra", "[w01] lost: frozen: no heartbeat for"),
        (fault_at(1, 5, "hang", attempt=1), "infra", "[w01] lost: hangs: no step for"),
        slow(
            fault_at(1, 5, "busy", attempt=1), "busy", "[w01] exit code 1: RuntimeError: The TPU is"
        ),
        slow(
            fault_at(1, 5, "exit0", attempt=1), "infra", "[w01] exit code 0: it exited with 0 while"
        ),
    ],
    ids=lambda value: value.get("do") if isinstance(value, dict) else None,
)
def test_a_failed_worker_is_named_and_the_run_resumes(rig, failure, kind, message):
    """The others are stopped, and the next attempt resumes from the last checkpoint."""
    if failure["do"] in ("freeze", "hang", "exit0"):
        rig.profile(FAKE_PATIENCE="60")
    rig.trainer_faults(failure)
    code, result, err = rig.run("--stall-timeout", "100")
    assert code == 0, err
    assert cause(rig).startswith(f"{kind}: {message}")
    assert message in err
    assert rig.attempts() == {1: [0, 1], 2: [0, 1]}
    assert {entry["step"] for entry in rig.starts() if entry["attempt"] == 2} == {4}
    assert result["steps"] == 12 and rig.is_empty()
    if failure["do"] == "hang":
        assert "stack of thread 1" in (rig.run_folder() / "a1" / "w01.log").read_text()


@pytest.mark.parametrize("state", ["PREEMPTED", slow("UNKNOWN"), slow("GONE"), slow("SUSPENDED")])
def test_preemption(rig, state):
    """What is left of the machine is deleted before the next one is created; the run resumes."""
    rig.profile(FAKE_SECONDS="0.2")
    rig.inject(fault("agent.sh status vit-[0-9a-f]* 1 [1-9]", f"preempt:{state}"))
    code, result, err = rig.run()
    assert code == 0, err
    assert "event    attempt 1: " in err
    assert result["steps"] == 12 and rig.is_empty()
    verbs = [" ".join(argv) for argv in rig.calls() if {"create", "delete"} & set(argv)]
    assert [line.split()[3] for line in verbs] == ["create", "delete", "create", "delete"]
    assert len(rig.attempts()) == 2


@pytest.mark.slow
def test_the_launcher_waits_for_a_machine_in_repair(rig):
    rig.profile(FAKE_SECONDS="0.2")
    rig.inject(fault("agent.sh status vit-[0-9a-f]* 1 [1-9]", "repair"))
    code, _, err = rig.run()
    assert code == 0, err
    assert len(rig.calls("create")) == 1 and len(rig.attempts()) == 2
    assert "REPAIRING" in err


@pytest.mark.slow
def test_the_run_resumes_after_a_worker_reboots(rig):
    rig.profile(FAKE_SECONDS="0.2")
    rig.inject(fault("agent.sh status vit-[0-9a-f]* 1 [1-9]", "reboot:1"))
    code, _, err = rig.run()
    assert code == 0, err
    assert cause(rig).startswith("infra: [w01] lost: its processes vanished")
    assert len(rig.calls("create")) == 1


def test_repeated_crashes_at_the_first_step_are_a_crash_loop(rig):
    rig.trainer_faults(fault_at(0, 0, "raise"))
    code, result, err = rig.run()
    assert (code, result["result"], result["attempts"]) == (76, "crash loop", 3)
    assert "3 times in a row without progress: [w00] exit code 1: image 3 is corrupt" in err
    assert rig.is_empty()


@pytest.mark.slow
def test_crashes_after_progress_are_not_a_crash_loop(rig):
    faults = [fault_at(0, step, "raise", attempt=n) for n, step in enumerate((5, 6, 7, 9, 10), 1)]
    rig.trainer_faults(*faults)
    code, result, err = rig.run()
    assert (code, result["attempts"]) == (0, 6), err


@pytest.mark.parametrize("code", [2, slow(43)])
def test_usage_errors_and_divergence_are_not_retried(rig, code):
    rig.trainer_faults(fault_at(0, 5, f"exit{code}"))
    ended = rig.run()
    assert (ended.code, ended.result["attempts"]) == (1, 1)
    assert f"[w00] exit code {code}" in ended.result["cause"] and rig.is_empty()


STOCKOUT = 'There is no more capacity in the zone "us-a"; you can try in another zone'


@pytest.mark.parametrize("how", ["request", slow("node")])
def test_a_stockout_moves_to_the_next_zone(rig, how):
    rig.set(timelines=[["ACCEPTED", f"FAILED:{STOCKOUT}"], ["ACTIVE"]])
    more = []
    if how == "node":
        more = ["--no-queue"]
        rig.inject(fault("create", f"error:{STOCKOUT}"))
    code, _, err = rig.run("--zones", "us-a,us-b", *more)
    assert code == 0, err
    assert [argv[argv.index("--zone") + 1] for argv in rig.calls("create")] == ["us-a", "us-b"]
    assert "no more capacity" in err and rig.is_empty()


REFUSALS = {
    "quota": (
        "error:RESOURCE_EXHAUSTED: Quota limit 'TPUV4' has been exceeded. Limit: 0",
        78,
        "request quota",
    ),
    "zone": (
        "error:NOT_FOUND: Location us-a is not found or access is unauthorized.",
        78,
        "--zone",
    ),
    "permission": (
        "error:PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
        77,
        "TPU Admin",
    ),
    "type": ("error:INVALID_ARGUMENT: acceleratorType is not a valid type", 78, "--type"),
}


@pytest.mark.parametrize("name", ["quota", "permission", slow("zone"), slow("type")])
def test_refusals_name_the_remedy(rig, name):
    do, code, remedy = REFUSALS[name]
    rig.inject(fault("create", do))
    ended = rig.run()
    assert (ended.code, rig.is_empty()) == (code, True)
    assert remedy in ended.result["cause"]
    assert len(rig.calls("create")) == 1


def test_a_missing_account_is_reported(rig):
    rig.set(account="")
    ended = rig.run()
    assert ended.code == 77 and "gcloud auth login" in ended.result["cause"]


def test_an_ssh_agent_without_the_key_is_reported(rig):
    rig.inject(fault("tpu-vm ssh", "agent", times=99))
    ended = rig.run()
    assert ended.code == 77 and "ssh-add" in ended.result["cause"]
    assert rig.is_empty()


@pytest.mark.slow
def test_a_queued_request_expires_after_valid_until(rig):
    rig.set(timelines=[["WAITING_FOR_RESOURCES"]])
    ended = rig.run("--valid-until", "1m")
    assert (ended.code, rig.is_empty()) == (69, True)


@pytest.mark.parametrize("how", [slow("before"), "after"])
def test_a_connection_dropped_during_start(rig, how):
    """gcloud reruns the command, but the trainer starts once."""
    rig.inject(fault("agent.sh start", how, times=2))
    assert rig.run().code == 0
    assert rig.attempts() == {1: [0, 1]}


@pytest.mark.slow
def test_all_workers_start_or_none(rig):
    """After a start that fails on one worker, the next attempt starts on the same machine."""
    rig.inject(fault("--worker 1 .*agent.sh start", "error:connection reset", times=6))
    code, result, err = rig.run()
    assert code == 0, err
    assert "did not start" in err
    assert rig.attempts()[result["attempts"]] == [0, 1]


def test_a_hanging_connection(rig):
    rig.inject(fault("--worker 1 .*agent.sh status vit-[0-9a-f]* 1", "hang", nth=2))
    assert rig.run(LAUNCH_LEAST="3").code == 0
    assert rig.attempts() == {1: [0, 1]}


@pytest.mark.slow
def test_an_unreachable_worker_counts_as_lost(rig):
    """The node is READY but a worker does not answer: the attempt ends, the next one runs."""
    rig.profile(FAKE_SECONDS="0.3")
    match = "--worker 1 .*agent.sh (status|stop) vit-[0-9a-f]* 1"
    rig.inject(fault(match, "error:ssh: connect: timed out", nth=2, times=999))
    code, _, err = rig.run()
    assert code == 0, err
    assert cause(rig).startswith("infra: [w01] lost: unreachable for")
    assert len(rig.attempts()) == 2


@pytest.mark.slow
def test_temporary_api_errors_are_retried(rig):
    rig.inject(fault("describe", "error:HTTP 503: backend error", nth=2, times=3))
    code, _, err = rig.run()
    assert code == 0, err
    assert rig.attempts() == {1: [0, 1]}


@pytest.mark.slow
def test_a_creation_whose_response_is_lost(rig):
    rig.inject(fault("create", "lost", times=5))
    code, _, err = rig.run()
    assert code == 0, err
    assert rig.is_empty() and rig.attempts() == {1: [0, 1]}


@pytest.mark.parametrize("file", ["agent.sh", slow("tgz")])
def test_a_damaged_upload_is_retried(rig, file):
    rig.inject(fault(f"--worker 1 .*cat >.*{file}", "before", times=2))
    code, _, err = rig.run()
    assert code == 0, err


def test_package_version_skew(rig, tmp_path):
    """Worker 1 has another version of jax: retried once, then refused, naming jax."""
    other = tmp_path / "other" / "jax-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Name: jax\nVersion: 9.9.9\n")
    rig.set(profiles={"1": {"PYTHONPATH": str(other.parent)}})
    ended = rig.run()
    assert (ended.code, rig.is_empty()) == (70, True)
    assert "jax 9.9.9" in ended.result["cause"] and "differs" in ended.result["cause"]
    assert len(rig.calls("agent.sh prepare")) == 3
    assert rig.starts() == []


def test_a_full_disk(rig):
    rig.set(profiles={"1": {"FAKE_FREE": "1000"}})
    ended = rig.run()
    assert (ended.code, rig.is_empty()) == (70, True)
    assert "[w01] the disk is full" in ended.result["cause"]


def test_another_program_holds_the_tpu(rig):
    """The program is named and left alone; another machine is tried before giving up."""
    holder = "sleep 300 >>$VIT_SCALE_DEVICES/accel0 2>/dev/null </dev/null & true"
    ended = rig.run("--setup", holder, "--max-failures", "2", timeout=100)
    assert (ended.code, rig.is_empty()) == (79, True), ended.err
    assert "holds the TPU: sleep 300" in ended.result["cause"]
    assert rig.starts() == []


def test_an_existing_vm_is_used_and_left_alone(rig):
    assert rig.run("--existing").code == 78
    assert rig.calls("create") == [] and rig.calls("delete") == []
    rig.verb(*rig.flags(), "--no-queue", "--on-success", "keep")
    created = len(rig.calls("create"))
    words = [word for word in rig.flags() if not word.startswith("--type")]
    code, result, err = rig.end(rig.start(*words, "--existing", "--again"))
    assert code == 0, err
    assert len(rig.calls("create")) == created and rig.calls("delete") == []
    assert "type v4-16 (the TPU VM itself)" in err
    assert result["cloud"].startswith("kept (vit, us-a")


def test_a_machine_of_another_run_is_left_alone(rig):
    rig.run("--on-success", "keep")
    other = rig.run("--workdir", str(rig.elsewhere))
    assert other.code == 64 and "belongs to run vit-" in other.result["cause"]
    assert ", not to vit-" in other.result["cause"]
    for node in rig.cloud.nodes.values():
        node["labels"] = {}
    for request in rig.cloud.requests.values():
        request["tpu"]["nodeSpec"][0]["node"]["labels"] = {}
    ended = rig.run("--again")
    assert ended.code == 64 and "was not created by this launcher" in ended.result["cause"]
    assert rig.calls("delete") == [] and not rig.is_empty()


def test_multislice(tmp_path):
    """One request, one node per slice, and a trainer on every host of both."""
    rig = Rig(tmp_path, **QUICK)
    code, _, err = rig.run("--num-slices", "2")
    assert code == 0, err
    (create,) = rig.calls("create")
    assert "--node-count 2 --node-prefix vit" in " ".join(create)
    assert rig.attempts() == {1: [0, 1, 2, 3]} and rig.is_empty()


def test_limits_save_a_checkpoint_and_delete_the_machine(rig):
    rig.profile(FAKE_SECONDS="0.3")
    ended = rig.run("--max-hours", "0.1", "--config.steps=60", "--grace", "20m")
    assert (ended.code, ended.result["result"]) == (124, "limit reached")
    assert rig.is_empty()
    assert (rig.workdir / "checkpoint").exists(), "SIGTERM makes the trainer save"
    rig.profile(FAKE_SECONDS="0.03")
    assert rig.run("--max-hours", "9", "--config.steps=60").code == 0


def train_slowly(rig: Rig) -> None:
    rig.profile(FAKE_SECONDS="0.4")


def test_ctrl_c_detaches_and_a_rerun_adopts_the_attempt(rig):
    train_slowly(rig)
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    rig.wait_for(lambda: list(rig.run_folder().glob("a1/w00.log")))
    process.send_signal(signal.SIGINT)
    code, result, err = rig.end(process)
    assert (code, result["result"]) == (130, "detached")
    assert result["cloud"].startswith("kept (vit, us-a, $") and "still running" in err
    code, result, err = rig.run()
    assert code == 0, err
    assert "adopted" in err and rig.attempts() == {1: [0, 1]} and rig.is_empty()


@pytest.mark.slow
def test_a_second_ctrl_c_stops_and_deletes(rig):
    train_slowly(rig)
    process = rig.start(*rig.flags(), "--grace", "20m")
    rig.wait_for(lambda: len(rig.starts()) == 2)
    rig.wait_for(lambda: list(rig.run_folder().glob("a1/w00.log")))
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    code, result, err = rig.end(process)
    assert (code, result["result"], result["cloud"]) == (130, "stopped", "deleted"), err
    assert rig.is_empty() and (rig.workdir / "checkpoint").exists()


@pytest.mark.slow
def test_the_run_survives_a_closed_terminal(rig):
    """As with a killed `tee`: only later output is lost."""
    train_slowly(rig)
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    assert rig.attempts() == {1: [0, 1]} and rig.is_empty()
    assert '"what": "bug"' not in journal(rig)


def test_ctrl_c_while_queued_withdraws_the_request(rig):
    rig.set(timelines=[["WAITING_FOR_RESOURCES"]])
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: rig.cloud.requests)
    process.send_signal(signal.SIGINT)
    code, result, _ = rig.end(process)
    assert (code, result["cloud"]) == (130, "deleted") and rig.is_empty()


def test_a_retry_reuses_the_kept_machine(rig):
    """A failure keeps the machine for a while, so that a retry need not queue."""
    rig.trainer_faults(fault_at(0, 0, "exit2"))
    first = rig.start(*rig.flags(), "--on-failure", "keep:60m")
    journals = (rig.root / "runs").glob
    rig.wait_for(
        lambda: any("kept until" in file.read_text() for file in journals("tpu/*/journal.jsonl"))
    )
    rig.trainer_faults()
    code, _, err = rig.run()
    assert code == 0, err
    assert rig.end(first).code == 1
    assert len(rig.calls("create")) == 1 and rig.is_empty()


def test_a_changed_config_on_a_kept_machine(rig):
    """One that may resume goes on with the run; another is refused in a line, or begins afresh."""
    keep = ("--on-failure", "keep", "--on-success", "keep")
    rig.trainer_faults(fault_at(0, 2, "exit2"))
    assert rig.run(*keep).code == 1
    rig.trainer_faults()
    code, _, err = rig.run(*keep, "--config.log.every=5")
    assert code == 0 and "already exists: adopted" in err, err
    assert rig.attempts() == {1: [0, 1], 2: [0, 1]}
    rig.trainer_faults(fault_at(0, 12, "changed"))
    refused = rig.run(*keep, "--config.steps=18")
    assert (refused.code, refused.result["attempts"]) == (1, 3), "it is not tried again"
    assert "different config (optim.lr: 0.1 -> 0.2); use another" in refused.result["cause"]
    assert "rerun with --fresh" in refused.result["cause"]
    for _ in range(2):
        code, result, err = rig.run("--config.steps=8", "--fresh")
        assert (code, result["steps"]) == (0, 8), err
    assert "is done" in err, "the same command does not train again"
    (folder,) = rig.workdir.parent.glob("work dir-*")
    assert (folder / "checkpoint").read_text() == "8"
    assert (rig.workdir / "checkpoint").read_text() == "12"
    assert len(rig.calls("create")) == 1 and rig.is_empty()


def journal(rig: Rig) -> str:
    file = rig.run_folder() / "journal.jsonl"
    return file.read_text() if file.exists() else ""


@pytest.mark.slow
def test_a_kept_machine_is_deleted_after_its_time(rig):
    rig.trainer_faults(fault_at(0, 0, "exit2"))
    ended = rig.run("--on-failure", "keep:2m")
    assert (ended.code, ended.result["cloud"]) == (1, "deleted") and rig.is_empty()


WHEN = ["agent.sh start"]
WHEN += map(slow, ["create", "describe", "cat >", "agent.sh prepare", "agent.sh status .* 1 [1-9]"])


@pytest.mark.parametrize("when", WHEN)
def test_a_run_resumes_after_its_launcher_is_killed(rig, when):
    """SIGKILL at any moment: rerunning the same command resumes, and nothing starts twice."""
    rig.profile(FAKE_SECONDS="0.1")
    rig.inject(fault(when, "hang", nth=2 if when == "describe" else 1))
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: any(entry.get("seen") for entry in rig.cloud.faults))
    process.kill()
    process.communicate()
    rig.inject()
    code, result, err = rig.run()
    assert code == 0, err
    assert len(rig.calls("create")) <= 2 and rig.is_empty()
    assert result["steps"] == 12


@pytest.mark.slow
def test_a_second_launcher_of_a_run_is_refused(rig):
    train_slowly(rig)
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    second = rig.run()
    assert second.code == 64 and "watches vit-" in second.err
    assert rig.end(process).code == 0


def test_stop_from_another_terminal(rig):
    train_slowly(rig)
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: len(rig.starts()) == 2)
    stopped = rig.verb("stop", "--name", "vit")
    assert stopped.returncode == 0, stopped.stderr
    code, result, _ = rig.end(process)
    assert (code, result["result"], result["cloud"]) == (130, "stopped", "deleted")
    assert rig.is_empty() and json.loads(stopped.stdout)["result"] == "stopped"

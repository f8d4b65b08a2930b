"""Unit tests of the launcher: types, diagnosis, retries, commands, bundles, billing."""

import io
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile

import pytest

from launch import pod
from launch.tpu import (
    accelerators,
    bundle,
    diagnosis,
    exit_codes,
    flags,
    gcloud,
    secret,
)
from launch.tpu.billing import Billing
from launch.tpu.clock import Clock
from launch.tpu.diagnosis import Cause, WorkerExit
from launch.tpu.exit_codes import Stop
from launch.tpu.gcloud import Result
from launch.tpu.journal import Journal, Terminal
from launch.tpu.transport import AgentStatus, last_error
from tests.helpers.fake_cloud import ROOT
from vit_scale import errors

SLICES = [
    ("v2-8", 4, 1, "tpu-ubuntu2204-base"),
    ("v3-32", 16, 4, "tpu-ubuntu2204-base"),
    ("v4-8", 4, 1, "tpu-ubuntu2204-base"),
    ("v4-32", 16, 4, "tpu-ubuntu2204-base"),
    ("v5e-8", 8, 1, "v2-alpha-tpuv5-lite"),
    ("v5litepod-16", 16, 4, "v2-alpha-tpuv5-lite"),
    ("v5p-64", 32, 8, "v2-alpha-tpuv5"),
    ("v6e-1", 1, 1, "v2-alpha-tpuv6e"),
    ("v6e-8", 8, 1, "v2-alpha-tpuv6e"),
    ("v6e-256", 256, 64, "v2-alpha-tpuv6e"),
    ("tpu7x-8", 4, 1, "v2-alpha-tpu7-ubuntu2404"),
]


@pytest.mark.parametrize("name, chips, hosts, runtime", SLICES)
def test_accelerator_types(name, chips, hosts, runtime):
    accelerator = accelerators.parse(name)
    assert (accelerator.chips, accelerator.hosts, accelerator.runtime) == (chips, hosts, runtime)


@pytest.mark.parametrize("name", ["v4-4", "v4-7", "v5e-2", "v5e-12", "v1-8", "v4", "v4-32x"])
def test_invalid_accelerator_types(name):
    with pytest.raises(Stop):
        accelerators.parse(name)


def test_prices_and_devices():
    assert accelerators.parse("v5e-16", 1.5).price == 24.0
    assert accelerators.parse("tpu7x-8").price is None
    devices = {name: accelerators.parse(name).devices for name in ("v3-8", "v4-32", "tpu7x-8")}
    assert devices == {"v3-8": 8, "v4-32": 16, "tpu7x-8": 8}


# Exit codes and last log lines of real training runs, and the kind of failure of each.
EXITS = [
    (1, "RuntimeError: The TPU is already in use by process with pid 4711.", "busy"),
    (1, "Internal error when accessing libtpu multi-process lockfile.", "busy"),
    (1, "open(/dev/vfio/0): Device or resource busy", "busy"),
    (79, "agent: process 7 of ada holds the TPU", "busy"),
    (1, "Failed to start RPC server", "port"),
    (42, "vit-scale: runs/x: No space left on device", "disk"),
    (1, "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm", "user"),
    (1, "Traceback\nValueError: image 3 is corrupt", "user"),
    (43, "vit-scale: diverged", "fatal"),
    (2, "vit-scale: no config field is named 'x'", "fatal"),
    (42, "vit-scale: stopped by SIGTERM after step 9", "resumable"),
    (137, "Killed", "infra"),
    (None, "", "infra"),
]


@pytest.mark.parametrize("code, tail, kind", EXITS)
def test_kinds_of_failure(code, tail, kind):
    assert diagnosis.diagnose([WorkerExit(0, code, 1.0, tail)]).kind == kind


COLLATERAL = [
    "PollForError: heartbeat",
    "Barrier timed out. Id: x",
    "Gloo AllReduce failed: Connection closed by peer",
    "Polled an error from coordination service",
    "vit-scale: process 2 (host-2): image 3 is corrupt",
]


@pytest.mark.parametrize("line", COLLATERAL)
@pytest.mark.parametrize("code", [1, 134])
def test_collateral_exits_are_not_the_cause(line, code):
    """Even if they are the earliest."""
    exits = [
        WorkerExit(0, code, 1.0, f"step 5\n{line}"),
        WorkerExit(1, 1, 2.0, "OSError: disk is gone"),
    ]
    cause = diagnosis.diagnose(exits)
    assert (cause.worker, cause.line) == (1, "exit code 1: OSError: disk is gone")


DIFFERENT_CONFIG = "hosts disagree: process 2 differs from process 0 (a is 1, there 2)"
DIFFERENT_FOLDER = (
    "workdir /x is not the same folder on process 2 and on process 0: give a --workdir"
)


@pytest.mark.parametrize("line", [DIFFERENT_CONFIG, DIFFERENT_FOLDER])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("source", ["log", "heartbeat"])
def test_disagreeing_hosts_are_bad_input_not_a_bad_machine(line, alone, source):
    """Whichever host reports it: the one that differs may have been stopped before it could."""
    lines = [f"process 2: {line}", f"process 2: {line}", line]
    exits = [
        WorkerExit(
            i,
            1,
            2.0 - i / 10,
            f"step 0\nvit-scale: {message}" if source == "log" else "",
            message * (source != "log"),
        )
        for i, message in enumerate(lines)
    ]
    if alone:
        exits[2] = WorkerExit(2, 137, 1.0, "", stopped=True)
    cause = diagnosis.diagnose(exits)
    assert cause.kind == "input" and line in cause.line
    assert outcomes([cause]) == [65], "without a retry on another machine"


def test_errors_of_another_process_remain_collateral():
    message = "vit-scale: process 2: image 3 is corrupt"
    assert (
        diagnosis.diagnose([WorkerExit(0, 1, 1.0, message), WorkerExit(1, 1, 1.0, message)]).kind
        == "infra"
    )
    stopped = WorkerExit(
        0, 42, 1.0, f"vit-scale: {DIFFERENT_CONFIG}\nvit-scale: stopped by SIGTERM after step 9"
    )
    assert diagnosis.diagnose([stopped]).kind == "resumable"


@pytest.mark.parametrize(
    "message",
    [
        "workdir gs://b/run holds a run with a different config (steps: 3 -> 2); use another",
        "workdir gs://b/run holds a run that began with different data (train: 1 more); use",
        "workdir gs://b/run holds a run of 3 steps, which can't be extended to 5: with optim.sch",
        "workdir gs://b/run has no checkpoint up to step 3, where its cool-down began (the",
    ],
)
def test_a_run_that_can_not_continue_is_not_tried_again(message):
    cause = diagnosis.diagnose([WorkerExit(0, 1, 1.0, f"vit-scale: {message}")])
    assert cause.kind == "fatal" and "--fresh" in cause.line


def test_the_earliest_cause_is_reported():
    exits = [WorkerExit(0, 1, 3.0, "KeyError: 'b'"), WorkerExit(1, 1, 2.0, "KeyError: 'a'")]
    assert diagnosis.diagnose(exits).worker == 1
    all_collateral = [WorkerExit(i, 134, float(i), "Barrier timed out") for i in range(3)]
    assert diagnosis.diagnose(all_collateral).kind == "infra"
    stopped = [WorkerExit(0, 1, 2.0, "KeyError: 'b'"), WorkerExit(1, 137, 1.0, "", stopped=True)]
    assert diagnosis.diagnose(stopped).worker == 0
    assert diagnosis.diagnose([WorkerExit(0, 0, 1.0, ""), WorkerExit(1, 0, 2.0, "")]).kind == "done"


def test_signatures_ignore_numbers_and_addresses():
    one = diagnosis.signature(1, "no batch 17 at 0x7f1")
    assert (
        one == diagnosis.signature(1, "no batch 18 at 0x8e2") != diagnosis.signature(2, "no batch")
    )


def make_cause(kind: str, line: str = "x") -> Cause:
    return Cause(kind, 0, line, f"1: {line}")


def new_state() -> dict:
    return {"failures": [], "restarts": 0}


def outcomes(causes, progressed=False, failures=3, restarts=100):
    """Return the decision after each cause: (delay, recreate), or the exit code of the launcher."""
    state, results = new_state(), []
    for cause in causes:
        try:
            results.append(tuple(diagnosis.decide(state, cause, progressed, failures, restarts)))
        except Stop as stop:
            results.append(stop.code)
    return results


def test_retry_budget():
    user, lost, busy = make_cause("user"), make_cause("infra"), make_cause("busy")
    assert outcomes([user] * 3) == [(10, False), (30, False), 76]
    assert outcomes([user, make_cause("user", "y"), make_cause("user", "z")])[-1] == 1
    assert outcomes([lost] * 3) == [(10, False), (30, True), 76], "the last retry recreates it"
    assert outcomes([lost, make_cause("infra", "y"), make_cause("infra", "z")])[-1] == 75
    assert outcomes([busy] * 3)[-1] == 79
    assert outcomes([make_cause("port")])[0] == (0, False)
    assert outcomes([make_cause("fatal")]) == [1]
    assert outcomes([user] * 9, progressed=True) == [(10, False)] * 9
    assert outcomes([make_cause("preempted")] * 5, restarts=4) == [(10, False)] * 4 + [75]
    assert outcomes([make_cause("resumable")] * 3)[-1] == 76, "exit code 42 alone is no progress"


@pytest.mark.parametrize(
    "text, kind",
    [
        ("ERROR: (gcloud.x) NOT_FOUND: Resource 'projects/p/x' was not found", "absent"),
        ('This TPU has terminal state "PREEMPTED", so it cannot be used anymore.', "gone"),
        ('There is no more capacity in the zone "a"; you can try in another zone', "stockout"),
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV2' has been exceeded. Limit: 0", "quota"),
        ("Insufficient reserved capacity", "quota"),
        (
            "Quota exceeded for quota metric 'Read requests' and limit 'Read requests per minute'"
            " of service 'tpu.googleapis.com'",
            "transient",
        ),
        ("RESOURCE_EXHAUSTED: Rate Limit Exceeded", "transient"),
        ("Quota limit 'ReadRequestsPerMinutePerProject' has been exceeded.", "transient"),
        ("Quota 'Read requests per minute' exceeded", "transient"),
        ("Location us-x is not found or access is unauthorized.", "zone"),
        ("Permission 'tpu.nodes.create' denied on resource", "permission"),
        ("You do not currently have an active account selected.", "auth"),
        ("UNAUTHENTICATED: Request had invalid authentication credentials", "auth"),
        ("SSH Key is not present in the SSH agent", "agent"),
        ("Cloud TPU API has not been used in project 7 before or it is disabled", "api"),
        ("ALREADY_EXISTS: Resource 'vit' already exists", "exists"),
        ("HTTP 503: the service is unavailable", "transient"),
    ],
)
def test_gcloud_errors_are_classified(text, kind):
    """With and without the note on the account that gcloud 528 adds to errors 401, 403 and 404."""
    assert gcloud.error(text).kind == kind
    note = "This command is authenticated as a@b.c which is the active account specified by the "
    error = gcloud.error(f"{text}. {note}[core/account] property\n- '@type': x")
    assert error.kind == kind and "authenticated as" not in str(error)


@pytest.mark.parametrize(
    "more, alpha, also",
    [
        ({"flags": ["--tags=a"]}, False, []),
        ({"flags": ["--reservation-host-project=x"], "model": "spot"}, False, ["--spot"]),
        ({"model": "best-effort"}, True, ["--best-effort"]),
        (
            {"flags": ["--boot-disk=kms-key=k"], "model": "spot"},
            True,
            ["--spot", "--provisioning-model=spot"],
        ),
    ],
)
def test_flags_that_only_gcloud_alpha_has_choose_it(more, alpha, also):
    argv = gcloud.create(gcloud.Tpu("vit", "z", "p", "v4-8", "r", **more))
    assert (argv[1] == "alpha") is alpha
    models = ("--spot", "--best-effort", "--provisioning-model=spot")
    assert [word for word in argv if word in models] == also
    assert set(more.get("flags", [])) <= set(argv)


def test_a_hanging_process_is_killed_with_its_children():
    """Even if a grandchild keeps the output open."""
    result = gcloud.run(["bash", "-c", "setsid sleep 30 & sleep 30"], timeout=0.3)
    assert result.code == 124
    assert gcloud.run(["no-such-program-here"]).code == gcloud.NOT_STARTED
    assert gcloud.run(["cat"], b"given", timeout=10).out == b"given"


def test_last_error_skips_noise():
    noise = (
        "Warning: x\n##### Command execution on worker 1 failed with exit status 71. Continuing.\n"
    )
    assert last_error(f"agent: the disk is full\n{noise}") == "the disk is full"
    assert last_error("a\nERROR: (gcloud.tpus) no such thing\nb") == "no such thing"
    assert last_error("") == "no answer"


@pytest.mark.parametrize(
    "old, new, parsed",
    [
        (b'"attempt": 3', b'"attempt": 3, "later": 1', True),
        (b'"attempt": 3', b'"attempt": ', False),
        (b'"attempt": 3, ', b"", False),
        (b"{", b"[{", False),
    ],
)
def test_a_status_of_another_version_or_malformed_is_no_error(old, new, parsed):
    fields = dict.fromkeys(AgentStatus._fields[:-1], 3)
    out = f"#STATUS {json.dumps(fields)}\n#LOG\n".encode().replace(old, new)
    if new == b"[{":
        out = out.replace(b"}", b"}]")
    reply = AgentStatus.parse(Result(0, out, ""))
    assert (reply is not None and reply.attempt == 3) == parsed


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
    root = tmp_path / "a tree"
    for name in (
        "code.py",
        "launch/run.sh",
        ".env",
        "launch/tpu.env",
        "new.py",
        "gone.py",
        "big.bin",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "launch" / "run.sh").chmod(0o755)
    (root / ".gitignore").write_text("*.bin\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "code.py", "gone.py", "launch", ".env", ".gitignore"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    (root / "gone.py").unlink()
    (root / "code.py").write_text("changed")
    return root


def test_bundle(tree, tmp_path):
    """Tracked and new files in their current state; equal trees have equal hashes."""
    made = bundle.make(tree, [])
    assert made.sha == bundle.make(tree, []).sha
    (tmp_path / "x.tgz").write_bytes(made.data)
    with tarfile.open(tmp_path / "x.tgz") as tar:
        names = {entry.name: entry.mode for entry in tar}
        assert tar.extractfile("code.py").read() == b"changed"
    assert names == {".gitignore": 0o644, "code.py": 0o644, "launch/run.sh": 0o755, "new.py": 0o644}
    assert made.description.endswith("+changes") and "+changed" in bundle.changes(tree)
    (tree / "new.py").write_text("other")
    assert bundle.make(tree, []).sha != made.sha


def test_key_files_are_left_out_and_named(tree):
    """If git does not track them; .env files in any case."""
    (tree / "account.json").write_text('{"type": "service_account", "private_key": "x"}')
    (tree / "table.json").write_text('{"rows": []}')
    (tree / "launch" / "tls.pem").write_text("x")
    (tree / ".env.local").write_text("A=b")
    (tree / "id_rsa").write_text("x")
    left_out = [".env", ".env.local", "account.json", "id_rsa", "launch/tls.pem"]
    assert bundle.make(tree, []).left_out == left_out
    subprocess.run(["git", "-C", str(tree), "add", "launch/tls.pem"], check=True)
    made = bundle.make(tree, [])
    assert made.left_out == left_out[:4]
    with tarfile.open(fileobj=io.BytesIO(made.data)) as tar:
        names = set(tar.getnames())
    assert "launch/tls.pem" in names and "table.json" in names and not names & set(left_out[:4])


def test_a_bundle_contains_the_whole_package_and_no_results():
    """Folders named runs hold results, except for the package's own."""
    names = bundle.files(ROOT)
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "vit_scale").rglob("*.py")}
    assert package <= set(names) and "vit_scale/runs/lock.py" in package
    assert not [name for name in names if name.startswith("runs/")]


def test_bundles_with_secrets_or_too_large_are_refused(tree, monkeypatch):
    with pytest.raises(Stop, match=r"new\.py contains the value of a secret"):
        bundle.make(tree, ["new.py"])
    monkeypatch.setattr(bundle, "LARGEST", 10)
    with pytest.raises(Stop, match=r"the code is 0 MB, the limit 0 MB: \.gitignore|launch/run.sh"):
        bundle.make(tree, [])


def test_secrets_from_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    file = tmp_path / "x.env"
    file.write_text("export A='b c'\n# no=1\nB=d=e\n")
    file.chmod(0o600)
    assert secret.collect(["A"], str(file)) == {"A": "b c", "B": "d=e"}
    assert secret.encode({"A": "b c"}) == b"A=b c\nVIT_SCALE_REDACT=\n#END\n"
    file.chmod(0o640)
    with pytest.raises(Stop, match="chmod 600"):
        secret.collect([], str(file))


AWKWARD = """it's "p\\a" ünï $x"""


def test_secrets_are_redacted_however_they_are_quoted(tmp_path):
    """By JSON, Python and a shell, also one within another; logs keep their length in bytes."""
    journal = Journal(tmp_path, quiet=True)
    journal.redacted = secret.redactable({"A": AWKWARD, "short": "x"})
    shell = shlex.quote(f"--key={AWKWARD}")
    texts = [AWKWARD, json.dumps(AWKWARD), json.dumps(AWKWARD, ensure_ascii=False), repr(AWKWARD)]
    texts += [repr(ValueError(f"no {AWKWARD}")), shell, json.dumps({"argv": [shell]})]
    for text in [*texts, *map(json.dumps, texts), *map(repr, texts)]:
        assert "ünï" not in journal.redact(text) and "**" in journal.redact(text), text
        assert "p\\" not in journal.redact(text) and "\\xfc" not in journal.redact(text), text
    assert len(journal.redact(AWKWARD)) == len(AWKWARD.encode())
    journal.write("bug", text=repr(ValueError(AWKWARD)), argv=[shell])
    journal.put("launch.json", json.dumps({"argv": [AWKWARD]}))
    for name in ("journal.jsonl", "launch.json"):
        content = (tmp_path / name).read_text()
        assert "u00fc" not in content and "xfc" not in content and "***" in content


def test_escape_codes_do_not_reach_the_terminal(tmp_path, monkeypatch):
    """Colours, titles, cursor movements, C1 codes, reversed text; the log keeps them."""
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", Terminal(shown))
    raw = "a\x1b[31mred\x1b[0m \x1b]0;title\x07b\x1b]8;;http://x\x1b\\c\x9b2Jd\x08\r\u202ee\x1b"
    journal = Journal(tmp_path)
    journal.print_log(0, raw)
    journal.say("cause", raw)
    print(raw, "tab\there", file=sys.stderr)
    clean = "ared bc2Jde"
    assert shown.getvalue() == f"[w00] {clean}\ncause    {clean}\n{clean} tab\there\n"
    journal.add_log(1, 0, raw)
    assert journal.log_file(1, 0).read_bytes() == raw.encode()


def test_the_launcher_prints_without_escape_codes():
    """Whatever prints: here, an error that repeats a flag."""
    command = [sys.executable, "-I", str(ROOT / "launch" / "tpu"), "--x\x1b[31m"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 64 and "unrecognized arguments: --x" in done.stderr
    assert "\x1b" not in done.stderr


class FakeClock(Clock):
    def __init__(self):
        super().__init__()
        self.time = 0.0

    def now(self):
        return self.time

    def wall(self):
        return self.time


def test_billing(tmp_path):
    clock, journal = FakeClock(), Journal(tmp_path)
    billing = Billing(10.0, clock, journal)
    billing.begin()
    clock.time = 1800.0
    assert (billing.hours, billing.cost) == (0.5, 5.0)
    billing.end()
    clock.time = 9000.0
    assert billing.cost == 5.0, "the time between two machines is not billed"
    journal.save()
    billing = Billing(10.0, clock, Journal(tmp_path))
    billing.begin()
    clock.time += 3600.0
    assert billing.cost == 15.0, "a new launcher continues the count"
    with pytest.raises(Stop, match="--max-cost 14"):
        billing.check(0, 14)
    with pytest.raises(Stop, match="--max-hours 1"):
        billing.check(1, 0)


def test_flags_and_durations():
    words = ["stop", "--config.a.b=1", "--config.c", "2", "--name", "x", "--", "ls", "--config.d=3"]
    assert flags.split(words) == (
        ["stop", "--name", "x"],
        ["--config.a.b=1", "--config.c=2"],
        ["ls", "--config.d=3"],
    )
    assert [flags.seconds(text) for text in ("90", "2m", "1.5h", "1d")] == [90, 120, 5400, 86400]
    assert vars(flags.parser().parse_args([]))["stall_timeout"] == 600


def test_exit_codes_are_the_same_everywhere():
    """In launch/, which must not import vit_scale, in vit_scale and in shell scripts."""
    trainer = {code.name: code for code in exit_codes.Trainer}
    assert trainer == {name: getattr(errors, name) for name in trainer}
    assert pod.RESUMABLE == exit_codes.Trainer.RESUMABLE
    agent = (ROOT / "launch" / "agent.sh").read_text()
    codes = set(re.findall(r"\bfail (\d+) ", agent))
    assert codes == {str(int(code)) for code in exit_codes.Agent if code}
    slurm = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert f"if ((code == {exit_codes.Trainer.RESUMABLE:d} || code >= 128))" in slurm
    local = (ROOT / "launch" / "local.sh").read_text()
    usage = "0 done, 1 failed, 2 usage, 42 stopped but resumable, 43 diverged"
    assert usage in local
    assert tuple(map(int, re.findall(r"\d+", usage))) == tuple(exit_codes.Trainer)

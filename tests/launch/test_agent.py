"""launch/agent.sh alone: attempts, stops, secrets, profiles, old code, the reaper."""

import pathlib
import subprocess

import pytest

from launch.tpu.gcloud import Result
from launch.tpu.transport import AgentStatus
from tests.helpers.fake_cloud import ROOT, machine


class Agent:
    def __init__(self, folder: pathlib.Path):
        self.home = folder / "a home" / ".vit_scale"
        venv = self.home / "venv" / "bin"
        venv.mkdir(parents=True)
        (self.home / "code" / "c0de").mkdir(parents=True)
        (self.home / "agent.sh").write_bytes((ROOT / "launch" / "agent.sh").read_bytes())
        trainer = venv / "vit-scale"
        trainer.write_text(
            '#!/bin/bash\ntrap "sleep 0.5; exit 42" TERM\necho "$*"\necho $$ >>starts\n'
            "for i in $(seq 200); do sleep 0.05; done\n"
        )
        trainer.chmod(0o755)

    def __call__(self, *words, stdin: str = "") -> subprocess.CompletedProcess:
        environment = {
            "PATH": machine(),
            "HOME": str(self.home.parent),
            "VIT_SCALE_RELEASE": "1",
        }
        environment["VIT_SCALE_DEVICES"] = str(self.home / "dev")
        command = ["bash", str(self.home / "agent.sh"), *map(str, words)]
        return subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, timeout=60
        )

    def state(self, attempt="last") -> str:
        return self.status(attempt).state

    def finish(self) -> AgentStatus:
        """Wait until the latest attempt has ended; return its status."""
        while self.state() == "running":
            pass
        return self.status()

    def status(self, attempt="last", offset=0) -> AgentStatus:
        done = self("status", "run", attempt, offset)
        return AgentStatus.parse(Result(done.returncode, done.stdout.encode(), ""))


@pytest.fixture
def agent(tmp_path):
    made = Agent(tmp_path)
    yield made
    for attempt in range(1, 5):
        made("stop", "run", attempt, 0)


def test_concurrent_and_repeated_starts_run_one_trainer(agent):
    """Each call returns at once and reports success."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(agent, "start", "run", 1, "c0de", 1, "train", "a b") for _ in range(5)]
    assert [call.result().returncode for call in calls] == [0] * 5
    assert agent("start", "run", 1, "c0de", 1, "train").returncode == 0
    while not (agent.home / "code/c0de/starts").exists():
        pass
    assert len((agent.home / "code/c0de/starts").read_text().split()) == 1
    assert agent.state() == "running"


def test_attempts_start_in_order(agent):
    """A late call to start an attempt that is over or was stopped starts nothing."""
    assert agent("start", "run", 2, "c0de", 1, "train").returncode == 0
    late = agent("start", "run", 1, "c0de", 1, "train")
    assert (late.returncode, "attempt 2 has started" in late.stderr) == (75, True)
    assert agent("stop", "run", 3, 5).stdout == "nothing runs\n"
    stopped = agent("start", "run", 3, "c0de", 1, "train")
    assert (stopped.returncode, "was stopped" in stopped.stderr) == (75, True)
    assert agent("start", "run", 4, "c0de", 1, "train").returncode == 0
    assert [agent.state(2), agent.state(4)] == ["ended", "running"], "the earlier attempt was ended"


def test_stop_asks_first_and_kills_without_grace(agent):
    agent("start", "run", 1, "c0de", 1, "train")
    while not (agent.home / "code/c0de/starts").exists():
        pass
    for _ in range(2):
        assert agent("stop", "run", 1, 30).stdout == "asked to stop\n"
    assert agent.finish().code == 42
    agent("start", "run", 2, "c0de", 1, "train")
    assert agent("stop", "run", 2, 0).stdout == "killed\n"
    assert (agent.status(2).state, agent.status(2).code) == ("ended", 137)


def test_a_trainer_goes_on_if_its_pid_cannot_be_written(agent):
    """As on a full disk."""
    (agent.home / "runs/run/a1/pid").mkdir(parents=True)
    (agent.home / "venv/bin/vit-scale").write_text("#!/bin/bash\nsleep 0.5\nexit 7\n")
    agent("start", "run", 1, "c0de", 1, "train")
    assert agent.finish().code == 7


def test_the_last_lines_of_a_killed_trainer_reach_the_bucket(agent):
    """The trainer is killed first; the attempt runs until its log has been uploaded."""
    copied = agent.home / "copied"
    upload = f'until grep -q 137 "${{3%/*}}/rc"; do :; done 2>/dev/null\ncp "$3" \'{copied}\'\n'
    (agent.home / "venv/bin/python").write_text(f"#!/bin/bash\n{upload}")
    (agent.home / "venv/bin/python").chmod(0o755)
    agent("start", "run", 1, "c0de", 1, "train", "--workdir", "gs://b/x")
    while not (agent.home / "code/c0de/starts").exists():
        pass
    assert agent("stop", "run", 1, 0).stdout == "killed\n"
    assert copied.read_text() == "train --workdir gs://b/x\n"
    assert (agent.status(1).state, agent.status(1).code) == ("ended", 137)


def test_the_agent_never_exits_with_255(agent):
    """ssh uses 255 for its own errors."""
    for words in (["nonsense"], ["start"], ["status"], ["secrets"], []):
        assert agent(*words).returncode == 64
    (agent.home / "venv/bin/vit-scale").write_text("#!/bin/bash\nexit 255\n")
    agent("start", "run", 1, "c0de", 1, "train")
    assert agent.finish().code == 255


def test_agent_secrets(agent):
    cut = agent("secrets", "run", stdin="A=b\n")
    assert (cut.returncode, "arrived incomplete" in cut.stderr) == (65, True)
    assert agent("secrets", "run", stdin='A=$(touch x) "b"\n#END\n').returncode == 0
    file = agent.home / "runs/run/secrets"
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    (agent.home / "venv/bin/vit-scale").write_text('#!/bin/bash\necho "$A" >out\n')
    agent("start", "run", 1, "c0de", 1, "train")
    agent.finish()
    assert (agent.home / "code/c0de/out").read_text() == '$(touch x) "b"\n', "not evaluated"
    assert not file.exists()


TRACED = "vit-scale: profile of steps 1 to 10: /a b/steps_1-10; to open it: xprof --logdir /a b"


def test_a_profile_waits_for_the_trainers_heartbeat(agent):
    """A trainer that has not begun to handle it would end."""
    script = (
        f"#!/bin/bash\ntrap \"echo '{TRACED}'\" USR2\nwhile sleep 0.05; do echo on >began; done\n"
    )
    (agent.home / "venv/bin/vit-scale").write_text(script)
    agent("start", "run", 1, "c0de", 1, "train", 'a "b"\\n')
    while not (agent.home / "code/c0de/began").exists():
        pass
    early = agent("profile", "run", 1)
    assert (early.returncode, "training has not begun" in early.stderr) == (75, True)
    (agent.home / "runs/run/a1/heartbeat.json").write_text("{}")
    assert agent("profile", "run", 1).stdout == "/a b/steps_1-10\n"
    log = (agent.home / "runs/run/a1/train.log").read_text().splitlines()
    assert (log, agent.state()) == ([TRACED], "running"), "once"
    assert agent.status(1).command == 'vit-scale train a "b"\\n'


def test_a_profile_that_fails_is_an_error(agent):
    failed = "no profile of steps 1 to 10: OSError: disk full; training continues"
    trap = f"trap \"echo 'vit-scale: {failed}'\" USR2"
    script = f"#!/bin/bash\n{trap}\nwhile sleep 0.05; do echo on >began; done\n"
    (agent.home / "venv/bin/vit-scale").write_text(script)
    agent("start", "run", 1, "c0de", 1, "train")
    while not (agent.home / "code/c0de/began").exists():
        pass
    (agent.home / "runs/run/a1/heartbeat.json").write_text("{}")
    done = agent("profile", "run", 1)
    assert (done.returncode, done.stderr, agent.state()) == (75, f"agent: {failed}\n", "running")


def test_gc_removes_old_code_and_logs(agent):
    import os

    for number in range(4):
        folder = agent.home / "code" / f"old{number}"
        folder.mkdir()
        os.utime(folder, (number, number))
    for number in range(1, 8):
        (agent.home / "runs/run" / f"a{number}").mkdir(parents=True)
    agent("gc", 2)
    assert sorted(p.name for p in (agent.home / "code").iterdir()) == ["c0de", "old3"]
    assert sorted(p.name for p in (agent.home / "runs/run").iterdir()) == [
        f"a{n}" for n in range(3, 8)
    ]


def test_the_log_is_read_from_an_offset(agent):
    agent("start", "run", 1, "c0de", 1, "train", "one")
    agent("stop", "run", 1, 0)
    whole, rest = agent.status(1), agent.status(1, 6)
    assert (whole.log_offset, whole.log_size, whole.log) == (0, 10, b"train one\n")
    assert (rest.log_offset, rest.log_size, rest.log) == (6, 10, b"one\n")
    assert whole.heartbeat is None and whole.stopped and whole.free_gb > 0


def is_reaped(agent, *command: str, patience: int = 1, seconds: float = 6) -> bool:
    """Return whether the reaper runs its command within `seconds`."""
    import time

    done = agent.home / "done"
    words = ["bash", "-c", *command] if command else ["touch", str(done)]
    assert agent("reap", "run", patience, *words).returncode == 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done.exists():
            return True
        time.sleep(0.05)
    return False


def test_the_reaper_retries_until_its_command_succeeds(agent):
    """After the command has succeeded, it is not run again."""
    home = agent.home
    command = f"cd '{home}'; echo x >>tries; [ $(wc -l <tries) -ge 2 ] && touch done"
    assert is_reaped(agent, command)
    assert (home / "tries").read_text() == "x\nx\n"


def test_the_reaper_waits_while_the_machine_is_in_use(agent):
    """After it is armed, while a launcher renews its lease, and while an environment is created."""
    import threading
    import time

    (agent.home / "prepare.lock").touch()
    holder = subprocess.Popen(["flock", str(agent.home / "prepare.lock"), "sleep", "3"])
    began = time.monotonic()
    assert is_reaped(agent) is True
    assert time.monotonic() - began > 2.5
    holder.wait()
    (agent.home / "done").unlink()
    ended = threading.Event()

    def watch():
        while not ended.wait(0.3):
            agent("lease", "run", "me:1:x")

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert is_reaped(agent, patience=2, seconds=4) is False
    finally:
        ended.set()
        watcher.join()
    assert agent("reap", "run", 9, "true").stdout == "already armed\n"
    agent("disarm", "run")
    assert agent("reap", "run", 9, "true").stdout == "armed\n", "the first reaper has ended"
    agent("disarm", "run")


def test_the_agent_shows_a_resolved_config(agent):
    script = '#!/bin/bash\necho "$JAX_PLATFORMS $*"; exit 3\n'
    (agent.home / "venv/bin/vit-scale").write_text(script)
    done = agent("show", "c0de", "show", "--config", "a b")
    assert (done.returncode, done.stdout) == (3, "cpu show --config a b\n")

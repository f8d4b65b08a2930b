"""A trainer that keeps the contract of vit-scale and trains nothing: for tests of the launcher.

Its workers go in step, as a collective has them do; worker 0 writes checkpoints; SIGTERM to one has
all save at the same step and exit 42; who waits in vain for another exits 134, with the noise of a
coordination service. FAKE_FAULTS is a list of {worker, step, do, attempt}.

It writes down each start, and shouts if two of one worker run at the same time.
"""

import fcntl
import json
import os
import pathlib
import signal
import sys
import time

STEPS, EVERY, SECONDS, PATIENCE = 12, 4, 0.03, 2.0
CONFIG = {
    "steps": STEPS,
    "stages": [],
    "data": {"name": "fractal", "path": ".data"},
    "init": {"source": ""},
    "objective": "classification",
}


def show():
    if asked := os.environ.get("FAKE_SHOWN"):
        pathlib.Path(asked).write_text(" ".join(sys.argv[1:]))
    wrong = [word for word in sys.argv if "nonsense" in word]
    if wrong:
        print(f"vit-scale: no config field is named {wrong[0]!r}", file=sys.stderr)
        return 2
    steps = [int(w.split("=")[1]) for w in sys.argv if w.startswith("--config.steps=")]
    config = {**CONFIG, "steps": steps[0] if steps else STEPS}
    config["data"] = {"name": os.environ.get("FAKE_DATA", "fractal"), "path": ".data"}
    print(json.dumps({"parameters": 1000, "global_batch": 64, "steps": STEPS, "config": config}))
    return 0


class Trainer:
    def __init__(self):
        words = sys.argv[2:]
        self.steps = STEPS
        for word in words:
            if word.startswith("--config.steps="):
                self.steps = int(word.partition("=")[2])
        self.workdir = pathlib.Path(words[words.index("--workdir") + 1])
        given = {
            w.partition("=")[0]: w.partition("=")[2] for w in words if w.startswith("--process")
        }
        self.number = int(given.get("--process", os.environ.get("FAKE_WORKER", 0)))
        self.count = int(given.get("--processes", os.environ.get("FAKE_WORKERS", 1)))
        self.attempt = int(os.environ["ATTEMPT"])
        self.sync = self.workdir / f"sync-{os.environ['JAX_COORDINATOR_PORT']}-{self.attempt}"
        self.sync.mkdir(parents=True, exist_ok=True)
        self.faults = json.loads(os.environ.get("FAKE_FAULTS", "[]"))
        self.seconds = float(os.environ.get("FAKE_SECONDS", SECONDS))
        self.secret = os.environ.get("WANDB_API_KEY", "")
        self.told = False
        self.step = 0
        signal.signal(signal.SIGTERM, self.tell)
        signal.signal(signal.SIGUSR2, self.profile)
        signal.signal(signal.SIGUSR1, lambda *_: print("stack of thread 1: wait()", flush=True))

    def tell(self, *_):
        self.told = True

    def profile(self, *_):
        folder = self.workdir / f"profile/plugins/profile/steps_1-10-{self.number}"
        folder.mkdir(parents=True)
        (folder / f"process_{self.number}.xplane.pb").write_text(f"trace of {self.number}")
        place = f"{folder}; to open it: xprof --logdir {self.workdir}/profile"
        print(f"vit-scale: profile of steps 1 to 10: {place}", flush=True)

    def beat(self, phase, code=None, words=""):
        content = {"run": str(self.workdir), "step": self.step, "phase": phase, "time": time.time()}
        content |= {"code": code, "words": words}
        file = pathlib.Path(os.environ["VIT_SCALE_HEARTBEAT"])
        file.with_suffix(".new").write_text(json.dumps(content))
        os.replace(file.with_suffix(".new"), file)

    def put(self, name, text):
        new = self.sync / f".{name}.{self.number}"
        new.write_text(text)
        os.replace(new, self.sync / name)

    def wait_for_all(self):
        """All are at this step; the step at which to stop, if one has been told to."""
        self.put(str(self.number), str(self.step))
        until = time.monotonic() + float(os.environ.get("FAKE_PATIENCE", PATIENCE))
        while True:
            there = [self.sync / str(i) for i in range(self.count)]
            if all(file.exists() and int(file.read_text()) >= self.step for file in there):
                break
            if time.monotonic() > until:
                print("Polled an error from coordination service: heartbeat timeout", flush=True)
                os._exit(134)
            self.beat("train")
            time.sleep(0.02)
        if self.told and not (self.sync / "stop").exists():
            self.put("stop", str(self.step + 2))
        stop = self.sync / "stop"
        return int(stop.read_text()) if stop.exists() else None

    def fail(self):
        for fault in self.faults:
            if fault["worker"] != self.number or fault["step"] != self.step:
                continue
            if fault.get("attempt", self.attempt) == self.attempt:
                self.do(fault["do"])

    def do(self, what):
        if what == "raise":
            print("Traceback (most recent call last):\n  File x\nValueError: image 3 is corrupt")
            self.end(1, "image 3 is corrupt")
        elif what == "changed":  # a run resumes with its own config only
            line = (
                "(optim.lr: 0.1 -> 0.2); use another --workdir, or the config it was started with"
            )
            where = f"workdir {self.workdir} holds a run with a different config"
            print(f"vit-scale: {where} {line}", file=sys.stderr, flush=True)
            self.end(1, f"{where} {line}")
        elif what == "disagree":  # before any heartbeat of its own: both find it out
            line = "hosts disagree: process 1 differs from process 0 (x is 1)"
            heard = f"process 1: {line}" if self.number != 1 else line
            print(f"vit-scale: {heard}", flush=True)
            os._exit(1)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "killall":
            os.killpg(0, signal.SIGKILL)
        elif what == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "hang":
            while True:
                self.beat("train")
                time.sleep(0.05)
        elif what == "busy":
            print("RuntimeError: The TPU is already in use by process with pid 7")
            self.end(1)
        elif what == "leak":
            print(f"a trainer should not print {self.secret}", flush=True)
        elif what.startswith("exit"):
            self.end(int(what[4:]))

    def end(self, code, words=""):
        sys.stdout.flush()
        self.beat("train", code, words)
        os._exit(code)

    def save(self):
        if self.number == 0:
            file = self.workdir / "checkpoint"
            file.with_suffix(".new").write_text(str(self.step))
            os.replace(file.with_suffix(".new"), file)

    def run(self):
        with (self.workdir / f"worker-{self.number}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                (self.workdir / "DOUBLE").write_text(f"worker {self.number}")
                return 1
            return self.train()

    def train(self):
        checkpoint = self.workdir / "checkpoint"
        self.step = int(checkpoint.read_text()) if checkpoint.exists() else 0
        entry = {"worker": self.number, "attempt": self.attempt, "step": self.step}
        with (self.workdir / "starts.jsonl").open("a") as starts:
            starts.write(json.dumps({**entry, "secret": bool(self.secret)}) + "\n")
        self.beat("start")
        while self.step < self.steps:
            stop = self.wait_for_all()
            self.fail()
            if stop is not None and self.step >= stop:
                self.save()
                self.end(42, f"stopped by SIGTERM after step {self.step}")
            time.sleep(self.seconds)
            self.step += 1
            self.beat("train")
            print(f"worker {self.number} step {self.step}", flush=True)
            if self.step % EVERY == 0:
                self.save()
        self.fail()
        self.wait_for_all()
        self.save()
        self.beat("train", 0)
        return 0


if __name__ == "__main__":
    sys.exit(show() if sys.argv[1] == "show" else Trainer().run())

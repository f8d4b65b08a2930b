"""`vit-scale`, with one fault that happens at an exact moment: what soak.py runs.

SOAK_FAULT is JSON: {"kind": "sigkill", "phase": "eval", "nth": 2, "delay": 0.01} strikes 10 ms
after the phase is entered for the second time; with "process", only that one of several. SOAK_LOG
is a file that gets a line for each phase entered, one for the fault, and one for the end that says
when it was last asked whether to stop. SOAK_NAN is a list of batches, by position, whose pixels are
NaN on the device. The training is what everybody runs.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time

BEGAN = time.monotonic()
FAULT = json.loads(os.environ.get("SOAK_FAULT", "{}"))
LOG = os.environ.get("SOAK_LOG", os.devnull)
NAN = json.loads(os.environ.get("SOAK_NAN", "[]"))
MARK = (1, 2, 3)  # the first pixel of a batch that is to become NaN
PROCESS = int(sys.argv[sys.argv.index("--process") + 1]) if "--process" in sys.argv else 0
phase = "import"
asked = 0.0  # when this process last asked whether to stop


def log(**content) -> None:
    with contextlib.suppress(OSError), open(LOG, "a") as file:  # the disk may be "full"
        row = {"time": time.monotonic() - BEGAN, "process": PROCESS, **content}
        file.write(json.dumps(row) + "\n")


def strike() -> None:
    time.sleep(FAULT["delay"])
    kind = FAULT["kind"]
    log(fault=kind, phase=phase)
    if kind == "disk":  # no file may grow: what a full disk and a quota look like to a writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    elif kind != "raise":
        number = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "freeze": signal.SIGSTOP}
        os.kill(os.getpid(), number[kind])


def arm(name: str, count: int) -> None:
    if FAULT.get("phase") != name or FAULT["nth"] != count:
        return
    if FAULT["kind"] == "raise":
        log(fault="raise", phase=name)
        raise RuntimeError("a mistake on this host alone")
    if FAULT["delay"]:
        threading.Thread(target=strike, daemon=True).start()
    else:
        strike()


def follow_phases() -> None:
    from vit_scale.runs import watchdog

    counts: dict[str, int] = {}
    enter = watchdog.Watchdog.enter_phase

    def entered(self, name: str) -> str:
        global phase
        before, phase = enter(self, name), name
        counts[name] = counts.get(name, 0) + 1
        log(phase=name)
        arm(name, counts[name])
        return before

    watchdog.Watchdog.enter_phase = entered


def follow_questions() -> None:
    from vit_scale.distributed import preemption

    requested = preemption.requested

    def noted() -> bool:
        global asked
        asked = time.monotonic() - BEGAN
        return requested()

    preemption.requested = noted


def spoil_batches() -> None:
    import jax.numpy as jnp

    from vit_scale.training import trainer

    # The package exports the function under the same name.
    objective = importlib.import_module("vit_scale.training.objectives.classification")
    read, augment = trainer.train_batches, objective.train_images

    def marked(*given):
        for position, batch in read(*given):
            if position in NAN:
                batch["image"][0, 0, 0] = MARK
            yield position, batch

    def spoilt(batch, *given):
        images, targets = augment(batch, *given)
        bad = (batch["image"][:, 0, 0] == jnp.array(MARK)).all(-1).any()
        return jnp.where(bad, jnp.nan, images), targets

    trainer.train_batches, objective.train_images = marked, spoilt


if __name__ == "__main__":
    if FAULT.get("process", PROCESS) != PROCESS:
        FAULT = {}
    from vit_scale import cli
    from vit_scale.distributed import preemption

    if FAULT.get("kind") == "sigterm":
        preemption.install()  # the verb does that first; what follows is only imported earlier
    log(phase="import")
    arm("import", 1)
    follow_phases()
    follow_questions()
    if NAN:
        spoil_batches()
    code = cli.main(sys.argv[1:])
    log(phase="end", asked=asked)
    sys.exit(code)

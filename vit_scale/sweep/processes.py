"""Run training processes on slots, with one progress bar for all of them."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from vit_scale.distributed import preemption
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.storage import paths
from vit_scale.sweep.slots import Slot

POLL = 0.5  # seconds
LOGS = "logs"
TRAIN = (sys.executable, "-m", "vit_scale.cli", "train")


class Job(NamedTuple):
    """One call of `vit-scale train`."""

    name: str
    arguments: Sequence[str]  # of `vit-scale train`
    folder: pathlib.Path  # of the run
    first: int  # the step that it starts from
    last: int  # and the one that it ends at


class Failure(NamedTuple):
    """How a process failed: its exit code, and the last line that it printed."""

    code: int
    line: str


def run_jobs(
    jobs: Sequence[Job], slots: Sequence[Slot], logs: pathlib.Path, quiet: bool
) -> dict[str, Failure]:
    """Run all jobs, one at a time on each slot; return how those failed that did.

    What they print goes to LOGS/NAME.txt. Raises UserError, after all processes have stopped, where
    one stopped resumably, and Preempted after SIGTERM.
    """
    waiting, free = list(jobs), list(slots)
    running: dict[subprocess.Popen, tuple[Job, Slot]] = {}
    begins: dict[str, int] = {}  # of what a process prints, in its log
    failures: dict[str, Failure] = {}
    logs.mkdir(parents=True, exist_ok=True)
    total = sum(job.last - job.first for job in jobs)
    with _stopping(running), tqdm(total=total, unit="step", disable=quiet or None) as bar:
        while waiting or running:
            preemption.check("between two runs of the sweep")
            while waiting and free:
                job, slot = waiting.pop(0), free.pop(0)
                file = logs / f"{job.name}.txt"
                begins[job.name] = file.stat().st_size if file.exists() else 0
                running[start(job, slot, file)] = job, slot
            time.sleep(POLL)
            for process in [one for one in running if one.poll() is not None]:
                job, slot = running.pop(process)
                free.append(slot)
                if process.returncode:
                    printed = (logs / f"{job.name}.txt").read_bytes()[begins[job.name] :]
                    failures[job.name] = failure(
                        process.returncode, printed.decode(errors="replace")
                    )
                if process.returncode == RESUMABLE or is_held(failures.get(job.name)):
                    message = f"run {job.name} stopped: {failures[job.name].line}"
                    raise UserError(message, RESUMABLE)
            bar.n = total - sum(job.last - job.first for job in waiting)
            bar.n -= sum(job.last - max(job.first, step_of(job)) for job, _ in running.values())
            bar.set_description(", ".join(job.name for job, _ in running.values())[:60])
            bar.refresh()
    return failures


def start(job: Job, slot: Slot, log: pathlib.Path) -> subprocess.Popen:
    """Start a job's process, which adds to `log`; on CPUs it inherits the slot's cores."""
    command = [*TRAIN, "--quiet", *job.arguments]
    with open(log, "ab") as file, _on_cores(slot):
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **slot.variables},
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others
        )


@contextlib.contextmanager
def _on_cores(slot: Slot) -> Iterator[None]:
    if not slot.cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, slot.cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _stopping(running: dict[subprocess.Popen, tuple[Job, Slot]]) -> Iterator[None]:
    """Stop the running processes, which save a checkpoint, where the body raises."""
    try:
        yield
    except BaseException:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
        raise


def failure(code: int, printed: str) -> Failure:
    """Return a process's failure; the last line of its output says why."""
    lines = [line for line in printed.splitlines() if line.strip()]
    last = lines[-1].removeprefix("vit-scale: ") if lines else "no output"
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return Failure(code, f"{last[:200]} ({how})")


def is_held(error: Failure | None) -> bool:
    """Return whether a run failed because another process trains it: of an earlier sweep's."""
    return error is not None and "is in use by process" in error.line


def step_of(job: Job) -> int:
    """Return the step that a run has reached, by its heartbeat; its first step without one."""
    if paths.in_bucket(job.folder):  # reading it every time would cost more than it tells
        return job.first
    try:
        beat = json.loads((job.folder / "heartbeats" / "0.json").read_text())
        return min(job.last, int(beat["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return job.first

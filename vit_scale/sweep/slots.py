"""Slots: the parts of a machine's devices on which runs train side by side."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

from vit_scale.errors import UserError

ASK = (  # kind, chips (which may have two devices each), hosts
    "import json, jax; devices = jax.local_devices(); "
    "chips = {tuple(d.coords) if d.platform == 'tpu' else d.id for d in devices}; "
    "print(json.dumps([jax.default_backend(), len(chips), jax.process_count()]))"
)
LIMIT = 120  # seconds for counting them
# Chips of a TPU host that a process takes, as the bounds of its part of the host's 2 x 2 or 2 x 4.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


class Slot(NamedTuple):
    """What a process of a run gets: variables, and the CPU cores it runs on; None: all."""

    variables: Mapping[str, str]
    cores: frozenset[int] | None = None


def make_slots(parallel: int) -> list[Slot]:
    """Divide this machine's devices among `parallel` runs; one run has all of them.

    On CPUs the cores are divided, on GPUs and TPU chips the devices. No device is opened in this
    process. Raises UserError where they can't be divided.
    """
    if parallel == 1:
        return [Slot({})]
    backend, chips = count_devices()
    if backend == "cpu":
        return cpu_slots(parallel)
    if chips % parallel:
        raise UserError(
            f"--parallel {parallel} does not divide this machine's {chips} {backend} devices"
        )
    return (tpu_slots if backend == "tpu" else gpu_slots)(parallel, chips // parallel)


def count_devices() -> tuple[str, int]:
    """Return the kind and number of devices, asked in another process, which then frees them."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, check=True, timeout=LIMIT
        )
    except subprocess.CalledProcessError as error:
        line = (error.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"this machine's devices can't be counted: {line}") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"this machine's devices can't be counted in {LIMIT} s: another process may hold them, "
            "or it is one of several hosts"
        ) from None
    backend, chips, hosts = json.loads(done.stdout.splitlines()[-1])
    if hosts > 1:
        raise UserError(
            f"--parallel divides one machine, and this is one of {hosts} hosts: print the runs' "
            "commands with --commands, and start each on a slice of its own"
        )
    return backend, chips


def cpu_slots(parallel: int) -> list[Slot]:
    """Divide the cores that this process may use."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores and parallel > len(cores):
        raise UserError(f"--parallel {parallel} is more than this machine's {len(cores)} cores")
    return [Slot({}, frozenset(cores[i::parallel]) or None) for i in range(parallel)]


def gpu_slots(parallel: int, each: int) -> list[Slot]:
    """Divide the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(parallel * each)]
    parts = [names[i * each : (i + 1) * each] for i in range(parallel)]
    return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(part)}) for part in parts]


def tpu_slots(parallel: int, each: int) -> list[Slot]:
    """Divide the chips of a TPU host."""
    if each not in TPU_BOUNDS:
        sizes = ", ".join(map(str, TPU_BOUNDS))
        raise UserError(f"--parallel {parallel} leaves {each} chips to a run; possible: {sizes}")
    bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[each], "TPU_PROCESS_BOUNDS": "1,1,1"}
    return [
        Slot({**bounds, "TPU_VISIBLE_DEVICES": ",".join(str(i * each + j) for j in range(each))})
        for i in range(parallel)
    ]

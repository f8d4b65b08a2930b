"""Several processes as one program: how they find each other, agree, and fail together.

Every host runs the same lines in the same order; process 0 alone writes what one may write (the
run's description, logs, Weights & Biases, the terminal). Guaranteed: nobody waits for ever for one
that never came, and a mistake that one host alone can see ends all of them with its own line.

With one process everything here costs nothing.
"""

import contextlib
import json
import os
import pathlib
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_scale.errors import FAILED, RESUMABLE, USAGE, UserError

WAIT = 300  # seconds for all processes to appear
PARTING = 15  # seconds for all to leave when they stop together


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = WAIT,
) -> None:
    """Meet the other processes, before anything touches a device.

    They find each other on TPU VMs, SLURM, Open MPI and GKE; elsewhere `coordinator`, the host:port
    of process 0, with the number of `processes` and this one's number, `process`. A process that is
    alone goes on alone.

    Raises:
      UserError: some of the three are missing, or don't fit together.

    Where not all come within `wait` seconds, the process says so and ends.
    """
    if jax.distributed.is_initialized():
        return
    given = (coordinator, processes, process)
    if any(value is not None for value in given) and None in given:
        raise UserError(
            "--coordinator, --processes and --process belong together: host:port of process 0, "
            "how many there are, and which one this is",
            USAGE,
        )
    # From here on jax takes SIGTERM, for `preemption.requested` to ask it.
    with _at_most(wait, f"the {processes or ''} processes did not all meet".replace("  ", " ")):
        try:
            # Its own time limit ends the process with a stack trace: let it never come.
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=wait + 3600
            )
        except ValueError as error:
            if coordinator is None and "coordinator_address" in str(error):
                return  # no cluster
            raise UserError(
                f"--process {process}, --processes {processes}: {error}", USAGE
            ) from None
        except jax.errors.JaxRuntimeError as error:  # a RuntimeError, too
            raise UserError(f"the processes did not meet: {_first_line(error)}") from error
        except RuntimeError:
            if coordinator is None:
                return  # a notebook, which has used its devices before: it is alone
            raise
        jax.process_count()  # opens the devices, for which all processes are needed as well


@contextlib.contextmanager
def _at_most(wait: int, what: str) -> Iterator[None]:
    """Ends the process with one line where what is inside lasts longer, wherever that hangs."""

    def end():
        print(
            f"vit-scale: {what} within {wait} s; start the same command on every host, and look "
            "there for one that has ended, or give more time with --wait",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILED)

    timer = threading.Timer(wait, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def leave(code: int, error: BaseException | None = None) -> None:
    """End a process that failed, at once, where others wait for it; return where there are none.

    What Python does at its exit would wait for them, while they wait for the step that never comes.
    The traceback of an unexpected `error` is printed.
    """
    if is_several():
        if error:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if code == RESUMABLE:  # where all stop, nobody leaves while another still needs it
            timer = threading.Timer(PARTING, os._exit, (code,))
            timer.daemon = True
            timer.start()
            with contextlib.suppress(RuntimeError):
                jax.distributed.shutdown()
        os._exit(code)


def is_several() -> bool:
    """Whether other processes take part."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, the one that writes."""
    return not is_several() or jax.process_index() == 0


def agree(value: Any) -> Any:
    """Process 0's `value`, on every process; anything that JSON holds."""
    if not is_several():
        return value
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.empty(0)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    data = mine.astype(np.uint8) if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Whatever a host raises in here, all raise: the others a UserError with its line and number.

    All wait for each other at the end, so never inside a loop that must be fast.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001, raised below, when the others know
        error = caught
    if is_several():
        _raise_another_ones(error)
    if error:
        raise error


def _raise_another_ones(error: Exception | None) -> None:
    size, longest = (
        4096,
        600,
    )  # bytes that travel, and characters of the line: JSON may need 6 for one
    code = error.code if isinstance(error, UserError) else FAILED
    text = json.dumps([code, _first_line(error)[:longest]]).encode() if error else b""
    mine = np.zeros(size, np.uint8)
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, size)
    for number, row in enumerate(everyone):
        if row.any() and number != jax.process_index() and error is None:
            code, line = json.loads(row.tobytes().rstrip(b"\0"))
            raise UserError(f"process {number}: {line}", code)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_alike(mine: Mapping[str, Any]) -> None:
    """Raises UserError on all processes unless every one's `mine`, of JSON, is process 0's."""
    if not is_several():
        return
    mine = json.loads(json.dumps(mine))
    theirs = agree(mine)
    with together():
        wrong = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        if wrong:
            each = (f"{name} is {mine.get(name)}, there {theirs.get(name)}" for name in wrong[:5])
            raise UserError(
                f"hosts disagree: process {jax.process_index()} would train something else than "
                f"process 0 ({'; '.join(each)}): start the same command, code and data on every "
                "host"
            )


def check_shared(folder: pathlib.Path) -> None:
    """Raises UserError on all processes unless every one sees what process 0 writes in `folder`."""
    if not is_several():
        return
    token, file = agree(secrets.token_hex(8)), folder / ".shared"
    with together():
        if is_first():
            file.write_bytes(token.encode())
    with together():
        try:
            seen = file.read_text()
        except OSError:
            seen = ""
        if seen != token:
            raise UserError(
                f"workdir {folder} is not the same folder on process {jax.process_index()} and on "
                "process 0: give a --workdir that all hosts share, such as gs://bucket/run or NFS"
            )
    with together():
        if is_first():
            file.unlink()

"""Several processes as one program: they connect, share values, and fail together.

Every process runs the same calls in the same order; process 0 alone writes what only one may write
(the run's description, metrics, Weights & Biases, the terminal). Guaranteed: no process waits for
ever for one that never starts, and an error that only one process meets ends all of them with its
message. With one process everything here is free.
"""

import contextlib
import json
import os
import pathlib
import re
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

WAIT = 300  # seconds for all processes to connect
SHUTDOWN = 15  # seconds for all processes to disconnect when they stop together


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = WAIT,
) -> None:
    """Connect to the other processes, before anything uses a device.

    TPU VMs, SLURM, Open MPI and GKE are detected. Elsewhere give `coordinator`, the host:port of
    process 0, the number of `processes`, and this one's index, `process`. Without a cluster a
    process runs alone.

    Raises UserError where some of the three are missing or invalid, and where another process has
    the devices. Ends the process, with one line and the exit code of a resumable run, where not all
    have connected within `wait` seconds.
    """
    if jax.distributed.is_initialized():
        return
    options = (coordinator, processes, process)
    if any(value is not None for value in options) and None in options:
        raise UserError(
            "--coordinator, --processes and --process must be given together: host:port of "
            "process 0, the number of processes, and the index of this one",
            USAGE,
        )
    # From here on jax handles SIGTERM, and `preemption.requested` asks jax.
    with _time_limit(wait, f"not all {processes or ''} processes connected".replace("  ", " ")):
        try:
            # jax's own time limit ends the process with a stack trace: set it out of reach.
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
            reason = f"the processes failed to connect: {_first_line(error)}"
            raise UserError(reason, RESUMABLE) from error
        except RuntimeError:
            if coordinator is None:
                return  # a notebook that has used its devices already: it runs alone
            raise
        open_devices()  # which needs all processes as well


@contextlib.contextmanager
def _time_limit(wait: int, failure: str) -> Iterator[None]:
    """End the process, with one line, if the code inside takes longer, wherever it hangs."""

    def end():
        print(
            f"vit-scale: {failure} within {wait} s; start the same command on every host, check "
            "that none has exited, or raise --wait",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RESUMABLE)

    timer = threading.Timer(wait, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def open_devices() -> list[jax.Device]:
    """Return all devices of all processes; the first call opens them.

    Raises UserError, resumable, where another process has them: jax alone would use the CPU where
    it can't open a TPU.
    """
    try:
        devices = jax.devices()
        chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
        if devices[0].platform == "cpu" and not chosen:
            _raise_if_busy(_tpu_error())
    except RuntimeError as error:
        _raise_if_busy(error)
        raise
    return devices


def _tpu_error() -> RuntimeError | None:
    try:
        jax.devices("tpu")
    except RuntimeError as error:
        return error
    return None


def _raise_if_busy(error: RuntimeError | None) -> None:
    if match := BUSY.search(str(error)):
        raise UserError(
            f"the accelerator is in use by another process ({match[0].strip()}): stop that one, or "
            "rerun the same command once it has ended",
            RESUMABLE,
        ) from error


# How libtpu, the kernel and CUDA say so.
BUSY = re.compile(
    r".*(already in use by|multi-process lockfile|Device or resource busy|busy or unavailable).*"
)


def leave(code: int, error: BaseException | None = None) -> None:
    """Exit a failed process at once if there are others; return if there are none.

    Python's normal exit would wait for the others, while they wait for a step that never comes.
    Prints the traceback of an unexpected `error`.
    """
    try:
        peers = has_peers()
    except RuntimeError:  # the devices can't be opened
        peers = True
    if peers:
        if error:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if code == RESUMABLE:  # all stop: stay connected until every process is done
            timer = threading.Timer(SHUTDOWN, os._exit, (code,))
            timer.daemon = True
            timer.start()
            with contextlib.suppress(RuntimeError):
                jax.distributed.shutdown()
        os._exit(code)


def has_peers() -> bool:
    """Tell whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Tell whether this is process 0, the one that writes."""
    return not has_peers() or jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """Return process 0's `value`, which JSON can hold, on every process."""
    if not has_peers():
        return value
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.empty(0)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    data = mine.astype(np.uint8) if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Raise on all processes what one raises inside; the others raise a UserError that names it.

    All wait for each other at the end: don't use it in a loop that must be fast.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001, raised below, once the others know
        error = caught
    if has_peers():
        _raise_error_of_peer(error)
    if error:
        raise error


def _raise_error_of_peer(error: Exception | None) -> None:
    size, longest = 4096, 600  # bytes sent, characters of a message: JSON takes up to 6 bytes each
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


def check_same(values: Mapping[str, Any]) -> None:
    """Raise UserError on all processes unless their `values`, of JSON, equal process 0's."""
    if not has_peers():
        return
    here = json.loads(json.dumps(values))
    first = broadcast(here)
    with shared_errors():
        wrong = [name for name in {**first, **here} if first.get(name) != here.get(name)]
        if wrong:
            each = (f"{name}: {here.get(name)} instead of {first.get(name)}" for name in wrong[:5])
            raise UserError(
                f"hosts disagree: process {jax.process_index()} differs from process 0 "
                f"({'; '.join(each)}): run the same command, code and data on every host"
            )


def check_shared(folder: pathlib.Path) -> None:
    """Raise UserError on all processes unless all see a file that process 0 writes in `folder`."""
    if not has_peers():
        return
    token, file = broadcast(secrets.token_hex(8)), folder / ".shared"
    with shared_errors():
        if is_first():
            file.write_bytes(token.encode())
    with shared_errors():
        try:
            content = file.read_text()
        except OSError:
            content = ""
        if content != token:
            raise UserError(
                f"workdir {folder} is not the same folder on process {jax.process_index()} and on "
                "process 0: use a --workdir that all hosts share, such as gs://bucket/run or NFS"
            )
    with shared_errors():
        if is_first():
            file.unlink()

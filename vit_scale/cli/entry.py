"""Run a command line: parse it, call its verb, and turn every failure into a line and an exit code.

A user's mistake is one line on standard error, never a traceback. Exit codes are in errors.py.
"""

import argparse
import contextlib
import glob
import io
import logging
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

from vit_scale.cli.parser import parser, split_overrides
from vit_scale.errors import DONE, FAILED, UserError, printable
from vit_scale.storage import errors as storage_errors


def _report_unraisable(unraisable) -> None:
    """Ignore what Orbax's coroutines raise after a checkpoint failed to be written or read.

    The failure itself is raised where the checkpoint is waited for.
    """
    if not any(text in str(unraisable.exc_value) for text in AFTER_A_FAILURE):
        sys.__unraisablehook__(unraisable)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    It ends quietly when nobody reads its output any more, as in `vit-scale show ... | head`.
    """
    if argv is None and sys.argv[1:2] and sys.argv[1] in COMPUTING_VERBS:
        tune_allocator()
    try:
        return run(sys.argv[1:] if argv is None else argv)
    finally:
        if _is_unread(sys.stdout):  # keeps Python from reporting a broken pipe at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tune_allocator() -> None:
    """Start this program anew, in the same process, with another way to allocate memory.

    XLA allocates a step's memory anew at each step, of which a CPU spends a fifth on page faults.
    With pages of 2 MB instead of 4 KB there are fewer, where Linux leaves the choice to programs
    (transparent_hugepage=madvise, the usual default). Where no accelerator trains, the allocator
    also keeps memory for the next step instead of returning it; then all threads share one arena,
    which threads that decode images beside an accelerator would wait for.

    The allocator is told when a program starts; another C library ignores the variable.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and HUGE_PAGES.partition("=")[0] not in tunables:
        chosen = [HUGE_PAGES] if has_accelerator() else [HUGE_PAGES, KEPT_MEMORY]
        os.environ["GLIBC_TUNABLES"] = ":".join([*filter(None, [tunables]), *chosen])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_accelerator() -> bool:
    """Return whether this machine has the device files of a TPU or GPU that JAX may use."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(glob.glob(pattern) for pattern in ACCELERATORS)


COMPUTING_VERBS = ("train", "eval", "probe", "predict")
HUGE_PAGES = "glibc.malloc.hugetlb=1"
KEPT_MEMORY = ":".join(
    (
        "glibc.malloc.mmap_threshold=1073741824",  # bytes: from there on, pages of their own
        "glibc.malloc.trim_threshold=4294967296",  # bytes of free memory at the end that stay
        "glibc.malloc.arena_max=1",  # the others' size is limited
    )
)
# TPUs, NVIDIA's and AMD's GPUs
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def _is_unread(stream: TextIO) -> bool:
    """Return whether a stream is a pipe without a reader."""
    with contextlib.suppress(OSError, ValueError):  # a notebook's stream has no file
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


AFTER_A_FAILURE = ("Event loop is closed", "Encountered error while reading array index")
RESUMABLE_VERBS = ("train", "sweep", "data")


def run(argv: Sequence[str]) -> int:
    """Run a command line whose output is read."""
    sys.unraisablehook = _report_unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is not
        sys.stdout.reconfigure(errors="backslashreplace")  # file names in no charset
    args = argparse.Namespace(verb="")
    arguments, overrides = split_overrides(argv)
    # Orbax logs hundreds of lines about a full disk, and the bucket packages log tracebacks about
    # refusals. Both become one line below.
    for name in ("absl", "asyncio", "gcsfs", "google"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        args = parser().parse_args(arguments)
        args.do(args, overrides)
        sys.stdout.flush()
    except UserError as error:
        return failed(str(error), error.code)
    except KeyboardInterrupt:
        advice = "; rerun the same command to resume" if args.verb in RESUMABLE_VERBS else ""
        return failed(f"stopped{advice}", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            return DONE
        if reason := storage_errors.reason(error):
            source = getattr(error, "filename", None) or "storage"
            return failed(f"{source}: {reason}", storage_errors.exit_code(error))
        leave_hosts(FAILED, error)
        raise
    return DONE


def failed(line: str, code: int) -> int:
    """Print why the command failed, and return its exit code."""
    with contextlib.suppress(BrokenPipeError):  # nobody reads it
        print(f"vit-scale: {printable(line)}", file=sys.stderr)
    leave_hosts(code)
    return code


def leave_hosts(code: int, error: Exception | None = None) -> None:
    """End this process at once if it is one of several, without waiting for the others."""
    if "vit_scale.distributed.multihost" in sys.modules:  # otherwise no hosts were joined
        from vit_scale.distributed import multihost

        multihost.leave(code, error)

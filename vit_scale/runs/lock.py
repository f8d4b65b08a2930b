"""One writer: the lock of a run's folder, which a death frees.

On a disk the kernel holds it, and lets go when the process ends, however it does. Where the file
system has no locks, one line says so and training goes on. A bucket has no such thing: there the
lock is an object, `RUN/.lock`, that its holder writes again every RENEW seconds. Each write names
the generation that it replaces, so that of two only one succeeds. One that was not renewed for
LEASE seconds is of a dead process, and is taken over; a holder that finds it taken, or can't renew
it for so long, ends at once, before it overwrites another's work.
"""

import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from typing import IO

from vit_scale.errors import RESUMABLE, UserError
from vit_scale.storage import cache, compare_and_swap, paths
from vit_scale.storage.errors import user_errors

NAME = ".lock"
RENEW, LEASE = 15.0, 90.0  # seconds
OTHER = "give another --workdir"
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what a lock says that another has
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def boot() -> str:
    """What is another at each start of this machine; empty where it can't be known."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pids() -> str:
    """The namespace that a process's number is of: two containers have two; empty if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Lock:
    """The lock of the folder `run`, held from `acquire` to `release`.

    Raises UserError where a live process holds it.
    """

    def __init__(self, run: pathlib.Path):
        self.run = run
        self._file: IO | None = None
        self._lease: Lease | None = None

    def acquire(self) -> None:
        try:
            self._lock_file()
            if paths.in_bucket(self.run):
                self._lease = Lease(self.run)
                self._lease.acquire()
        except BaseException:
            self.release()
            raise

    def _lock_file(self) -> None:
        with user_errors(f"cannot write to workdir {self.run}", OTHER):
            folder = cache.local(self.run)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / NAME, "a+")  # noqa: SIM115, open as long as the run
        with user_errors(f"cannot lock workdir {self.run}", OTHER):
            try:
                self._lock_as_possible(self._file)
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
                self._file.seek(0)
                raise in_use(self.run, self._file.read().strip() or "unknown") from error
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def _lock_as_possible(self, file: IO) -> None:
        """Lock it in the way that the file system knows; where it knows none, say so and go on.

        Lustre and some NFS mounts have no flock; some of them have POSIX's locks.
        """
        for lock in (fcntl.flock, fcntl.lockf):
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                reason = error.strerror
        print(
            f"vit-scale: {self.run} can't be locked on this file system ({reason}); training goes "
            "on: see to it that no other process trains in it",
            file=sys.stderr,
            flush=True,
        )

    def release(self) -> None:
        lease, file, self._lease, self._file = self._lease, self._file, None, None
        try:
            if lease:
                lease.release()
        finally:
            if file:
                file.close()


class Lease:
    """The lock's object in a bucket, renewed by a thread."""

    def __init__(self, run: pathlib.Path):
        self.run, self.object = run, run / NAME
        self._generation, self._renewed = "", 0.0
        self._name = secrets.token_hex(8)  # of this lock, in all that it writes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> None:
        """Take the lock; where another's was left, once it is clear that nobody renews it."""
        try:
            self._take()
        except UserError:
            raise  # it is another's
        except BaseException:
            self._generation = self._generation or self._own()  # the answer may have been lost
            raise

    def _own(self) -> str:
        """The generation of the object where this lock wrote it; empty where not, or unknown."""
        try:
            left, said = compare_and_swap.read(self.object)
        except Exception:  # noqa: BLE001, something else is being raised, which says more
            return ""
        return left if said.get("lock") == self._name else ""

    def _take(self) -> None:
        found = self._write("0")
        if not found:
            left, holder = self._wait_for_the_dead()
            found = self._write(left)
            if not found:
                raise in_use(self.run, holder)
        self._generation, self._renewed = found, time.monotonic()
        self._thread.start()

    def _wait_for_the_dead(self) -> tuple[str, str]:
        """The generation that a dead process left, and who that was."""
        first, said = compare_and_swap.read(self.object)
        holder = f"{said.get('pid', 'unknown')} on {said.get('host', 'unknown')}"
        until = time.monotonic() + (0 if is_dead(said) else LEASE)
        while first != "0" and time.monotonic() < until:
            time.sleep(min(1.0, LEASE / 10))
            now, _ = compare_and_swap.read(self.object)
            if now != first:
                if now == "0":
                    return now, holder
                raise in_use(self.run, holder)
        return first, holder

    def _write(self, generation: str) -> str | None:
        """The new generation; None where the lock is another's."""
        content = {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot(), "pids": pids()}
        data = json.dumps({**content, "lock": self._name, "time": time.time()}).encode()
        found = compare_and_swap.write(self.object, data, generation)
        if found is None:  # also where the answer was lost, and the same request made again
            left, said = compare_and_swap.read(self.object)
            found = left if said.get("lock") == self._name else None
        return found

    def _keep(self) -> None:
        while not self._ended.wait(RENEW):
            try:
                found = self._write(self._generation)
            except Exception:  # noqa: BLE001, a lock that nobody renews is soon another's
                found = self._generation if self._is_fresh() else None
            else:
                self._renewed = time.monotonic()
            if found is None and not self._ended.is_set():
                print(
                    f"vit-scale: the lock of {self.run} is lost: another process has taken it, or "
                    f"the bucket could not be reached for {LEASE:.0f} s; ended without saving",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RESUMABLE)
            self._generation = found or ""

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._renewed < LEASE - 2 * RENEW

    def release(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=LEASE)
        if self._generation:
            compare_and_swap.remove(self.object, self._generation)


def is_dead(said: dict) -> bool:
    """Whether the process that wrote this is of this machine, and has ended."""
    if said.get("host") != socket.gethostname():
        return False
    if said.get("boot") != boot():
        return True
    if said.get("pids") != pids():
        return False  # of another container, whose processes can't be seen from here
    return not pathlib.Path(f"/proc/{said.get('pid')}").exists()


def in_use(run: pathlib.Path, holder: str) -> UserError:
    return UserError(
        f"workdir {run} is in use by the live process {holder}; wait for it, stop it, or give "
        "another --workdir"
    )

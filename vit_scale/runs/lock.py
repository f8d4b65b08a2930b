"""The lock of a run's folder: one writer, and a dead writer's lock is freed.

On a disk the kernel holds the lock, and releases it when the process ends, however it ends. On a
file system without locks one line warns, and training continues. A bucket has no locks: there the
lock is a lease, the object `RUN/.lock`, which its holder rewrites every RENEW seconds by
compare-and-swap, so that of two writers one succeeds. A lease that was not renewed for LEASE
seconds belongs to a dead process and is taken over. A holder that lost its lease, or could not
renew it for that long, exits at once, before it overwrites another process's work.
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
OTHER = "use another --workdir"
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # another process has the lock
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def boot_id() -> str:
    """Return an id that changes each time this machine boots; "" where there is none."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Return this process's PID namespace, which differs between containers; "" if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Lock:
    """The lock of the folder `run`, held from `acquire` to `release`."""

    def __init__(self, run: pathlib.Path):
        self.run = run
        self._file: IO | None = None
        self._lease: Lease | None = None

    def acquire(self) -> None:
        """Take the lock. Raises UserError where a live process holds it."""
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
                self._lock_with_fallback(self._file)
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
                self._file.seek(0)
                raise in_use(self.run, self._file.read().strip() or "unknown") from error
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def _lock_with_fallback(self, file: IO) -> None:
        """Lock `file` with flock, else with a POSIX lock, else print a warning.

        Lustre and some NFS mounts have no flock; some of them have POSIX locks.
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
            f"vit-scale: cannot lock {self.run} on this file system ({reason}); training "
            "continues: make sure that no other process uses this workdir",
            file=sys.stderr,
            flush=True,
        )

    def release(self) -> None:
        """Free the lock, if it is held."""
        lease, file, self._lease, self._file = self._lease, self._file, None, None
        try:
            if lease:
                lease.release()
        finally:
            if file:
                file.close()


class Lease:
    """A lock as an object in a bucket, renewed by a thread."""

    def __init__(self, run: pathlib.Path):
        self.run, self.object = run, run / NAME
        self._generation, self._renewed = "", 0.0
        self._name = secrets.token_hex(8)  # tells this lease's writes from those of others
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> None:
        """Take the lease, after waiting until an existing one has expired."""
        try:
            self._take()
        except UserError:
            raise  # another process holds it
        except BaseException:
            self._generation = self._generation or self._own_generation()  # a response was lost
            raise

    def _own_generation(self) -> str:
        """Return the object's generation if this lease wrote it, else ""."""
        try:
            generation, content = compare_and_swap.read(self.object)
        except Exception:  # noqa: BLE001, the exception being handled says more
            return ""
        return generation if content.get("lock") == self._name else ""

    def _take(self) -> None:
        generation = self._write("0")
        if not generation:
            expired, holder = self._wait_until_expired()
            generation = self._write(expired)
            if not generation:
                raise in_use(self.run, holder)
        self._generation, self._renewed = generation, time.monotonic()
        self._thread.start()

    def _wait_until_expired(self) -> tuple[str, str]:
        """Return the generation of an expired lease and its holder. Raises UserError if renewed."""
        first, content = compare_and_swap.read(self.object)
        holder = f"{content.get('pid', 'unknown')} on {content.get('host', 'unknown')}"
        until = time.monotonic() + (0 if is_dead(content) else LEASE)
        while first != "0" and time.monotonic() < until:
            time.sleep(min(1.0, LEASE / 10))
            now, _ = compare_and_swap.read(self.object)
            if now != first:
                if now == "0":
                    return now, holder
                raise in_use(self.run, holder)
        return first, holder

    def _write(self, generation: str) -> str | None:
        """Replace `generation` of the object and return the new one; None if that has changed."""
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": boot_id(),
            "pids": pid_namespace(),
        }
        data = json.dumps({**content, "lock": self._name, "time": time.time()}).encode()
        written = compare_and_swap.write(self.object, data, generation)
        if written is None:  # perhaps by this lease: a lost response makes gcsfs retry its request
            current, content = compare_and_swap.read(self.object)
            written = current if content.get("lock") == self._name else None
        return written

    def _keep(self) -> None:
        while not self._ended.wait(RENEW):
            try:
                generation = self._write(self._generation)
            except Exception:  # noqa: BLE001, retried as long as the lease is valid
                generation = self._generation if self._is_fresh() else None
            else:
                self._renewed = time.monotonic()
            if generation is None and not self._ended.is_set():
                print(
                    f"vit-scale: lost the lock of {self.run}: another process has taken it, or the "
                    f"bucket was unreachable for {LEASE:.0f} s; exiting without saving",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RESUMABLE)
            self._generation = generation or ""

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._renewed < LEASE - 2 * RENEW

    def release(self) -> None:
        """Stop renewing, and remove the object if it is still this lease's."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=LEASE)
        if self._generation:
            compare_and_swap.remove(self.object, self._generation)


def is_dead(holder: dict) -> bool:
    """Tell whether the holder of a lease ran on this machine and has ended."""
    if holder.get("host") != socket.gethostname():
        return False
    if holder.get("boot") != boot_id():
        return True
    if holder.get("pids") != pid_namespace():
        return False  # in another container, whose processes are not visible here
    return not pathlib.Path(f"/proc/{holder.get('pid')}").exists()


def in_use(run: pathlib.Path, holder: str) -> UserError:
    """Return the error for a folder whose lock the process `holder` has."""
    return UserError(
        f"workdir {run} is in use by process {holder}; wait for it, stop it, or use another "
        "--workdir"
    )

"""Weights & Biases as a writer: online if possible, offline otherwise, never ending the run.

Whenever Weights & Biases fails, at the start, during the run or at its end, the writer continues
offline with the same run id; one line says so, and another gives the command that uploads the run.
"""

import contextlib
import html
import os
import secrets
import shlex
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_scale.errors import DONE, UserError
from vit_scale.storage import cache, files, paths
from vit_scale.tracking.writers import Writer, failure, number, print_line

NAME = "Weights & Biases"
# Seconds for connecting, for the server to create a run, and for the last uploads at its end: fewer
# under SLURM, Kubernetes and launch/tpu_vm.sh, so that a stop has saved and finished within the two
# minutes that they give it.
CONNECT, BEGIN, FINISH, FINISH_MANAGED = 5, 30, 120, 30
EVALUATED = ("eval/", "final/")  # begin the names of an evaluation's results
MANAGED = ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "VIT_SCALE_HEARTBEAT")


class WandbWriter(Writer):
    """Weights & Biases: online if there is an API key, else offline.

    The run's id is stored in its folder, so a resumed run continues the same W&B run. Offline, each
    start leaves a folder of its own; `wandb sync` of all of them makes one W&B run, by their common
    id. WANDB_MODE (online, offline, disabled) takes precedence. For a run in a bucket W&B's own
    folder is on this machine (cache.local); `flush` copies what is offline to the bucket.

    If the server is unreachable or rejects the run, or W&B's process dies, the writer says so once
    and continues offline; with `strict` it raises UserError instead.
    """

    def __init__(
        self, workdir: Path, project: str, name: str, quiet: bool = False, strict: bool = False
    ):
        import wandb

        self._wandb, self._folder, self._quiet = wandb, cache.local(workdir), quiet
        self._workdir, self._copies = workdir, dict[Path, files.AppendedFile]()
        self._options = {"project": project, "name": name, "dir": str(self._folder)}
        self._options["id"] = _run_id(workdir / "wandb_id.txt")
        self._run: Any = None
        self._strict, self._fell_back = strict, False
        self._partial: list[Path] = []  # folders of runs that went offline before their end
        self.exit_code = DONE
        self._attempt(self._begin)

    def _begin(self, offline: bool = False) -> None:
        wandb = self._wandb
        # wandb reads the variable once per process, but respects every argument.
        # silent: otherwise login asks the server for the name of the key's owner.
        try:
            session = wandb.setup(wandb.Settings(silent=True, console="off", disable_git=True))
        except ValueError as error:  # an invalid WANDB_ variable, which would fail offline too
            raise refused(error) from error
        mode: Any = "offline" if offline else os.environ.get("WANDB_MODE")
        if not mode:
            mode = None if has_key(wandb) else "offline"
        if mode in (None, "online"):
            check_reachable(session.settings.base_url)
        managed = not os.environ.keys().isdisjoint(MANAGED)
        finish = FINISH_MANAGED if managed else FINISH  # wandb reads it once
        limits = {"init_timeout": BEGIN, "finish_timeout": finish, "finish_timeout_raises": True}
        unset = {k: v for k, v in limits.items() if f"WANDB_{k.upper()}" not in os.environ}
        settings = wandb.Settings(**unset)
        self._run = wandb.init(**self._options, mode=mode, resume="allow", settings=settings)
        self._resumed = self._run.step  # W&B has rows up to here, of an earlier process

    def _attempt(self, action: Callable[[], Any]) -> None:
        """Run `action`; if it fails, go offline and repeat it. Raises if it fails again."""
        try:
            action()
        except UserError:
            raise
        except Exception as error:
            if self._strict:
                raise refused(error) from error
            if self._fell_back:
                raise
            self._go_offline(error)
            if action != self._begin:
                action()

    def _go_offline(self, error: Exception) -> None:
        self._fell_back = True
        reason = failure(NAME, error)
        self._leave_online()
        with contextlib.suppress(Exception):
            self._wandb.teardown()  # its process still holds the run, or has died
        self._begin(offline=True)
        run = self._options["id"]
        print_line(
            f"{reason}; run {run} continues offline, and its end prints the command to upload it"
        )

    def _leave_online(self) -> None:
        if self._run is not None and not self._run.offline and not self._run.disabled:
            self._partial.append(Path(self._run.dir).parent)

    def _log(self, row: Mapping[str, Any], step: int | None = None) -> None:
        """Write a row; W&B drops those of steps before its last one.

        It has the rows that a resumed run repeats, but perhaps not their evaluation, and not those
        after a rollback: these are written after its last one, with their step in column `step`.
        """

        def log() -> None:
            if step is None or step >= (last := self._run.step):
                self._run.log(dict(row), step=step)
            elif step >= self._resumed or any(name.startswith(EVALUATED) for name in row):
                self._run.log({**row, "step": step}, step=last + 1)

        self._attempt(log)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._log({name: number(value) for name, value in scalars.items()}, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            self._log({name: list(map(self._wandb.Image, batch))}, step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            page = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
            self._log({name: page}, step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._attempt(lambda: self._run.config.update(dict(hparams), allow_val_change=True))

    def append(self, pictures: Mapping[str, np.ndarray], values: Mapping[str, float]) -> None:
        """Write one row after the last one."""
        shown = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._log(shown | dict(values))

    def _offline_folders(self) -> list[Path]:
        """List the folders that hold what is not on the server."""
        offline = (self._folder / "wandb").glob(f"offline-run-*-{self._run.id}")
        return [*self._partial, *sorted(offline)]

    def flush(self) -> None:
        """Copy offline files to the run's bucket, where they outlive this machine."""
        if not paths.in_bucket(self._workdir):
            return
        for folder in self._offline_folders():
            for file in filter(Path.is_file, folder.rglob("*")):
                copy = files.AppendedFile(self._workdir / file.relative_to(self._folder))
                self._copies.setdefault(file, copy).save()

    def close(self) -> None:
        try:
            self._run.finish(exit_code=self.exit_code)
        except Exception as error:
            if self._strict:
                raise UserError(failure(NAME, error)) from error
            self._leave_online()
            if not self._partial:
                raise
            print_line(f"{failure(NAME, error)}; the rest of the run is on this machine")
            self._fell_back = True
        with contextlib.suppress(OSError):
            self.flush()
        if self._run.disabled or (self._quiet and not self._fell_back):
            return
        if self._run.offline or self._partial:
            names = (str(folder.resolve()) for folder in self._offline_folders())
            line = shlex.join(["wandb", "sync", *names])
            bucket = paths.in_bucket(self._workdir)
            copy = f" (copied to {self._workdir / 'wandb'})" if bucket else ""
            print(f"{NAME} ran offline{copy}; to upload this run:\n{line}", file=sys.stderr)
        else:
            print(f"Weights & Biases: {self._run.url}", file=sys.stderr)


def refused(error: Exception) -> UserError:
    """Return the error for settings or a server that reject the run."""
    return UserError(f"{failure(NAME, error)}; set WANDB_MODE=offline, or --config.log.wandb=false")


def check_reachable(url: str) -> None:
    """Raise OSError if nothing answers at `url`; behind a proxy don't try."""
    if {"http", "https", "all"} & set(urllib.request.getproxies()):
        return
    parts = urllib.parse.urlsplit(url)
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT).close()
    except OSError as error:
        raise OSError(f"{url} can't be reached ({error.strerror or error})") from error


def has_key(wandb: Any) -> bool:
    """Tell whether the environment, a netrc file or wandb's settings hold an API key."""
    return wandb.login(prompt=False, verify=False)


def _run_id(path: Path) -> str:
    """Return the id of a run, stored in its folder; in a W&B sweep it comes from the agent."""
    if not path.exists():
        swept = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        files.write(path, f"{swept or secrets.token_hex(4)}\n".encode())
    return path.read_text().strip()

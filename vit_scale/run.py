"""A run's folder: who may write it, what it is a run of, and what it ends with.

    run.json        resolved config, class names, versions, git state: written once, before training
    checkpoints/    see checkpoint.py
    metrics.jsonl, tensorboard/, wandb/     see tracking.py
    report.json     the result, written last
    .lock           held by the one process that writes here; the kernel frees it when that dies

The folder alone is enough to load, evaluate and predict (law 7). Of one in a bucket, `gs://`, the
lock and Weights & Biases' files are on the disk of the machine that trains (`paths.local`).
"""

import fcntl
import json
import os
import pathlib

from vit_scale import config, paths
from vit_scale.errors import UserError

# Fields that say where and how a run is watched, not what it computes: they may change on resuming.
# So may what is done about a corrupt image: a run that stopped at one has met none before.
FREE = (
    *("log.", "checkpoint.", "data.workers", "data.path", "data.memory", "data.on_corrupt"),
    *("eval.batch", "mesh."),
)


class Run:
    """The folder `workdir`, locked for this process while the context lasts.

    Raises UserError where it can't be made or written, where another live process holds it, and
    where it is a run of another config: with the differences.

    A bucket has no lock that a death frees: of a `workdir` in one, only the processes of the same
    machine (and user) are kept out. Two machines that train in it at once overwrite each other.
    """

    def __init__(self, workdir: str | os.PathLike, description: dict):
        self.path = paths.path(workdir)
        self.description = description

    def __enter__(self) -> "Run":
        try:
            folder = paths.local(self.path)
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "a+")
        except OSError as error:
            raise UserError(
                f"cannot write to workdir {self.path}: {error.strerror}; give another --workdir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            raise UserError(
                f"workdir {self.path} is in use by the live process {holder}; wait for it, stop "
                "it, or give another --workdir"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        try:
            self._claim()
        except UserError:
            self._lock.close()  # a refused run holds nothing
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._lock.close()

    def _claim(self) -> None:
        """Write run.json, or check that this config continues the one that is there."""
        path = self.path / "run.json"
        if not path.exists():
            write_json(path, self.description)
            return
        # Through this version's schema: a field that is newer than the run has its default.
        stored = read_json(path).get("config")
        if not isinstance(stored, dict):
            raise UserError(f"{path} is damaged: it holds no config; give another --workdir")
        begun = config.to_json(config.from_json(stored))
        differences = config.differences(begun, self.description["config"])
        changed = [line for line in differences if not line.startswith(FREE)]
        if changed:
            raise UserError(
                f"workdir {self.path} holds a run of another config ({'; '.join(changed)}); "
                "give another --workdir, or the config it was started with"
            )

    @property
    def report(self) -> dict | None:
        """What the finished run came to; None before its end."""
        path = self.path / "report.json"
        return read_json(path) if path.exists() else None

    def write_report(self, content: dict) -> None:
        """End the run."""
        write_json(self.path / "report.json", content)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write a whole file or none. Raises UserError where the disk refuses."""
    try:
        paths.write(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space, then run again"
        ) from error


def read_json(path: pathlib.Path) -> dict:
    """The content of a run's JSON file. Raises UserError where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not the folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content

"""A run's folder: who may write it, what it is a run of, and what it ends with.

    run.json        resolved config, class names, versions, git state: written once, before training
    checkpoints/    see checkpoint/
    metrics.jsonl, tensorboard/, wandb/     see tracking.py
    rollbacks.json  where training went back to a checkpoint, if it did (divergence.py)
    heartbeats/     what each process is doing (watch.py)
    goodput.json    what the time was spent on (goodput.py)
    damaged/        checkpoints that were not what had been written, if there were any
    report.json     the result, written last
    .lock           held by the one process that writes here (lock.py)

The folder alone is enough to load, evaluate and predict (law 7). Of one in a bucket, `gs://`,
Weights & Biases' files are on the disk of the machine that trains (`paths.local`).
"""

import json
import os
import pathlib

from ml_collections import ConfigDict

from vit_scale import checkpoint, config, hosts, paths
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.lock import Lock

# Fields that say where and how a run is watched, not what it computes: they may change on resuming.
# So may what is done about a corrupt image: a run that stopped at one has met none before.
FREE = (
    *("log.", "checkpoint.", "data.workers", "data.path", "data.memory", "data.on_corrupt"),
    *("eval.batch", "mesh.", "watchdog.", "distill.teacher"),  # its checksum may not
)
# And so may where a run started from, once it has a checkpoint: it is not read again. Pretraining
# that was moved, or that is seen from another folder, goes by another path.
BEGUN = ("init.source",)
# Fields that hold the path of another run or of weights, as it was typed.
PATHS = ("init.source", "distill.teacher")


class Run:
    """The folder `workdir`, locked while the context lasts, by process 0 for all hosts.

    `report` is what the finished run came to, None before its end.

    Raises UserError where it can't be made or written, where another live process holds it, where
    it is a run of another config (with the differences), and where the hosts don't share it.
    """

    def __init__(self, workdir: str | os.PathLike, description: dict):
        self.path = paths.path(workdir)
        self.description = description
        self.report: dict | None = None
        self._lock = Lock(self.path)

    def __enter__(self) -> "Run":
        try:
            with hosts.together():
                if hosts.is_first():
                    self._lock.acquire()
                    self._claim()
            hosts.check_shared(self.path)
            with hosts.together():
                self.report = self._read_report()
            self.report = hosts.agree(self.report)
        except BaseException:  # Ctrl-C as well: what is not opened holds nothing
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if hosts.is_first():
            self._lock.release()

    def _claim(self) -> None:
        """Write run.json, or check that this config continues the one that is there."""
        path = self.path / "run.json"
        if not path.exists():
            write_json(path, self.description)
            return
        # Through this version's schema: a field that is newer than the run has its default.
        content = read_json(path)
        stored = content.get("config")
        if not isinstance(stored, dict):
            raise UserError(f"{path} is damaged: it holds no config; give another --workdir")
        begun = config.to_json(config.from_json(stored))
        differences = config.differences(begun, self.description["config"])
        new = config.dotted(self.description["config"])
        same = tuple(
            f"{field}: "
            for field in PATHS
            if paths.is_same(_recorded(field, self.path, content), str(new.get(field, "")))
        )
        free = same + FREE + (BEGUN if checkpoint.steps(self.path) else ())
        changed = [line for line in differences if not line.startswith(free)]
        if changed:
            raise UserError(
                f"workdir {self.path} holds a run of another config ({'; '.join(changed)}); "
                "give another --workdir, or the config it was started with"
            )

    def _read_report(self) -> dict | None:
        path = self.path / "report.json"
        return read_json(path) if hosts.is_first() and path.exists() else None

    def write_report(self, content: dict) -> None:
        """End the run."""
        with hosts.together():
            if hosts.is_first():
                write_json(self.path / "report.json", content)
        self.report = content


def continued(cfg: ConfigDict, workdir: str | os.PathLike) -> ConfigDict:
    """`cfg` for resuming in `workdir`: fields its run lacks stay as it began (`config.BEFORE`).

    Paths of other runs that were typed in another folder, and are not here, are found again.
    """
    path = paths.path(workdir) / "run.json"
    content = read_json(path) if path.exists() else {}
    if not isinstance(content.get("config"), dict):
        return cfg
    cfg, begun = config.continued(cfg, content["config"]), config.dotted(content["config"])
    for field, value in config.fields(cfg).items():
        if field in PATHS and value == begun.get(field) and not os.path.exists(value):
            cfg.update_from_flattened_dict({field: _recorded(field, path.parent, content)})
    return cfg


def _recorded(field: str, run: pathlib.Path, content: dict) -> str:
    """The path in a field of a run.json, from here (`paths.recorded`)."""
    name = config.dotted(content["config"]).get(field) or ""
    return paths.recorded(name, run, content.get("cwd", ""))


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write a whole file or none. Raises UserError where the disk refuses."""
    try:
        paths.write(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space, then run again", RESUMABLE
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

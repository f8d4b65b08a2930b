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
Weights & Biases' files are on the disk of the machine that trains (`cache.local`).
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.distributed import multihost
from vit_scale.errors import RESUMABLE, UserError, printable
from vit_scale.runs.lock import Lock
from vit_scale.storage import files, paths
from vit_scale.storage.errors import user_errors

# Fields that say where and how a run is watched, not what it computes: they may change on resuming.
# So may what is done about a corrupt image: a run that stopped at one has met none before.
FREE = (
    *("log.", "checkpoint.", "data.workers", "data.path", "data.memory", "data.on_corrupt"),
    *("data.changed", "eval.batch", "mesh.", "watchdog."),
    "distill.teacher",  # its checksum may not
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
    it is a run of another config or of other data (with the differences), and where the hosts don't
    share it.
    """

    def __init__(self, workdir: str | os.PathLike, description: dict):
        self.path = paths.parse(workdir)
        self.description = description
        self.report: dict | None = None
        self._lock = Lock(self.path)

    def __enter__(self) -> "Run":
        try:
            with multihost.together():
                if multihost.is_first():
                    self._lock.acquire()
                    self._claim()
            multihost.check_shared(self.path)
            with multihost.together():
                self.report = self._read_report()
            self.report = multihost.agree(self.report)
        except BaseException:  # Ctrl-C as well: what is not opened holds nothing
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if multihost.is_first():
            self._lock.release()

    def _claim(self) -> None:
        """Write run.json, or check that this config continues the one that is there."""
        path = self.path / "run.json"
        if not path.exists():
            write_json(path, self.description)
            return
        # Through this version's schema: a field that is newer than the run has its default.
        begun = read_json(path)
        stored = begun.get("config")
        if not isinstance(stored, dict):
            raise UserError(f"{path} is damaged: it holds no config; give another --workdir")
        before = config.to_json(config.from_json(stored))
        differences = config.differences(before, self.description["config"])
        new = config.dotted(self.description["config"])
        same = tuple(
            f"{field}: "
            for field in PATHS
            if paths.is_same(_recorded(field, self.path, begun), str(new.get(field, "")))
        )
        free = same + FREE + (BEGUN if checkpoint.steps(self.path) else ())
        changed = [line for line in differences if not line.startswith(free)]
        if changed:
            raise UserError(
                f"workdir {self.path} holds a run of another config ({'; '.join(changed)}); "
                "give another --workdir, or the config it was started with"
            )
        if not (self.path / "report.json").exists():  # a finished run is left as it is
            refuse_other_data(self.path, begun, self.description)

    def _read_report(self) -> dict | None:
        path = self.path / "report.json"
        return read_json(path) if multihost.is_first() and path.exists() else None

    def write_report(self, content: dict) -> None:
        """End the run."""
        with multihost.together():
            if multihost.is_first():
                write_json(self.path / "report.json", content)
        self.report = content


def continued(cfg: ConfigDict, workdir: str | os.PathLike) -> ConfigDict:
    """`cfg` for resuming in `workdir`: fields its run lacks stay as it began (`config.BEFORE`).

    Paths of other runs that were typed in another folder, and are not here, are found again.
    """
    path = paths.parse(workdir) / "run.json"
    content = read_json(path) if path.exists() else {}
    if not isinstance(content.get("config"), dict):
        return cfg
    cfg, begun = config.continued(cfg, content["config"]), config.dotted(content["config"])
    for field, value in config.fields(cfg).items():
        if field in PATHS and value == begun.get(field) and not os.path.exists(value):
            cfg.update_from_flattened_dict({field: _recorded(field, path.parent, content)})
    return cfg


def _recorded(field: str, run: pathlib.Path, content: dict) -> str:
    """The path in a field of a run.json, from here (`paths.resolve`)."""
    name = config.dotted(content["config"]).get(field) or ""
    return paths.resolve(name, run, content.get("cwd", ""))


def refuse_other_data(folder: pathlib.Path, begun: dict, now: dict) -> None:
    """Raises UserError where a run's data, as two descriptions have it, is not what it began with.

    Images that were added or removed are accepted with data.changed, which says so; other classes
    are not: the labels would mean something else. What a description lacks is not compared.
    """
    before, after = begun.get("classes"), now.get("classes")
    if before is not None and after is not None and list(before) != list(after):
        raise UserError(
            f"workdir {folder} holds a run of other classes ({_other_names(before, after)}); give "
            "another --workdir, or the data it was started with"
        )
    pairs = _pairs(begun.get("data"), now.get("data"))
    for part, (old, new) in pairs.items():
        if {"slices"} <= old.keys() & new.keys() and old["slices"] != new["slices"]:
            raise UserError(
                f"workdir {folder} holds a run of another cut ({part}: {new['name']} by "
                f"{new['slices']}, was by {old['slices']}): it would train on what it held out; "
                "give another --workdir, or the data it was started with"
            )
    lines = {part: _other_images(*pair) for part, pair in pairs.items()}
    changed = "; ".join(f"{part}: {line}" for part, line in lines.items() if line)
    if not changed:
        return
    if not now["config"]["data"]["changed"]:
        raise UserError(
            f"workdir {folder} holds a run of other data ({changed}); give another --workdir, the "
            "data it was started with, or --config.data.changed=True to go on with what there is "
            "now"
        )
    line = f"vit-scale: data.changed: since this run began, {changed}"
    print(printable(line), file=sys.stderr, flush=True)


def _other_names(before: Sequence[str], after: Sequence[str]) -> str:
    old, current = set(before), set(after)
    gone = [repr(name) for name in before if name not in current]
    new = [repr(name) for name in after if name not in old]
    named = [
        f"{what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("without", gone), ("with", new))
        if names
    ]
    pairs = zip(before, after, strict=False)
    at = next((i for i, (was, now) in enumerate(pairs) if was != now), None)
    if at is not None:
        named.append(f"class {at} was {before[at]!r}, is {after[at]!r}")
    if len(before) != len(after):
        named.append(f"{len(before)} -> {len(after)} classes")
    return ", ".join(named)


def _pairs(before: dict | None, after: dict | None) -> dict[str, tuple[dict, dict]]:
    """Of each set that two descriptions know, what they say; a run of before knows one."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return {}
    old, new = before.get("sets", {"train": before}), after.get("sets", {"train": after})
    return {part: (old[part], new[part]) for part in old if part in new}


def _other_images(before: dict, after: dict) -> str:
    """What changed in a set, or nothing. Without a fingerprint, only its size is compared."""
    prints = before.get("fingerprint"), after.get("fingerprint")
    same = None in prints or prints[0] == prints[1]
    if same and before.get("images") == after.get("images"):
        return ""
    whole = "of" if "of" in before and "of" in after else "images"
    old, new = int(before.get(whole, 0)), int(after.get(whole, 0))
    if old == new:
        return f"{after['name']} has as many images, {new:,}, but other paths or labels"
    change = f"{new - old:,} more" if new > old else f"{old - new:,} fewer"
    return f"{after['name']} is of {old:,} -> {new:,} images, {change}"


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write a whole file or none. Raises UserError if that fails."""
    with user_errors(f"cannot write {path}", "free space, then rerun", RESUMABLE):
        files.write(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: pathlib.Path) -> dict:
    """The content of a run's JSON file. Raises UserError where it is missing or damaged."""
    with user_errors(f"cannot read {path}", also=(ValueError,)):
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: {path.parent} is not the folder of a run"
            ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content

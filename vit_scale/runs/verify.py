"""Verification of a run's folder: every checkpoint read and compared, every file parsed."""

import functools
import json
import os
from collections.abc import Callable, Iterator

from tqdm import tqdm

from vit_scale import checkpoint
from vit_scale.errors import UserError
from vit_scale.runs import rollbacks
from vit_scale.runs.json_files import read_json
from vit_scale.storage import paths


def verify(run: str | os.PathLike) -> list[dict[str, str]]:
    """Verify every checkpoint and every file of a run.

    Returns [{"file": "checkpoints/400", "state": "whole", "what": "213 arrays"}, ...], where the
    state is whole or damaged. Raises UserError where `run` is not a run folder.
    """
    folder = paths.parse(run)
    if not (folder / "run.json").is_file() and not checkpoint.all_steps(folder):
        raise UserError(f"{folder} is not a run folder: it has no run.json")
    rows = []
    with tqdm(list(_checks(folder)), desc="verify", unit="file", disable=None, leave=False) as bar:
        for name, check in bar:
            try:
                rows.append({"file": name, "state": "whole", "what": check()})
            except UserError as error:
                rows.append({"file": name, "state": "damaged", "what": str(error)})
    return rows


def _checks(folder) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each file, and a function that reads it and describes its content."""
    yield "run.json", lambda: read_json(folder / "run.json").get("name", "")
    for step in checkpoint.all_steps(folder):
        path = folder / checkpoint.FOLDER / str(step)
        yield f"{checkpoint.FOLDER}/{step}", functools.partial(_arrays, path)
    if (base := folder / checkpoint.BASE / "0").is_dir():
        yield f"{checkpoint.BASE}/0", functools.partial(_arrays, base)
    if (folder / "metrics.jsonl").is_file():
        yield "metrics.jsonl", lambda: f"{_rows(folder / 'metrics.jsonl'):,} rows"
    if (folder / rollbacks.FILE).is_file():
        yield rollbacks.FILE, lambda: f"{len(rollbacks.read(folder))} rollbacks"
    if (folder / "report.json").is_file():
        yield "report.json", lambda: f"step {read_json(folder / 'report.json').get('step')}"


def _arrays(path) -> str:
    return f"{checkpoint.verify(path):,} arrays"


def _rows(file) -> int:
    try:
        return len([json.loads(line)["step"] for line in file.read_text().splitlines()])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error

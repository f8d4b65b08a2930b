"""Whether a run's folder is whole: every checkpoint read and compared, every file parsed."""

import functools
import json
import os
from collections.abc import Callable, Iterator

from tqdm import tqdm

from vit_scale import checkpoint
from vit_scale.errors import UserError
from vit_scale.runs import divergence
from vit_scale.runs.run_folder import read_json
from vit_scale.storage import paths


def verify(run: str | os.PathLike) -> list[dict[str, str]]:
    """[{"file": "checkpoints/400", "state": "whole", "what": "213 arrays"}, ...] of a run's folder.

    `state` is whole or damaged. Raises UserError where `run` is not the folder of a run.
    """
    folder = paths.parse(run)
    if not (folder / "run.json").is_file() and not checkpoint.folders(folder):
        raise UserError(f"{folder} is not the folder of a run: it has no run.json")
    rows = []
    with tqdm(list(_checks(folder)), desc="verify", unit="file", disable=None, leave=False) as bar:
        for name, check in bar:
            try:
                rows.append({"file": name, "state": "whole", "what": check()})
            except UserError as error:
                rows.append({"file": name, "state": "damaged", "what": str(error)})
    return rows


def _checks(folder) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is to be looked at, and what reads it and says what is in it."""
    yield "run.json", lambda: read_json(folder / "run.json").get("name", "")
    for step in checkpoint.folders(folder):
        place = folder / checkpoint.FOLDER / str(step)
        yield f"{checkpoint.FOLDER}/{step}", functools.partial(_arrays, place)
    if (folder / "metrics.jsonl").is_file():
        yield "metrics.jsonl", lambda: f"{_rows(folder / 'metrics.jsonl'):,} rows"
    if (folder / divergence.FILE).is_file():
        yield divergence.FILE, lambda: f"{len(divergence.read(folder))} rollbacks"
    if (folder / "report.json").is_file():
        yield "report.json", lambda: f"step {read_json(folder / 'report.json').get('step')}"


def _arrays(place) -> str:
    return f"{checkpoint.verify(place):,} arrays"


def _rows(file) -> int:
    try:
        return len([json.loads(line)["step"] for line in file.read_text().splitlines()])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error

"""A run's JSON files: written whole or not at all, read back as one object or refused."""

import json
import pathlib

from vit_scale.errors import RESUMABLE, UserError
from vit_scale.storage import files
from vit_scale.storage.errors import user_errors


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write `content` to `path`, whole or not at all. Raises UserError where that fails."""
    with user_errors(f"cannot write {path}", "free space, then rerun", RESUMABLE):
        files.write(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: pathlib.Path) -> dict:
    """Return the object in a run's JSON file. Raises UserError where it is missing or damaged."""
    with user_errors(f"cannot read {path}", also=(ValueError,)):
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {path.parent} is not a run folder") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return content

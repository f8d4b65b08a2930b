"""Write an object only over the content that was read: of two concurrent writers one succeeds.

Cloud Storage gives every content of an object a generation, a number that is never used again. A
request with the precondition `ifGenerationMatch` fails if another process has written meanwhile.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from vit_scale.storage.bucket import SCHEME, file_system
from vit_scale.storage.errors import os_errors


def read(path: pathlib.Path) -> tuple[str, dict]:
    """Return an object's generation, "0" if it does not exist, and its JSON, {} if unreadable."""
    try:
        with os_errors(path):
            generation = str(file_system().info(str(path))["generation"])
            return generation, json.loads(file_system().cat_file(str(path)))
    except FileNotFoundError:
        return "0", {}
    except ValueError:
        return generation, {}


def write(path: pathlib.Path, data: bytes, generation: str) -> str | None:
    """Write an object if it still has this generation, or if it does not exist for "0".

    Returns its new generation, or None if another process has written it.
    """
    bucket, _, name = str(path).removeprefix(SCHEME).partition("/")
    url = f"{file_system()._location}/upload/storage/v1/b/{bucket}/o"
    query = {"uploadType": "media", "name": name, "ifGenerationMatch": generation}

    def upload() -> str:
        return file_system().call("POST", url, **query, data=data, json_out=True)["generation"]

    return _if_unchanged(upload, path)


def remove(path: pathlib.Path, generation: str) -> None:
    """Remove an object if it still has this generation."""
    bucket, _, name = str(path).removeprefix(SCHEME).partition("/")

    def delete() -> None:
        file_system().call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)

    with contextlib.suppress(OSError):
        _if_unchanged(delete, path)


def _if_unchanged(request: Callable[[], Any], path: pathlib.Path) -> Any:
    """Return what `request` returns, or None if its precondition fails (HTTP 412)."""
    try:
        return request()
    except FileExistsError:
        return None
    except Exception as error:
        if "412" in (str(getattr(error, "code", "")), str(getattr(error, "status", ""))):
            return None
        if "PreconditionFailed" in repr(error) or "conditionNotMet" in repr(error):
            return None
        with os_errors(path):
            raise

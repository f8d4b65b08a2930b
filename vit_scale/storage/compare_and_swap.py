"""Objects of a bucket that are written only over what was read: of two writers one succeeds.

Every content of an object has a generation, a number that no other content of it ever has. A
request that names the generation it replaces is refused where another process was faster.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from vit_scale.storage.paths import SCHEME, reasons, store


def read(place: pathlib.Path) -> tuple[str, dict]:
    """The generation of an object, "0" where there is none, and the JSON in it."""
    try:
        with reasons(place):
            generation = str(store().info(str(place))["generation"])
            return generation, json.loads(store().cat_file(str(place)))
    except FileNotFoundError:
        return "0", {}
    except ValueError:
        return generation, {}


def write(place: pathlib.Path, data: bytes, generation: str) -> str | None:
    """Write an object if it is of this generation ("0": if there is none); its new generation.

    None where another process was faster.
    """
    bucket, _, name = str(place).removeprefix(SCHEME).partition("/")
    url = f"{store()._location}/upload/storage/v1/b/{bucket}/o"
    query = {"uploadType": "media", "name": name, "ifGenerationMatch": generation}
    return _if_first(
        lambda: store().call("POST", url, **query, data=data, json_out=True)["generation"], place
    )


def remove(place: pathlib.Path, generation: str) -> None:
    """Remove an object if it is still of this generation."""
    bucket, _, name = str(place).removeprefix(SCHEME).partition("/")
    with contextlib.suppress(OSError):
        _if_first(
            lambda: store().call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation),
            place,
        )


def _if_first(request: Callable[[], Any], place: pathlib.Path) -> Any:
    """What `request` gives; None where the storage says that its condition does not hold."""
    try:
        return request()
    except FileExistsError:
        return None
    except Exception as error:
        if "412" in (str(getattr(error, "code", "")), str(getattr(error, "status", ""))):
            return None
        if "PreconditionFailed" in repr(error) or "conditionNotMet" in repr(error):
            return None
        with reasons(place):
            raise

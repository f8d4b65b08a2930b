"""What tests do with objects in the emulated bucket."""

import pathlib

import pytest

from vit_scale.storage import paths
from vit_scale.storage.bucket import file_system


def upload(folder: pathlib.Path, address: str) -> pathlib.Path:
    """Copy every file below `folder` to the same name below `address`, whose path is returned."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        paths.parse(f"{address}/{file.relative_to(folder)}").write_bytes(file.read_bytes())
    return paths.parse(address)


def record_requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int | None]]:
    """Return a list to which (name, start, end) of each download from now on is added."""
    requests, read = [], file_system().cat_file

    def cat_file(path, start=None, end=None, **options):
        requests.append((path.rpartition("/")[2], start, end))
        return read(path, start=start, end=end, **options)

    monkeypatch.setattr(file_system(), "cat_file", cat_file)
    return requests

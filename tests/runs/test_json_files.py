"""json_files: files are written completely or not at all."""

import json
import os

import pytest

from vit_scale.errors import UserError
from vit_scale.runs.json_files import read_json, write_json


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_is_written_atomically(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_json(file, {"ä": [1, None]})
    assert json.loads(file.read_text()) == read_json(file) == {"ä": [1, None]}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = refusal(lambda: write_json(file, {"b": 2}))
    assert message == f"cannot write {file}: No space left on device; free space, then rerun"
    assert read_json(file) == {"ä": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_missing_file_means_that_the_folder_is_not_a_run(tmp_path):
    message = refusal(lambda: read_json(tmp_path / "run.json"))
    assert message == f"{tmp_path}/run.json is missing: {tmp_path} is not a run folder"

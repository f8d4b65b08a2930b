"""report: the table's values come from report.json, in text and in Markdown."""

import json

import pytest

from vit_scale.errors import UserError
from vit_scale.runs import report

FINE_TUNED = {
    "init": "runs/pretrain",
    "data": {"name": "cifar10"},
    "resolution": [64, 96],
    "step": 12_000,
    "parameters": 5_717_224,
    "images_per_second": 1234.56,
    "devices": {"kind": "TPU v4", "count": 8},
    "eval": {
        "split": "test",
        "n": 10_000,
        "accuracy": 0.87654,
        "loss": 0.4,
        "best": {"accuracy": 0.9, "step": 8000},
    },
}
WITHOUT_RESULT = {
    **{key: value for key, value in FINE_TUNED.items() if key != "eval"},
    "init": "",
    "images_per_second": 9.87,
    "devices": {"kind": "cpu", "count": 1},
    "resolution": [32, 32],
}


@pytest.fixture
def runs(tmp_path):
    folders = []
    for name, content in (("fine", FINE_TUNED), ("pretrain", WITHOUT_RESULT)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(content))
        folders.append(folder)
    return folders


def test_rows_have_the_numbers_of_the_report(runs):
    assert report.rows(runs[:1]) == [
        {
            "run": str(runs[0]),
            "initialised from": "runs/pretrain",
            "trained on": "cifar10",
            "resolution": "64 x 96",
            "steps": 12_000,
            "parameters": 5_717_224,
            "evaluated on": "test",
            "n": 10_000,
            "accuracy": 0.87654,
            "best accuracy": 0.9,
            "images/s": 1234.56,
        }
    ]


def test_markdown(runs):
    header, rule, first, second = report.table(report.rows(runs), markdown=True).splitlines()
    assert len(header) == len(rule) == len(first) == len(second)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (header, first, second)
    ]
    assert cells[0] == list(report.rows(runs)[0])
    assert cells[1][1:] == [
        "runs/pretrain", "cifar10", "64 x 96", "12,000", "5,717,224", "test", "10,000", "87.65 %",
        "90.00 %", "1,235",
    ]  # fmt: skip
    assert cells[2][1] == "random" and cells[2][6:] == ["-", "-", "-", "-", "9.9"], "on a CPU"
    assert set(rule) == set("|- ")


@pytest.mark.parametrize(
    "kind, speed, shown", [("cpu", 9.87, "9.9"), ("TPU v4", 1234.56, "1,235"), ("cpu", None, "-")]
)
def test_speed_is_shown_for_every_device(tmp_path, kind, speed, shown):
    """A run of one step has no speed."""
    content = {**FINE_TUNED, "images_per_second": speed, "devices": {"kind": kind, "count": 1}}
    (tmp_path / "report.json").write_text(json.dumps(content))
    (row,) = report.rows([tmp_path])
    assert row["images/s"] == speed
    assert report.table([row], markdown=True).splitlines()[-1].split("|")[-2].strip() == shown


def test_costs_are_shown_where_they_are_known(runs):
    """CPU time is that of a run on CPUs only: elsewhere the device does the work."""
    attempts = [{"began": 0, "seen": 9, "cpu": cpu, "start": 0, "step": 5, "seconds": {}}
                for cpu in (60.0, 90.0)]  # fmt: skip
    for run in runs:
        (run / "goodput.json").write_text(json.dumps({"attempts": attempts}))
    content = {**WITHOUT_RESULT, "flops": 170_000_000_000_000}
    (runs[1] / "report.json").write_text(json.dumps(content))
    first, second = report.rows(runs)
    assert (first["FLOPs"], first["CPU min"]) == (None, None)
    assert (second["FLOPs"], second["CPU min"]) == (1.7e14, 2.5)
    line = report.table([second], markdown=True).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["1.70e14", "2.5"]
    assert "CPU min" not in report.rows(runs[:1])[0]


def test_text_is_aligned(runs):
    header, first, second = report.table(report.rows(runs)).splitlines()
    column = header.index("accuracy")
    assert first[column:].startswith("87.65 %") and second[column:].startswith("-")
    assert "|" not in header


def test_a_run_without_a_report_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"report\.json is missing"):
        report.rows([tmp_path])

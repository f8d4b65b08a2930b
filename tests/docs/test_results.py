"""The tables of results are made from the reports in results/, and never typed."""

import json
import re

import pytest

from tests.helpers.documents import ROOT, documents
from vit_scale.plan import table
from vit_scale.runs import report

BLOCK = re.compile(r"<!-- vit-scale show (.+?) --markdown -->\n(.*?)<!-- end -->", re.DOTALL)
TABLES = [
    pytest.param(folders.split(), shown.strip(), id=f"{name}-{number}")
    for name, text in documents().items()
    for number, (folders, shown) in enumerate(BLOCK.findall(text))
]


def test_the_readme_and_the_page_of_results_have_tables():
    assert {table.id for table in TABLES} >= {"README.md-0", "docs/results.md-2"}


@pytest.mark.parametrize(("folders", "shown"), TABLES)
def test_a_table_is_made_from_reports(folders, shown, monkeypatch):
    """Each names its folders; `vit-scale show FOLDER... --markdown` makes it anew."""
    monkeypatch.chdir(ROOT)
    assert shown == report.table(report.rows(folders), markdown=True)


def accuracy(run: str) -> str:
    content = json.loads((ROOT / "results" / run / "report.json").read_text())
    return f"{100 * content['eval']['accuracy']:.2f} %"


def test_numbers_in_the_readme_are_those_of_the_runs():
    readme = documents()["README.md"]
    pair = [accuracy(f"quickstart/{run}") for run in ("finetune-32", "scratch-32")]
    assert " instead of ".join(pair) in readme
    for file, held in (("sigkill-100", 100), ("damage-150", 150)):
        content = json.loads((ROOT / "results" / "soak" / f"{file}.json").read_text())
        assert content["held"] == content["schedules"] == held, file
    planned = json.loads((ROOT / "results" / "plan" / "base-16_v5e-4x4.json").read_text())
    assert f"{planned['arithmetic_ms']:.1f} ms of arithmetic" in readme


def test_numbers_in_the_page_on_planning_are_those_of_the_plans():
    page = documents()["docs/planning.md"]
    plans = {}
    for file in (ROOT / "results" / "plan").glob("*.json"):
        plan = json.loads(file.read_text())
        if plan["fits"]:
            plans[plan["config"], tuple(sorted(plan["overrides"])), plan["topology"]] = plan
    example = plans["vit_base_imagenet", ("data.batch=512",), "v5e:4x4"]
    assert table.format_plan(example) in page
    rows = re.findall(r"^\| (vit_\w+)(.*?) \| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for name, flag, batch, rest in rows:
        field = re.findall(r"--config\.([\w.=]+)", flag)
        plan = plans[name, tuple(sorted([f"data.batch={batch}", *field])), "v5e:4x4"]
        arithmetic, _, collectives, mfu, peak = rest.replace("*", "").split(" | ")
        assert arithmetic == f"{plan['arithmetic_ms']:.1f}"
        assert collectives == f"{plan['synchronous_ms'] + plan['exposed_ms']:.1f}"
        assert mfu == f"{100 * plan['mfu']:.1f} %"
        assert peak == f"{plan['peak_bytes'] / 2**30:.2f}"

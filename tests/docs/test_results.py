"""The tables of results are made from the reports in results/, and never typed."""

import json
import re
import shlex

import pytest

from tests.helpers.documents import ROOT, documents
from vit_scale import config
from vit_scale.plan import table

TABLES = {name: text for name, text in documents().items() if "<!-- results: " in text}


def test_the_readme_and_the_page_of_results_have_tables():
    assert TABLES["README.md"].count("<!-- results: ") == 1
    assert TABLES["docs/results.md"].count("<!-- results: ") >= 3


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_made_from_the_run_folders(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import measured

    text = TABLES[name]
    assert text.count("<!-- results: ") == len(measured.FILLED.findall(text))
    assert measured.fill(text) == text, "run python docs/generate.py"
    typed = measured.FILLED.sub(lambda block: f"{block[1]}a typed number\n{block[3]}", text)
    assert measured.fill(typed) == text


# Fields that may differ between a printed command and the run: where folders were, what is logged.
OWN = ("data.path", "init.source", "distill.teacher", "distill.checksum", "log.")


def test_the_printed_commands_are_those_of_the_runs(monkeypatch):
    """Each gives the run's config, but for OWN."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import cifar10

    runs = {**cifar10.PRETRAINING}
    for group in (*cifar10.GROUPS.values(), *cifar10.PILOTS.values()):
        runs |= group
    for name, run in runs.items():
        if not run.command.startswith("vit-scale train --config "):
            continue
        _, _, _, title, *flags = shlex.split(run.command)
        overrides = [flag.removeprefix("--config.") for flag in flags if flag != "--workdir"]
        wanted = config.fields(config.load(title, [item for item in overrides if "=" in item]))
        folder = ROOT / "results" / "cifar10" / name
        if not folder.exists():
            continue
        stored = json.loads((folder / "run.json").read_text())["config"]
        ran = config.fields(config.from_json(stored))
        assert not [key for key in wanted if wanted[key] != ran[key] and not key.startswith(OWN)]


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

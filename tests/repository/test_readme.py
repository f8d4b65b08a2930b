"""The README keeps its word: its tables are made from the reports in results/, its files exist."""

import pathlib
import re

from vit_scale.runs import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_tables_are_made_from_reports(monkeypatch):
    """Each block names its folders; `vit-scale show FOLDER... --markdown` makes it anew."""
    blocks = re.findall(
        r"<!-- vit-scale show (.+?) --markdown -->\n(.*?)<!-- end -->", README, re.DOTALL
    )
    monkeypatch.chdir(ROOT)
    assert len(blocks) >= 2
    for folders, shown in blocks:
        rows = report.rows(folders.split())
        assert shown.strip() == report.table(rows, markdown=True)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_configs_that_it_names_exist():
    named = set(re.findall(r"--config ([a-z]\w+)", README))
    assert "quickstart" in named
    assert not [name for name in named if not (ROOT / "configs" / f"{name}.py").exists()]

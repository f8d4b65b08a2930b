"""The manual: generated pages are not stale, and the site builds without a warning or a network."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.documents import ROOT


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", generator().FILES)
def test_a_generated_file_is_not_stale(name):
    made = generator().FILES[name]()
    assert "==SUPPRESS==" not in made
    assert (ROOT / "docs" / name).read_text() == made, "run python docs/generate.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; nothing may be said of it."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_built(site):
    pages = {file.relative_to(ROOT / "docs").stem for file in ROOT.glob("docs/*.md")}
    assert {file.stem for file in site.glob("*.html")} == pages | {"404"}


def test_reports_and_pictures_of_results_are_in_it(site):
    for name in ("plan/index.html", "soak/index.html", "inspect/attention-heads.png"):
        assert (site / "results" / name).is_file(), name
    assert "results/inspect/attention-heads.png" in (site / "inspecting.html").read_text()


def test_nothing_is_loaded_from_another_host(site):
    loaded = r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)"
    for page in site.rglob("*.html"):
        assert not re.findall(loaded, page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet

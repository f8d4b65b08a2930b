"""What a document names is there: links, files, modules, the map of packages."""

import pathlib
import re

import pytest

from tests.helpers.documents import ROOT, anchors, documents, inline, links
from tests.repository.test_architecture import LAYERS

DOCUMENTS = documents()
# Made by a command, or by the reader.
MADE = {"results/benchmarks/", "launch/tpu.env"}
TOP = ("benchmarks", "configs", "docs", "examples", "launch", "results", "tests", "vit_scale")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    here = (ROOT / name).parent
    for link in links(DOCUMENTS[name]):
        file, _, anchor = link.partition("#")
        target = (here / file).resolve() if file else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_files_that_are_named_exist(name):
    files = [
        code
        for code in inline(DOCUMENTS[name])
        if re.fullmatch(rf"({'|'.join(TOP)})/[\w./-]*", code)
    ]
    assert not [file for file in files if file not in MADE and not (ROOT / file).exists()]


def drawn() -> dict[str, list[str]]:
    """The map in the page on the design: {"vit_scale": [what is drawn below it], ...}."""
    (block,) = re.findall(r"## Map\n+```text\n(.*?)```", DOCUMENTS["docs/design.md"], re.DOTALL)
    tree: dict[str, list[str]] = {}
    for line in block.splitlines():
        name = line.split()[0].rstrip("/")
        if line.startswith(" "):
            tree[list(tree)[-1]].append(name)
        else:
            tree[name] = []
    return tree


def test_the_map_has_every_package_and_nothing_else():
    package = ROOT / "vit_scale"
    there = {
        file.name
        for file in package.iterdir()
        if file.name not in ("__init__.py", "py.typed", "__pycache__") and file.name[0] != "."
    }
    assert set(drawn()["vit_scale"]) == there
    assert all((ROOT / name).exists() for name in drawn())
    assert set(drawn()) >= {top for top in TOP if (ROOT / top).is_dir()}


def test_the_import_direction_is_that_of_the_code():
    text = DOCUMENTS["docs/design.md"].partition("## Import direction")[2]
    (block,) = re.findall(r"```text\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    rows = [set(line.split()) for line in block.splitlines()]
    assert rows == [layer - {"__init__"} for layer in LAYERS if layer != {"__init__"}]


def test_every_name_of_a_function_in_the_map_of_questions_is_in_its_file():
    """`make_schedule` in `vit_scale/training/optimizer.py`."""
    pairs = re.findall(r"`(\w+)`(?: and `(\w+)`)? (?:in|of) `([\w/]+\.py)`", "".join(PAGES))
    assert len(pairs) >= 3
    for *names, file in pairs:
        source = pathlib.Path(ROOT / file).read_text()
        for name in filter(None, names):
            assert re.search(rf"^(def |class )?{name}\b", source, re.MULTILINE), (name, file)


PAGES = [text for name, text in DOCUMENTS.items() if name.startswith("docs/")]

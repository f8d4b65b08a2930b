"""The Python in the documents runs: each page's blocks, one after the other, in one folder."""

import inspect
import pathlib
import shutil

import pytest

from tests.helpers.documents import ROOT, blocks, documents
from tests.helpers.tiny import random_params, tiny_config, write_run
from vit_scale import api, config
from vit_scale.config import image_size, load
from vit_scale.data import open_split, registry
from vit_scale.inference.export import export
from vit_scale.models.build import build

PINNED = ROOT / "tests" / "golden" / "pinned"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """What the blocks name: a trained run, the model that comes with the clone, and a photo."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PINNED / "run", tmp_path / "runs" / "vit_cifar-S-16")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(PINNED / "data/val/eel/0.png", tmp_path / "cat.jpg")
    return tmp_path


def run(page: str) -> dict:
    """The names that a page's blocks leave."""
    names: dict = {}
    for code in blocks(documents()[page], "python"):
        exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [page for page, text in documents().items() if blocks(text, "python")]
)
def test_a_page_with_python_is_run_by_a_test(page):
    assert page in RUN


def test_readme(folder):
    assert run("README.md")["model"].classes[:2] == ("airplane", "automobile")


@pytest.fixture
def untrained(monkeypatch):
    """`train` and `evaluate` check what they are given, and take no time: they are tested apart."""

    def train(config, workdir=None, **overrides):
        cfg = load(config, api.as_items(overrides))
        return {"eval": {"step": cfg.steps}}

    def evaluate(run, split=None, **overrides):
        config.override(config.base(), api.as_items(overrides))
        return {"accuracy": 0.5, "n": 2}

    for double in (train, evaluate):
        real = inspect.signature(getattr(api, double.__name__)).parameters
        assert list(real)[:2] == list(inspect.signature(double).parameters)[:2]
        monkeypatch.setattr(api, double.__name__, double)


def test_the_page_on_python_has_the_signatures():
    page = documents()["docs/python.md"]
    for name in ("train", "evaluate", "probe", "show"):
        parameters = inspect.signature(getattr(api, name)).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert f"`{name}{inspect.Signature(plain)}`" in page


def test_python(folder, untrained):
    cfg = tiny_config("model.classes=0")
    headless = random_params(build(cfg.model, image_size(cfg)))
    write_run(folder / "runs" / "mae_cifar", cfg, headless, classes=[])
    names = run("docs/python.md")
    assert names["report"]["eval"]["step"] == 1000 and names["size"]["tokens"] == 197
    assert names["probabilities"].shape == (8, 3)
    assert names["logits"].shape == (8, 3)
    assert names["features"].shape == (8, 2 * cfg.model.width)
    assert names["model"].shape.tokens == 577
    assert names["gradients"].keys() == names["params"].keys() or names["gradients"]


def test_getting_started(folder):
    (folder / "photos.py").write_text(blocks(documents()["docs/getting-started.md"], "python")[0])
    assert config.load("photos.py").data.resolution == 96


def test_pretrained_weights(folder):
    cfg = tiny_config("model.variant=Ti/112", "data.resolution=224")
    params = random_params(build(cfg.model, image_size(cfg)))
    export(write_run(folder / "run", cfg, params), "jax", folder / "FILE")
    names = run("docs/pretrained-weights.md")
    assert names["probabilities"].shape == (8, 4)


def test_extending(folder, monkeypatch):
    monkeypatch.setattr(registry, "SETS", dict(registry.SETS))
    run("docs/extending.md")
    cfg = config.override(config.base(), ["data.name=stripes"]).data
    source = open_split(cfg, "train[:50]")
    assert len(source) == 50 and source.classes == ("noise", "stripes")


RUN = ("README.md", *(f"docs/{name}.md" for name in ("python", "getting-started", "extending")))
RUN = (*RUN, "docs/pretrained-weights.md")

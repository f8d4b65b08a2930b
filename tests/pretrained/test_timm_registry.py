"""docs/timm-models.md says which of timm's ViTs load; timm builds them, where it is installed."""

import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
from tests.pretrained import timm_registry as registry
from vit_scale.pretrained import timm_config

PAGE = registry.PAGE.read_text()
REFUSED = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M))
READ = set(re.findall(r"`(\w+)`", PAGE.partition("## Read")[2]))
NAMES = registry.architectures()


def test_the_page_lists_the_registry():
    assert READ | REFUSED.keys() == set(NAMES) and not READ & REFUSED.keys()
    assert len(READ) >= 0.9 * len(NAMES)
    assert f"{len(READ)} of {len(NAMES)} give the same logits" in " ".join(PAGE.split())


def test_the_class_of_an_architecture():
    for name in registry.timm.list_models():
        if name.startswith(timm_config.PLAIN_VIT) and "_sapiens2" not in name:  # which is refused
            module = registry.timm.models._registry.model_entrypoint(name).__module__
            assert bool(re.search(timm_config.EVA_CLASS, name)) == module.endswith(".eva"), name


@pytest.mark.parametrize("name", [n for n in NAMES if re.search("tiny|wee|vit_small_patch16", n)])
def test_an_architecture_of_the_registry(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_of_the_registry(name):
    check(name)


def check(name: str) -> None:
    (row,) = registry.attempts([name])
    assert row.works == (name in READ), row
    assert row.difference < registry.TOLERANCE, row
    assert row.reason == REFUSED.get(name, ""), row

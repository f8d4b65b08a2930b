"""examples/cifar10.safetensors predicts what its run did, and classifies real images."""

import json

import numpy as np
import pytest
from PIL import Image

import vit_scale
from tests.golden.make_example import FILE, GOLDEN, IMAGES, images
from tests.helpers.documents import ROOT
from vit_scale import cli

REAL = ROOT / ".data"
ROUNDING = 0.002  # of probabilities by parameters in float16


@pytest.fixture(scope="module")
def model():
    return vit_scale.load(FILE)


def test_its_probabilities_are_those_of_the_run(model):
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(model(images()), golden["probabilities"], atol=ROUNDING)
        assert model.classes == tuple(golden["classes"].tolist())


def test_the_command_of_the_readme(tmp_path, capsys):
    picture = tmp_path / "cat.png"
    Image.fromarray(images()[0]).save(picture)
    assert cli.main(["predict", str(FILE), str(picture), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    with np.load(GOLDEN) as golden:
        expected = dict(zip(golden["classes"], golden["probabilities"][0], strict=True))
    name, probability = max(found.items(), key=lambda item: item[1])
    assert name == max(expected, key=expected.get)
    assert probability == pytest.approx(expected[name], abs=ROUNDING)


def test_it_is_small_and_its_card_says_what_it_is():
    card = FILE.with_suffix(".md").read_text()
    assert FILE.stat().st_size < 5_000_000
    report = json.loads((ROOT / "results/cifar10/hybrid/report.json").read_text())
    accuracy = f"{100 * report['eval']['accuracy']:.2f} %"
    assert f"| {report['step']:,} | test | {accuracy} | 10,000 | last step |" in card
    assert IMAGES in card


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real images in .data")
def test_it_classifies_real_images():
    result = vit_scale.evaluate(FILE, "test[:500]", quiet=True, **{"data.path": str(REAL)})
    assert result["n"] == 500 and result["accuracy"] > 0.84

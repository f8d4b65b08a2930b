"""Features: each example once, and a cache that is used for the same features only."""

import jax
import numpy as np
import pytest

from tests.helpers.tiny import CLASSES, random_images, random_params, tiny_config, tiny_model
from vit_scale.data.sources import InMemory
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.evaluation import Extract, Features, Layer
from vit_scale.evaluation.cache import cached, describe_features

IMAGES, LABELS = random_images(23), np.random.RandomState(1).randint(0, 4, 23)
MASK = np.arange(23) % 5 != 2  # 5 are corrupt
LAYER = Layer("cls_mean", -2)


def source(mask=MASK) -> InMemory:
    return InMemory("drawn", IMAGES, LABELS, CLASSES, mask)


def extracted(batch: int, params=None, mask=MASK) -> Features:
    cfg = tiny_config(f"eval.batch={batch}", "data.workers=0", "augment.flip=True")
    extract = Extract(cfg, tiny_model(), make_mesh(cfg.mesh, jax.devices()[:1]), LAYER)
    return extract(params or random_params(tiny_model()), source(mask))


@pytest.fixture(scope="module")
def features() -> Features:
    return extracted(16)


def test_every_readable_example_counts_once_for_every_batch(features):
    pixels = (IMAGES.astype(np.float32) / 255 - 0.5) / 0.5
    expected = tiny_model().features(random_params(tiny_model()), pixels, *LAYER)
    assert features.values.shape == (18, 32) and features.values.dtype == np.float32
    for result in (features, extracted(3)):
        np.testing.assert_allclose(result.values, expected[MASK], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(result.labels, LABELS[MASK])


def test_features_that_are_no_numbers_are_refused():
    params = random_params(tiny_model())
    params["norm"]["bias"] = params["norm"]["bias"] * np.nan
    with pytest.raises(UserError, match="drawn: the features of 18 of 18 images are not finite"):
        extracted(16, params)
    with pytest.raises(UserError, match="drawn: none of its 23 images could be read"):
        extracted(16, mask=np.zeros(23, bool))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Layer("token"), "feature 'token' is unknown"),
        (Layer("cls", 2), "layer 2 of 2 blocks: it must be from -2 to 1"),
        (Layer("mean", -3), "layer -3 of 2 blocks"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(layer, message):
    with pytest.raises(UserError, match=message):
        layer.check(tiny_model())
    with pytest.raises(UserError, match=r"cls_mean needs a \[CLS\], which this model \(pool=gap\)"):
        Layer("cls_mean").check(tiny_model("model.pool=gap"))
    Layer("mean", -2).check(tiny_model("model.pool=gap"))


# The cache


class Computed:
    """Features that count how often they were computed."""

    def __init__(self, features: Features):
        self.features, self.times = features, 0

    def __call__(self) -> Features:
        self.times += 1
        return self.features


def test_the_cache_is_of_one_description_and_intact(features, tmp_path, capsys):
    compute = Computed(features)
    for times, what in ((1, {"a": (1, 2)}), (1, {"a": (1, 2)}), (2, {"a": (1, 3)})):
        result = cached(tmp_path / "cache", what, compute)
        np.testing.assert_array_equal(result.values, features.values)
        np.testing.assert_array_equal(result.labels, features.labels)
        assert result.labels.dtype == features.labels.dtype and compute.times == times
    first, second = sorted((tmp_path / "cache").iterdir(), key=lambda file: file.stat().st_mtime)
    assert capsys.readouterr().err == ""
    whole = first.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(features.values.tobytes()) + 5] ^= 1
    with np.load(first) as arrays:  # an intact file of arrays that are not what it says
        np.savez(tmp_path / "other.npz", **{**arrays, "values": arrays["values"] + 1})
    broken = (whole[:300], bytes(flipped), second.read_bytes())
    for times, damaged in enumerate((*broken, (tmp_path / "other.npz").read_bytes()), 3):
        first.write_bytes(damaged)
        cached(tmp_path / "cache", {"a": (1, 2)}, compute)
        assert compute.times == times and first.read_bytes() == whole
        assert f"{first.name} is damaged (" in capsys.readouterr().err


def test_without_a_cache_or_with_one_that_cannot_be_written(features, tmp_path, capsys):
    compute = Computed(features)
    assert cached(None, {}, compute) is features
    (tmp_path / "file").write_text("")
    assert cached(tmp_path / "file", {}, compute) is features
    assert "features are not cached: cannot write" in capsys.readouterr().err


def test_a_description_has_all_that_features_depend_on():
    params, cfg = random_params(tiny_model()), tiny_config()
    names = ("cfg", "params", "source", "split", "layer")
    same = dict(zip(names, (cfg, params, source(), "test", Layer()), strict=True))
    brighter = InMemory("drawn", IMAGES // 2, LABELS, CLASSES, MASK)
    others = [
        {"params": random_params(tiny_model(), seed=1)},
        {"source": brighter},
        {"source": source(None)},
        {"split": "test[:5]"},
        {"layer": Layer("mean")},
        {"layer": Layer(block=0)},
        *(
            {"cfg": tiny_config(field)}
            for field in (
                *("eval.crop=0.875", "augment.mean=(0,0,0)", "data.resolution=24"),
                *("model.dtype=bfloat16", "data.exif=False", "data.decoder=pillow"),
            )
        ),
    ]
    described = [describe_features(**same | other) for other in ({}, *others)]
    assert all(one != other for i, one in enumerate(described) for other in described[:i])
    assert describe_features(**same) == described[0]
    # What has no part in features: the folder, the batch, the optimizer.
    moved = tiny_config("data.path=elsewhere", "eval.batch=4", "optim.lr=1.0", "data.workers=0")
    assert describe_features(**same | {"cfg": moved}) == described[0]

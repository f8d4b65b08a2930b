"""inspect: features, neighbours and reconstructions, also of runs without a head."""

import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.objectives import SELF_SUPERVISED
from tests.helpers.tiny import CLASSES, random_images, tiny_config
from tests.inspect.conftest import N, arrays, run_of
from vit_scale import pretrained
from vit_scale.api import average
from vit_scale.data import InMemory
from vit_scale.errors import UserError
from vit_scale.evaluation.similarity import unit_rows
from vit_scale.inspect import inspect
from vit_scale.models.parameters import OBJECTIVE
from vit_scale.training.objectives.masked_autoencoder import (
    draw_hidden,
    make_decoder,
    reconstruct,
)

pytest.importorskip("matplotlib", reason="launch/environment.sh inspect")

from vit_scale.inspect import features, report, samples
from vit_scale.inspect.comparison import Inspection, compare
from vit_scale.inspect.feature_sections import Nearest, show_reconstructions
from vit_scale.inspect.html import Note
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.plots.training import choose_panels

MEASURES = {
    "mae": (),
    "ibot": ("train/dino", "train/ibot", "train/koleo"),
    "lejepa": ("train/disagreement", "train/normality"),
}
PICTURES = {
    "curves", "attention-heads", "attention-blocks", "attention-cls", "rollout",
    "attention-distance", "patches", "positions", "filters", "features", "neighbours",
}  # fmt: skip


class Report(NamedTuple):
    run: InspectedRun
    content: dict
    figures: dict  # by name of the picture
    captions: dict


@pytest.fixture(scope="module", params=MEASURES)
def headless(request, images, tmp_path_factory) -> Report:
    """The report of a run without a head: all is drawn but not rendered."""
    name = request.param
    folder = tmp_path_factory.mktemp("runs") / name
    run = run_of(folder, images, *SELF_SUPERVISED[name], measures=MEASURES[name])
    pictures = []

    def draw(shown):
        pictures.extend(picture for section in shown for picture in section.pictures())
        return {picture.name: np.zeros((2, 2, 3), np.uint8) for picture in pictures}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "rasterize", draw)
        content = inspect([str(run)])
    return Report(
        InspectedRun(str(run)),
        content,
        {picture.name: picture.figure for picture in pictures},
        {picture.name: picture.caption for picture in pictures},
    )


def shown_images(run: InspectedRun) -> samples.Samples:
    chosen = report.choose_samples(run, run.open_split("train"), None)
    assert chosen is not None
    return chosen.to_show()


def test_without_a_head_only_predictions_are_missing(headless):
    objective = headless.run.cfg.objective
    (note,) = headless.content["notes"]
    assert "Predictions: Not available: this model has no head (model.classes=0)." in note
    extra = {"reconstructions"} if objective == "mae" else set()
    assert headless.figures.keys() == PICTURES | extra
    (row,) = headless.content["runs"]
    assert (row["accuracy"], row["n"], row["nearest_n"]) == (None, 0, N)
    assert "input of the classification head" not in headless.captions["rollout"]
    assert headless.run.cache is not None and len(list(headless.run.cache.glob("*.npz"))) == 1


def test_curves_show_the_terms_of_a_loss_without_labels(headless):
    objective = headless.run.cfg.objective
    axes = {axes.get_title(): axes for axes in headless.figures["curves"].axes if axes.get_title()}
    names = {"mae": [], "dino": ["DINO", "iBOT", "KoLeo"], "lejepa": ["LeJEPA", "LeJEPA"]}
    terms = [title.split(":")[0] for title in axes if ":" in title]
    assert terms == names[objective]
    for title, panel in axes.items():
        if ":" in title:
            np.testing.assert_allclose(panel.get_lines()[0].get_ydata(), np.arange(1, 6) / 10)
    assert list(axes["Accuracy"].get_lines()[0].get_ydata()) == [0.25]
    units = {"mae": "mean squared error", "dino": "cross-entropy, nats"}
    assert axes["Loss"].get_ylabel() == units.get(objective, "weighted sum of both terms")


def test_without_any_accuracy_there_is_no_panel_of_it():
    curves = {"train/loss": ([1, 2], [3.0, 2.0])}
    mae, dino, classes = (tiny_config(f"objective={o}") for o in ("mae", "dino", "classification"))
    titles = [p.title for p in choose_panels([curves], [mae])]
    assert titles == ["Loss", "Learning rate", "Gradient norm"]
    classified = curves | {"train/accuracy": ([1, 2], [0.1, 0.2])}
    assert choose_panels([classified], [classes])[1].title == "Accuracy"
    mixed = choose_panels([curves, curves], [mae, dino])
    assert mixed[0].unit == "each run's own unit"


@pytest.mark.parametrize(
    ("fields", "recorded", "unit", "panel"),
    [
        (
            ["loss=sigmoid"],
            "eval/accuracy",
            "loss=sigmoid; evaluation: cross-entropy, nats",
            "Accuracy",
        ),
        (["data.target=classes", "loss=focal"], "eval/mAP", "loss=focal", "Mean average precision"),
        (
            ["data.target=value", "objective=regression", "loss=huber"],
            "eval/r2",
            "loss=huber",
            "Regression",
        ),
    ],
)
def test_curves_name_the_loss_and_show_the_measure(fields, recorded, unit, panel):
    curves = {"train/loss": ([1, 2], [3.0, 2.0]), recorded: ([2], [0.5])}
    loss, measure, *_ = choose_panels([curves], [tiny_config(*fields)])
    assert loss.unit == unit and measure.title == panel


def test_the_map_and_neighbours_are_of_the_run_s_features(headless):
    """The first principal components and cosines, in numpy, of features by the model itself."""
    run, source = headless.run, headless.run.open_split("train")
    batch = source.read(np.arange(N))
    values = np.asarray(run.model.features(run.params, run.pixels(jnp.asarray(batch["image"]))))
    centred = values - values.mean(0)
    left, lengths, _ = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    (axes,) = (axes for axes in headless.figures["features"].axes if axes.collections)
    drawn = axes.collections[-len(CLASSES) :]
    for label, dots in enumerate(drawn):
        points = np.asarray(dots.get_offsets())
        expected = (left * lengths)[batch["label"] == label, :2]
        for k in range(2):
            signs = np.sign(points[:, k] * expected[:, k])
            np.testing.assert_allclose(points[:, k], signs * expected[:, k], atol=1e-4)
    share = lengths[0] ** 2 / (lengths**2).sum()
    assert f"({100 * share:.1f} % of the variance)" in axes.get_xlabel()
    cosines = unit_rows(values) @ unit_rows(values).T - 2 * np.eye(N)
    hits = (batch["label"][cosines.argmax(1)] == batch["label"]).mean()
    assert headless.content["runs"][0]["nearest"] == pytest.approx(hits)
    tiles = [axes for axes in headless.figures["neighbours"].axes if axes.images]
    assert len(tiles) == 8 * 7
    for row in range(8):
        query, *others = tiles[7 * row :][:7]
        (index,) = np.flatnonzero([same(query, image) for image in batch["image"]])
        order = np.argsort(-cosines[index], kind="stable")[:6]
        for tile, other in zip(others, order, strict=True):
            equal = batch["label"][other] == batch["label"][index]
            name, cosine = CLASSES[batch["label"][other]], cosines[index, other]
            mark, label, text = tile.get_xlabel().split()
            assert (mark, label) == ("✓" if equal else "✗", name)
            assert float(text) == pytest.approx(cosine, abs=6e-4)
            assert (tile.spines["left"].get_linestyle() == "-") == equal


def same(tile, image: np.ndarray) -> bool:
    return np.array_equal(np.asarray(tile.images[0].get_array()), image)


def test_head_maps_are_rows_of_attention(headless):
    run = headless.run
    shown = shown_images(run).images
    pixels = run.pixels(jnp.asarray(shown))
    weights = run.model.attention(run.params, pixels, lambda w: w)[0][-1]  # [b, k, n, n]
    rows = np.asarray(weights[:, :, 0, 1:] * weights.shape[-1])
    maps = run.attention_maps(shown)["cls"]
    np.testing.assert_allclose(maps.sum((2, 3)), rows.sum(-1), rtol=1e-5)
    tiles = headless.figures["attention-cls"].axes
    for row in range(4):
        for head in range(2):
            tile = tiles[row * 3 + head + 1]
            expected = (rows[row, head] / rows[row, head].max()).reshape(run.grid)
            np.testing.assert_allclose(tile.images[1].get_array(), expected, atol=1e-5)
            assert tile.get_title().endswith(f"max {rows[row, head].max():.1f}")


@pytest.mark.parametrize("headless", ["mae"], indirect=True)
def test_reconstructions_show_true_pixels_where_visible_and_predictions_elsewhere(headless):
    run = headless.run
    stored = pretrained.load_model(str(run.folder))
    assert OBJECTIVE not in stored.params and stored.owned["decoder"].keys() >= {"predict"}
    shown = shown_images(run)
    pixels = run.pixels(jnp.asarray(shown.images))
    patches = draw_hidden(jax.random.key(0), len(pixels), 16, 12)
    params = {**stored.params, OBJECTIVE: stored.owned}
    decoder = make_decoder(run.model, run.cfg)
    predicted = np.asarray(reconstruct(run.model, decoder, params, pixels, patches))
    image, hidden = np.asarray(pixels), np.asarray(patches.hidden)
    tiles = arrays(headless.figures["reconstructions"])
    texts = [axes.get_xlabel() for axes in headless.figures["reconstructions"].axes[-len(image) :]]
    for i in range(len(image)):
        true, seen, filled = (tiles[row * len(image) + i] for row in range(3))
        np.testing.assert_allclose(true, image[i] / 2 + 0.5, atol=1e-6)
        errors = []
        for patch in range(16):
            y, x = 4 * (patch // 4), 4 * (patch % 4)
            part = np.s_[y : y + 4, x : x + 4]
            if patch not in hidden[i]:
                np.testing.assert_array_equal(seen[part], true[part])
                np.testing.assert_array_equal(filled[part], true[part])
                continue
            assert (seen[part] == 0.5).all()
            row = predicted[i, list(hidden[i]).index(patch)].reshape(4, 4, 3)
            mean, std = image[i][part].mean(), np.sqrt(image[i][part].var(ddof=1) + 1e-6)
            expected = np.clip((row * std + mean) / 2 + 0.5, 0, 1)
            np.testing.assert_allclose(filled[part], expected, atol=1e-5)
            errors.append(np.square(row - (image[i][part] - mean) / std).mean())
        assert float(texts[i].split()[1]) == pytest.approx(np.mean(errors), abs=1e-3)
    assert "true patches" in headless.captions["reconstructions"]


def test_an_average_of_masked_autoencoders_has_no_reconstructions(images, undrawn, tmp_path):
    run = run_of(tmp_path / "run", images, *SELF_SUPERVISED["mae"])
    average([run, run], tmp_path / "soup", quiet=True)
    soup = InspectedRun(tmp_path / "soup")
    shown = samples.Samples(random_images(2, (16, 16)), ("a", "b"), "val")
    (part,) = show_reconstructions(soup, shown)
    assert isinstance(part, Note) and "they are an average" in part.text


def test_unlabelled_images_and_mixtures_are_opened_without_a_head(images, tmp_path):
    mixture = f"data.mixture=(('folder:{images}', 1.0),)"
    for fields in (("data.target=none",), (mixture,)):
        run = run_of(tmp_path / fields[0][:9], images, *SELF_SUPERVISED["mae"], *fields)
        assert len(InspectedRun(run).open_split("val")) == N


@pytest.mark.parametrize("headless", ["mae"], indirect=True)
def test_runs_without_heads_are_compared_by_neighbours(headless):
    shares = (0.25, None)
    inspections = [
        Inspection(headless.run, None, share and Nearest(share, 20, "a set")) for share in shares
    ]
    table, picture, *_ = compare(inspections)
    assert [row["nearest has the class"] for row in table.rows] == ["25.00 %", "-"]
    axes = picture.figure.axes[0]
    assert axes.get_xlabel() == "nearest has the class, %"
    assert [bar.get_width() for bar in axes.patches] == [25, 0]
    assert "nearest neighbour" in picture.caption and "n = 20 images of a set" in picture.caption


# Mathematics


def test_neighbours_equal_a_sort_of_cosines():
    values = np.random.RandomState(0).randn(30, 5).astype(np.float32)
    result = features.find_neighbours(values, 4)
    cosines = unit_rows(values).astype(np.float64) @ unit_rows(values).T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_array_equal(result.indices, np.argsort(-cosines, axis=1)[:, :4])
    np.testing.assert_allclose(result.similarities, -np.sort(-cosines, axis=1)[:, :4], atol=1e-6)
    assert features.find_neighbours(values[:3], 4).indices.shape == (3, 2), "there are no more"
    labels = np.arange(30) % 2
    hits = [labels[j] == labels[i] for i in range(30) for j in result.indices[i]]
    assert result.agreement(labels, 4) == pytest.approx(np.mean(hits))


def test_equal_images_are_not_each_other_s_selves():
    """Of five equal rows, none is among its own neighbours, whichever the search returns."""
    result = features.find_neighbours(np.ones((5, 3), np.float32), 2)
    assert result.indices.shape == (5, 2)
    assert not (result.indices == np.arange(5)[:, None]).any()


def test_umap_draws_the_map_if_it_is_installed(monkeypatch):
    """With a fixed seed, of cosine distances; but not of fewer images than it needs."""
    calls = []

    class UMAP:
        def __init__(self, *values, **options):
            calls.append((values, options))

        def fit_transform(self, values):
            return 2 * values[:, :2]

    values = np.random.RandomState(0).randn(60, 3).astype(np.float32)
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    result = features.project(values)
    assert result.method == "UMAP"
    np.testing.assert_array_equal(result.points, 2 * values[:, :2])
    assert calls == [((15,), {"metric": "cosine", "random_state": 0, "n_jobs": 1})]
    assert features.project(values[:49]).method == "PCA"
    monkeypatch.setitem(sys.modules, "umap", None)
    assert features.project(values).method == "PCA"


def test_thumbnails_are_far_apart():
    points = np.float32([[0, 0], [0.001, 0], [10, 0], [0, 7], [10, 7], [5, 3]])
    assert features.spread(points, 2) == [5, 3]
    assert sorted(features.spread(points, 9)) == [0, 2, 3, 4, 5], "1 would lie on 0"
    assert features.spread(np.ones((3, 2), np.float32), 9) == [0]


def test_unreadable_images_are_skipped():
    mask = np.ones(300, bool)
    mask[[3, 280]] = False
    source = InMemory("set", random_images(300), np.zeros(300, int), ["one"], mask)
    np.testing.assert_array_equal(features.readable(source, 298), np.flatnonzero(mask))
    with pytest.raises(UserError, match=r"298 readable images, and had 299 .* remove"):
        features.readable(source, 299)


@pytest.mark.parametrize("headless", ["mae"], indirect=True)
def test_a_large_split_is_cut_once_and_cached(headless, monkeypatch):
    monkeypatch.setattr(features, "COUNT", 12)
    run = headless.run
    first = features.compute_features(run, run.open_split("train"), "train")
    assert (first.n, first.source.name) == (12, f"{run.open_split('train').name}[:12]")
    images = np.stack(first.images(range(12)))
    expected = run.model.features(run.params, run.pixels(jnp.asarray(images)))
    np.testing.assert_allclose(first.values, expected, atol=1e-5)
    monkeypatch.setattr(features.Extract, "__call__", None)  # features come from the cache
    again = features.compute_features(run, run.open_split("train"), "train")
    np.testing.assert_array_equal(again.values, first.values)


def test_samples_are_of_as_many_names_as_possible():
    assert samples.varied("aaaaabbbc", 3) == [0, 5, 8]
    assert samples.varied("aaaaabbbc", 5) == [0, 1, 5, 7, 8]
    assert samples.varied("abcdefghi", 3) == [0, 4, 8]
    assert samples.varied("ab", 4) == [0, 1]

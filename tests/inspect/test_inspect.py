"""inspect: the report is complete and self-contained, and its figures show the right numbers."""

import base64
import dataclasses
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import CLASSES, random_batch, random_images, tiny_config
from tests.inspect.conftest import N, arrays, run_of
from vit_scale import cli, pretrained
from vit_scale.errors import UserError
from vit_scale.inspect import inspect
from vit_scale.inspect.attention import mean_distance, patch_distances
from vit_scale.models import layers, position_embeddings, vit
from vit_scale.training.setup import make_setup
from vit_scale.training.train_step import jit_train_step

pytest.importorskip("matplotlib", reason="launch/environment.sh inspect")

from vit_scale.inspect import (
    embeddings,
    feature_sections,
    plots,
    prediction_sections,
    report,
    samples,
    sections,
)
from vit_scale.inspect.inspected_run import InspectedRun

PICTURES = {
    "curves", "attention-heads", "attention-blocks", "rollout", "attention-distance", "patches",
    "positions", "filters", "features", "neighbours", "confusion", "mistakes", "calibration",
}  # fmt: skip
CLS = "attention-cls"  # of models with [CLS] only


class Made(NamedTuple):
    """Two runs, the second fine-tuned from the first at a larger resolution, and their report."""

    small: pathlib.Path
    large: pathlib.Path
    folder: pathlib.Path
    content: dict
    figures: dict  # by the file of the picture
    published: list


@pytest.fixture(scope="module")
def made(images, tmp_path_factory) -> Iterator[Made]:
    top = tmp_path_factory.mktemp("runs")
    small = run_of(top / "small", images, "model.scan=True")
    large = run_of(top / "large", images, f"init.source={small}", "data.resolution=24",
                   "data.width=32", "model.scan=False", "model.pool=gap", seed=1)  # fmt: skip
    figures, published = {}, []

    def draw(shown, plain=report.rasterize):
        for section in shown:
            for picture in section.pictures():
                figures[report.file_name(section, picture)] = picture.figure
        return plain(shown)

    with pytest.MonkeyPatch.context() as patch:
        for module, name, count in (
            (sections, "ROWS", 2),
            (prediction_sections, "WORST", 6),
            (samples, "SHOWN", 4),
            (feature_sections, "QUERIES", 2),
        ):
            patch.setattr(module, name, count)  # tiles are what takes the time to draw
        patch.setattr(report, "rasterize", draw)
        patch.setattr(report, "publish", lambda *loaded: published.append(loaded))
        content = inspect([str(small), str(large)], out=str(top / "out"), wandb=True)
        yield Made(small, large, top / "out", content, figures, published)


class Page(html.parser.HTMLParser):
    """The links, tags and text of an HTML file."""

    def __init__(self, file: pathlib.Path):
        super().__init__()
        self.references, self.tags, self.text, self.open = [], [], "", []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        names = ("src", "href", "srcset", "data", "action", "poster", "style")
        self.references += [value for name, value in attributes if name in names]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# The page


def test_the_page_needs_nothing_beside_it(made):
    page = Page(made.folder / "index.html")
    assert made.content["page"] == str(made.folder / "index.html")
    inlined = [link for link in page.references if not link.startswith("#")]
    assert len(inlined) == len(list(made.folder.glob("*.png"))) == 2 * len(PICTURES) + 3
    beside = {file.read_bytes() for file in made.folder.glob("*.png")}
    for link in inlined:
        kind, data = link.split(",", 1)
        assert kind == "data:image/png;base64"
        png = base64.b64decode(data, validate=True)
        assert png in beside
        with Image.open(io.BytesIO(png)) as image:
            image.load()
            assert min(image.size) > 100
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.open == [], "every element is closed"
    assert not re.search(r"url\(|@import|https?://", page.text)


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((result for name in names if (result := shutil.which(name))), None)


@pytest.mark.skipif(not browser(), reason="no Chromium here; the page is parsed above")
def test_a_browser_shows_every_picture(made, tmp_path):
    """A script, added to a copy, says what the browser has decoded and laid out."""
    script = (
        "<script>onload = () => { document.body.dataset.shown = [...document.images].filter("
        "i => i.complete && i.naturalWidth > 100 && i.getBoundingClientRect().height > 100).length;"
        " }</script></body>"
    )
    copy = tmp_path / "page.html"
    copy.write_text((made.folder / "index.html").read_text().replace("</body>", script))
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", copy.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f'data-shown="{2 * len(PICTURES) + 3}"' in done.stdout, done.stderr[-2000:]


def test_every_figure_of_every_run_is_written(made):
    names = {file.stem for file in made.folder.glob("*.png")}
    expected = {f"{run}-{picture}" for run in ("small", "large") for picture in PICTURES}
    assert names == expected | {f"small-{CLS}", "comparison-curves", "comparison-measures"}


def test_every_figure_names_its_step_and_n(made):
    alone = ("curves", "positions", "measures")  # where nothing is averaged
    for name, figure in made.figures.items():
        title = figure.get_suptitle()
        assert "step 5" in title, name
        if not name.endswith(alone):
            assert re.search(r"n = \d+ (images of \S+ val|filters|image of \S+ val)$", title), title
    assert "n = 20 images" in made.figures["small-confusion"].get_suptitle()
    assert "n = 16 filters" in made.figures["small-filters"].get_suptitle()


def test_the_numbers_are_those_of_eval(made, capsys):
    for run, row in zip((made.small, made.large), made.content["runs"], strict=True):
        assert cli.main(["eval", str(run), "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)
        assert (row["n"], row["step"], row["accuracy"]) == (N, 5, expected["accuracy"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert json.loads((made.folder / "numbers.json").read_text()) == made.content
    (note,) = made.content["notes"]
    assert note.startswith("large, step 5: Attention of [CLS]") and "(pool=gap)" in note


def test_runs_are_compared_image_by_image(made):
    small, large = (InspectedRun(str(run)) for run in (made.small, made.large))
    correct = [
        inspected.predict(inspected.open_split("test")).correct for inspected in (small, large)
    ]
    text = " ".join(Page(made.folder / "index.html").text.split())
    both, only, other = (
        (correct[0] & correct[1]),
        (correct[0] & ~correct[1]),
        (correct[1] & ~correct[0]),
    )
    cells = "".join(str(hits.sum()) for hits in (both, only, other))
    assert f"large5{cells}{N - (correct[0] | correct[1]).sum()}{N}" in text
    assert [row["images_per_second"] for row in made.content["runs"]] == [43, 43], "the median"
    widths = [bar.get_width() for bar in made.figures["comparison-measures"].axes[0].patches]
    assert widths == [100 * row["accuracy"] for row in made.content["runs"]]
    assert "43 on 3 x abacus" in text


def test_the_same_pictures_go_to_weights_and_biases(made):
    assert [loaded[0] for loaded in made.published] == [made.small, made.large]
    for name, (_, project, title, shown, values) in zip(
        ("small", "large"), made.published, strict=True
    ):
        assert (project, title) == ("vit_scale", "tiny")
        assert set(shown) == {
            *(f"inspect/{picture}" for picture in PICTURES | ({CLS} if name == "small" else set())),
            "inspect/comparison-curves",
            "inspect/comparison-measures",
        }
        with Image.open(made.folder / f"{name}-rollout.png") as image:
            np.testing.assert_array_equal(np.asarray(image)[..., :3], shown["inspect/rollout"])
        assert values["inspect/n"] == N and values["inspect/step"] == 5


# What the pictures show


def weights_of(inspected: InspectedRun, images) -> jax.Array:
    """Every weight of every block, [l, b, k, n, n]."""
    pixels = 2 * jnp.asarray(inspected.display_pixels(images)) - 1
    return jax.jit(lambda x: inspected.model.attention(inspected.params, x, lambda w: w)[0])(pixels)


@pytest.mark.parametrize(("run", "blocks", "heads"), [("small", 2, 2), ("large", 2, 2)])
def test_maps_are_the_model_s_weights(made, run, blocks, heads):
    """Of [CLS], or the mean over tokens; as multiples of uniform attention, on the patch grid."""
    inspected = InspectedRun(str(getattr(made, run)))
    shown = report.choose_samples(inspected, inspected.open_split("test"), None).to_show()
    assert sorted(shown.names) == sorted(CLASSES), "one of each"
    weights = weights_of(inspected, shown.images)
    rows = weights[:, :, :, 0, 1:] if run == "small" else weights.mean(axis=3)
    expected = np.asarray(rows * weights.shape[-1]).reshape(blocks, -1, heads, *inspected.grid)
    tiles = arrays(made.figures[f"{run}-attention-heads"])
    for image in range(sections.ROWS):
        for head in range(heads):
            tile = tiles[image * (heads + 1) + head + 1]
            np.testing.assert_allclose(tile, expected[-1, image, head], atol=1e-4)
    tiles = arrays(made.figures[f"{run}-attention-blocks"])
    np.testing.assert_allclose(tiles[1], expected[0, 0].mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(tiles[2], expected[1, 0].mean(axis=0), atol=1e-4)
    assert np.ptp(tiles[1]) > 0.01


def test_rollout_sums_to_one_share_for_each_token(made):
    inspected = InspectedRun(str(made.large))
    maps = inspected.attention_maps(
        report.choose_samples(inspected, inspected.open_split("test"), None).images
    )["rollout"]
    assert maps.shape == (N, *inspected.grid)
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), 1, atol=1e-5)  # without [CLS]
    tiles = arrays(made.figures["large-rollout"])
    assert tiles[0].shape == (24, 32, 3) and tiles[4].shape == (3, 4)


def test_distances_are_averaged_over_every_image(made):
    """20 images in batches of 8: padding counts nowhere."""
    inspected = InspectedRun(str(made.small))
    images = report.choose_samples(inspected, inspected.open_split("test"), None).images
    result = inspected.attention_distances(images)
    between = patch_distances((2, 2), (8, 8))
    expected = mean_distance(weights_of(inspected, images), between).mean(axis=1)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    (axes,) = made.figures["small-attention-distance"].axes
    heads, mean, _ = axes.get_lines()
    np.testing.assert_allclose(np.sort(heads.get_ydata()), np.sort(result.ravel()), rtol=1e-5)
    np.testing.assert_allclose(mean.get_ydata(), result.mean(axis=1), rtol=1e-5)
    assert heads.get_ydata().max() < 16 * np.sqrt(2)


def test_positions_before_and_after_resampling(made):
    before = np.asarray(InspectedRun(str(made.small)).params["posemb"])
    after = np.asarray(InspectedRun(str(made.large)).params["posemb"])
    tables = (before, np.asarray(position_embeddings.resample(before, (3, 4), "cubic")), after)
    figure = made.figures["large-positions"]
    for axes, table in zip(figure.axes, tables, strict=False):
        expected = embeddings.mosaic(embeddings.similarity(table))
        shown = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_allclose(shown, expected, atol=1e-6)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles[0] == "before: small, step 5: 2 x 2"
    assert titles[1] == "resampled (cubic), step 0: 3 x 4"
    assert len(arrays(made.figures["small-positions"])) == 1


def test_an_image_is_cut_into_the_patches_that_the_model_sees(made):
    inspected = InspectedRun(str(made.large))
    stored, seen, cut = arrays(made.figures["large-patches"])
    assert stored.shape[:2] == (24, 32), "decoded at the model's size"
    assert cut.shape == (3 * 9 - 1, 4 * 9 - 1, 3)
    np.testing.assert_allclose(cut[9:17, 18:26], seen[8:16, 16:24])
    np.testing.assert_allclose(
        seen, inspected.display_pixels(stored[None].astype(np.uint8))[0], atol=1e-6
    )


def test_images_are_shown_as_the_model_cuts_them(images, undrawn, tmp_path):
    run = run_of(tmp_path / "run", images, "model.nearest_grid=True", "data.resolution=20")
    inspected = InspectedRun(run)
    assert inspected.size == (20, 20)
    assert inspected.display_pixels(random_images(2, (20, 20))).shape == (2, 16, 16, 3)
    assert inspect([run], out=tmp_path / "out", split="val")


def test_another_image_size_is_refused(images, tmp_path):
    run = run_of(tmp_path / "run", images)
    with pytest.raises(UserError, match="inspect shows a model at its own image size, 16 x 16"):
        InspectedRun(run, ["data.resolution=32"])


def test_curves_are_drawn_as_written(made):
    loss = made.figures["small-curves"].axes[0]
    train, evaluation = loss.get_lines()
    assert list(train.get_xdata()) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(train.get_ydata(), [2.8, 2.6, 2.4, 2.2, 2.0])
    assert (list(evaluation.get_xdata()), list(evaluation.get_ydata())) == ([5], [2.5])


def test_mistakes_are_shown_with_both_classes(made):
    inspected = InspectedRun(str(made.small))
    result = inspected.predict(inspected.open_split("test"))
    shown = [axes for axes in made.figures["small-mistakes"].axes if axes.images]
    assert len(shown) == 6 < (~result.correct).sum()
    first = np.flatnonzero(~result.correct)[result.losses[~result.correct].argmax()]
    predicted, true = result.predicted[first], result.labels[first]
    assert shown[0].get_title().startswith(f"pred. {CLASSES[predicted]} ")
    assert f"true {CLASSES[true]} " in shown[0].get_title()
    matrix = np.asarray(made.figures["small-confusion"].axes[0].images[0].get_array())
    np.testing.assert_allclose(matrix.sum(axis=1), 1)


def test_many_heads_blocks_classes_and_odd_names_are_drawn():
    """16 heads, 300 classes, one image, and a name that is no HTML: nothing overflows or raises."""
    maps = np.random.RandomState(0).rand(1, 13, 24, 24)
    image = np.zeros((384, 384, 3))
    names = [f"head {i}" for i in range(13)]
    drawn = plots.rasterize(plots.plot_attention([image], ["<b>&"], names, maps, "a title"))
    assert drawn.dtype == np.uint8 and np.ptp(drawn) > 100
    classes = [f"class {i}" for i in range(300)]
    figure = plots.plot_confusion(np.eye(300, dtype=int), classes, "a title")
    assert plots.rasterize(figure).shape[2] == 3


# Where something is missing


def test_registers_are_shown_apart(images, undrawn, tmp_path, monkeypatch):
    """Each register's attention, which no other map contains; rotary positions have no table."""
    fields = ("model.registers=2", "model.rope=dinov3", "model.posemb=none", "model.pool=cls_gap")
    run = run_of(tmp_path / "run", images, *fields)
    figures = {}

    def draw(shown, plain=report.rasterize):
        figures.update({p.name: p.figure for section in shown for p in section.pictures()})
        return plain(shown)

    monkeypatch.setattr(report, "rasterize", draw)
    content = inspect([str(run)], out=str(tmp_path / "out"))
    inspected = InspectedRun(str(run))
    shown = report.choose_samples(inspected, inspected.open_split("test"), None).to_show()
    weights = np.asarray(weights_of(inspected, shown.images))  # [CLS], registers, 2 x 2 patches
    tiles = arrays(figures["attention-registers"])
    for register in range(2):
        expected = weights[-1, 0, :, 1 + register, 3:].mean(axis=0) * 7
        np.testing.assert_allclose(tiles[1 + register], expected.reshape(2, 2), atol=1e-4)
    heads = weights[-1, 0, :, 0, 3:].reshape(2, 2, 2) * 7
    np.testing.assert_allclose(arrays(figures["attention-heads"])[1], heads[0], atol=1e-4)
    assert any("no position embeddings (rope=dinov3)" in note for note in content["notes"])
    assert "positions" not in figures


def test_a_model_without_attention_gets_the_rest(made, undrawn, tmp_path, monkeypatch):
    def without(source, read=pretrained.load_model):
        loaded = read(source)
        return loaded._replace(model=dataclasses.replace(loaded.model, attention=None))

    monkeypatch.setattr(pretrained, "load_model", without)
    content = inspect([str(made.small)], out=str(tmp_path))
    assert any("this model has no attention" in note for note in content["notes"])
    names = {file.stem for file in tmp_path.glob("*.png")}
    assert names == {
        *("curves", "filters", "features", "neighbours"),
        *("confusion", "mistakes", "calibration"),
    }
    assert "this model has no attention" in Page(tmp_path / "index.html").text


def test_a_run_without_its_data_and_source_is_inspected(made, undrawn, images, tmp_path):
    run = shutil.copytree(made.large, tmp_path / "moved <i>&amp;")
    text = (run / "run.json").read_text()
    assert str(images) in text
    step = run / "checkpoints" / "5"
    gone = [f"data.path={tmp_path / 'gone'}", f"init.source={tmp_path / 'gone'}"]
    with pytest.raises(UserError, match="gone"):
        inspect([str(step)], overrides=gone)  # what was asked for is not there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InspectedRun, "open_split", lambda self, split: refuse())
        patch.setattr(
            sections.pretrained, "load_model", _without_source(pretrained.load_model, run)
        )
        content = inspect([str(step)], images=str(images / "val" / "cat"))
    notes = " ".join(content["notes"])
    assert "split test can't be opened: no such set" in notes
    assert "Features: Not available: split train can't be opened" in notes
    assert "the run's init.source can't be loaded: it is gone" in notes
    folder = run / "inspect"
    assert content["page"] == str(folder / "index.html")
    assert {file.stem for file in folder.glob("*.png")} == PICTURES - {
        "features", "neighbours", "confusion", "mistakes", "calibration",
    }  # fmt: skip
    assert content["runs"][0]["accuracy"] is None and content["runs"][0]["n"] == 0
    assert "moved <i>&amp;" in Page(folder / "index.html").text, "escaped"


def refuse():
    raise UserError("no such set")


def _without_source(read, run):
    def reading(source, *hints):
        if pathlib.Path(source).is_relative_to(run):
            return read(source, *hints)
        raise UserError("it is gone")

    return reading


def test_attention_on_images_of_a_folder(made, images, tmp_path):
    inspected = InspectedRun(str(made.small))
    result = report.choose_samples(inspected, None, str(images))
    assert result.images.shape == (2 * N, 16, 16, 3) and result.source == str(images)
    assert "00" in result.names
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("no image")
    with pytest.raises(UserError, match=r"--images .*empty has no image; .*\.txt 1"):
        report.choose_samples(inspected, None, str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        report.choose_samples(inspected, None, str(tmp_path / "none"))


def test_without_matplotlib_one_line_says_what_to_install(made, monkeypatch, capsys):
    for name in list(sys.modules):
        if re.match(r"matplotlib\b|vit_scale\.inspect\.", name):
            monkeypatch.delitem(sys.modules, name)
    for name in ("report", "sections", "comparison", "plots"):
        monkeypatch.delattr(f"vit_scale.inspect.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["inspect", str(made.small)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == (
        "vit-scale: inspect needs matplotlib, which is not installed: "
        "run launch/environment.sh inspect in a clone, or pip install matplotlib\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--split", "tset"], "split 'tset' is unknown; valid: train, test"),
        (["RUN", "--config.data.path=nowhere"], "nowhere"),
        (["RUN", "nowhere"], "nowhere is not a run folder"),
        (["RUN", "--images", "nowhere"], "cannot read --images nowhere: No such file"),
        (["RUN", "--config.data.patch=1"], "no config field is named 'data.patch'"),
        (["OPEN", "--wandb"], "finished run, and .* has no report.json yet"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_user_errors_are_one_line(made, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    opened = shutil.copytree(made.small, tmp_path / "opened")
    (opened / "report.json").unlink()
    places = {"RUN": str(made.small), "OPEN": str(opened)}
    before = sorted(os.listdir(made.small))
    assert cli.main(["inspect", *(places.get(word, word) for word in arguments)]) > 0
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err) and err.count("\n") == 1
    assert sorted(os.listdir(made.small)) == before, "nothing is written"


def test_the_command_prints_a_table_and_the_page(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "report", lambda *loaded: made.content | {"given": loaded})
    arguments = ["inspect", "a", "b", "--images", "c", "--split", "test", "--out", "d", "--wandb"]
    assert cli.main([*arguments, "--config.data.workers=0", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["given"] == [["a", "b"], "c", "test", "d", ["data.workers=0"], True]
    assert cli.main(["inspect", "a"]) == 0
    header, *rows, note, page = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", header)[:5] == ["run", "step", "evaluated on", "n", "accuracy"]
    assert (
        len(rows) == 2
        and [note] == made.content["notes"]
        and page == str(made.folder / "index.html")
    )
    assert f"{100 * made.content['runs'][0]['accuracy']:.2f} %" in rows[0]


def test_names_of_runs_are_made_unique(made, tmp_path):
    other = shutil.copytree(made.small, tmp_path / "small")
    subjects = [InspectedRun(str(run)) for run in (made.small, other, made.large)]
    report.make_names_unique(subjects)
    names = [inspected.name for inspected in subjects]
    assert len(set(names)) == 3 and names[2] == "large"
    assert all("/" not in name and name.endswith("small-5") for name in names[:2])


# Training


def test_the_train_step_is_unchanged_by_inspection(made, monkeypatch):
    """The compiled step is the same after an inspection, and never computes attention weights."""
    program = make_setup(tiny_config())
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch())

    def lowered() -> str:
        return jit_train_step(program).lower(program.state, batch).as_text()

    InspectedRun(str(made.small)).attention_distances(np.zeros((1, 16, 16, 3), np.uint8))
    before = lowered()
    for module in (layers.Attention, layers.AttentionPool):
        monkeypatch.setattr(module, "weights", None)
    monkeypatch.setattr(layers, "weights", None)
    monkeypatch.setattr(vit.ViT, "attention", None)
    assert lowered() == before
    n = program.model.shape.tokens
    exponentials = re.findall(rf"stablehlo.exponential .*tensor<8x2x{n}x{n}xf32>", before)
    assert len(exponentials) == 1, "one softmax in the scanned block, and none to look at"

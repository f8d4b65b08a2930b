"""Soups and interpolation against means by hand, and what can't be averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import (
    CLASSES,
    random_params,
    tiny_config,
    tiny_model,
    write_images,
    write_run,
)
from vit_scale import api, checkpoint, cli, pretrained
from vit_scale.errors import UserError
from vit_scale.models.parameters import named, unstack
from vit_scale.models.position_embeddings import resample
from vit_scale.pretrained.average import greedy_soup, mean


def make_run(folder, *overrides, seed=0, **description):
    model = tiny_model(*overrides)
    return write_run(folder, tiny_config(*overrides), random_params(model, seed), **description)


@pytest.fixture
def runs(tmp_path):
    """Three runs of one architecture; the second has unrolled blocks, the third an average."""
    params = random_params(tiny_model(), 3)
    return [
        make_run(tmp_path / "a", seed=1),
        write_run(
            tmp_path / "b",
            tiny_config("model.scan=False", "model.dropout=0.5"),
            unstack(random_params(tiny_model(), 2)),
        ),
        write_run(tmp_path / "c", tiny_config(), jax.tree.map(np.zeros_like, params), ema=params),
    ]


def test_a_soup_is_the_mean_of_what_each_run_is_evaluated_with(runs, tmp_path, capsys):
    out = tmp_path / "soup"
    assert cli.main(["average", *map(str, runs), str(out)]) == 0
    model = pretrained.load_model(out)
    assert (model.step, model.classes) == (0, CLASSES)
    trees = [named(random_params(tiny_model(), seed)) for seed in (1, 2, 3)]
    for name, leaf in named(model.params).items():
        expected = np.mean([tree[name] for tree in trees], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(leaf, expected.astype(np.float32))
    line = f"mean of {', '.join(f'{run}/checkpoints/5' for run in runs)}"
    assert capsys.readouterr().out == f"{line}\n{out}\n"
    assert checkpoint.read_description(out / "checkpoints/0")["source"] == [line]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_of_a_run_with_itself_is_the_run_bit_for_bit(runs, tmp_path, count):
    params = jax.tree.map(jnp.asarray, random_params(tiny_model()))
    params["head"]["bias"] = jnp.array([-0.0, 1e-42, 3e38, 1 / 3], jnp.float32)
    run = write_run(tmp_path / "run", tiny_config(), params)
    api.average([run] * count, tmp_path / "out", quiet=True)
    result = pretrained.load_model(tmp_path / "out").params
    for name, leaf in named(pretrained.load_model(run).params).items():
        assert named(result)[name].tobytes() == leaf.tobytes(), name


def test_a_greedy_soup_adds_what_does_not_lower_the_accuracy(runs):
    """The order is b, c, a; c is kept at equal accuracy, a is not."""
    values = {seed: random_params(tiny_model(), seed) for seed in (1, 2, 3)}
    accuracy = {"a": 0.1, "b": 0.5, "c": 0.3, "bc": 0.5, "bca": 0.4999}
    mixtures = {"a": [1], "b": [2], "c": [3], "bc": [2, 3], "bca": [2, 3, 1]}

    def measure(params):
        bias = np.asarray(params["head"]["bias"])
        for name, seeds in mixtures.items():
            expected = np.mean([values[seed]["head"]["bias"] for seed in seeds], axis=0)
            if np.allclose(bias, expected, atol=1e-7):
                return {"accuracy": accuracy[name], "n": 7}
        raise AssertionError(bias)

    lines: list[str] = []
    model, sources = greedy_soup(runs, measure, lines.append)
    a, b, c = map(str, runs)
    assert [line.partition(": accuracy ")[0] for line in lines] == [
        *(f"{run}/checkpoints/5" for run in (a, b, c)),
        f"{b} + {c}",
        f"{b} + {c} + {a}",
    ]
    assert lines[0].endswith("accuracy 10.00 %, n 7") and lines[3].endswith("n 7: kept")
    assert lines[4].endswith("accuracy 49.99 %, n 7: not kept")
    assert sources == (f"greedy mean of {b}/checkpoints/5, {c}/checkpoints/5",)
    assert not model.cfg.model.scan and "0" in model.params["blocks"]  # as the best run has it
    expected = mean([unstack(values[2]), values[3]])
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)


def test_interpolation_between_a_base_and_what_was_fine_tuned_from_it(tmp_path, capsys):
    """At another resolution and with other classes: positions are resampled, the head is kept."""
    base = make_run(tmp_path / "base", "model.classes=3", seed=1, classes=["x", "y", "z"])
    tuned = make_run(tmp_path / "tuned", "data.resolution=32", "model.scan=False", seed=2)
    result = {}
    for alpha in ("0", "0.25", "1"):
        out = str(tmp_path / alpha)
        assert cli.main(["average", str(base), str(tuned), out, "--wise-ft", alpha]) == 0
        result[alpha] = named(pretrained.load_model(out).params)
    printed = capsys.readouterr().out
    assert f"0.75 x {base}/checkpoints/5 + 0.25 x {tuned}/checkpoints/5\n" in printed
    line = "head/bias, head/kernel: of the fine-tuned run alone, since the base has other classes"
    assert line in printed
    first = pretrained.load_model(base).params
    first["posemb"] = resample(first["posemb"], (4, 4), "cubic")
    first, last = named(unstack(first)), named(pretrained.load_model(tuned).params)
    for name, leaf in last.items():
        start = leaf if name.startswith("head/") else first[name]
        np.testing.assert_array_equal(result["1"][name], leaf)
        np.testing.assert_allclose(result["0"][name], start, atol=1e-6)
        np.testing.assert_allclose(result["0.25"][name], 0.75 * start + 0.25 * leaf, atol=1e-6)
    same = make_run(tmp_path / "same", seed=3)
    api.average([same, make_run(tmp_path / "d")], tmp_path / "half", wise_ft=0.5, quiet=True)
    half = pretrained.load_model(tmp_path / "half").params["head"]["kernel"]
    expected = sum(random_params(tiny_model(), seed)["head"]["kernel"] / 2 for seed in (0, 3))
    np.testing.assert_allclose(half, expected, atol=1e-6)


REFUSALS = [
    (["model.mlp=32"], {}, "model.mlp: 24 and 32"),
    (["model.gelu=tanh"], {}, "model.gelu: exact and tanh"),
    (["data.resolution=32"], {}, "image: 16 x 16 and 32 x 32"),
    (["augment.mean=(0.,0.,0.)"], {}, "augment.mean: (0.5, 0.5, 0.5) and (0.0, 0.0, 0.0)"),
    ([], {"classes": ["cat", "eel", "dog", "fox"]}, "classes: 1 is 'dog' and 'eel'"),
    (["model.classes=2"], {"classes": ["cat", "dog"]}, "classes: 4 and 2"),
]


@pytest.mark.parametrize(("overrides", "description", "message"), REFUSALS)
def test_what_differs_is_refused_with_the_difference(tmp_path, overrides, description, message):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", *overrides, **description)
    with pytest.raises(UserError) as caught:
        api.average([first, second], tmp_path / "out", quiet=True)
    runs = f"{first}/checkpoints/5 and {second}/checkpoints/5"
    assert str(caught.value) == f"{runs} can't be averaged: {message}"
    assert not (tmp_path / "out").exists()


def test_misuse_is_refused(tmp_path, capsys):
    a, b = (str(make_run(tmp_path / name)) for name in "ab")
    hybrid = str(make_run(tmp_path / "h", "model.variant=C+Ti/8"))
    out = str(tmp_path / "out")
    for arguments, message in (
        ([a, b, a], f"{a} is not empty: give a new folder"),
        ([a, hybrid, out], f"{hybrid}/checkpoints/5 has batch normalisation, whose statistics"),
        ([a, b, out, "--greedy"], "--greedy and --split SPLIT, which it selects by, go together"),
        ([a, b, a, out, "--wise-ft=0.5"], "--wise-ft takes two runs, BASE and FINE_TUNED"),
        ([a, b, out, "--wise-ft=1.5"], "--wise-ft 1.5 must be from 0 (the base) to 1"),
        ([a, b, out, "--config.data.path=x"], "average without --greedy takes no --config."),
        ([a, b, out, "--greedy", "--split=test[:9]"], "shares images with eval.final=test"),
        ([a, b, out, "--greedy", "--split=train[90%:]"], "shares images with data.train=train"),
    ):
        assert cli.main(["average", *arguments]) in (1, 2)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()


def test_a_greedy_soup_of_scanned_and_unrolled_blocks(tmp_path):
    fields = write_images(tmp_path / "photos", "train", "val")
    runs = []
    for seed, scan in enumerate(("True", "False")):
        model = tiny_model(f"model.scan={scan}")
        cfg = tiny_config(f"model.scan={scan}", "eval.final=", "data.train=train[:50%]")
        runs.append(write_run(tmp_path / scan, cfg, random_params(model, seed)))
    out = tmp_path / "out"
    api.average(runs, out, split="val", quiet=True, **fields)
    results = [api.evaluate(run, "val", quiet=True, **fields)["accuracy"] for run in (*runs, out)]
    assert results[2] >= max(results[:2])
    larger = fields | {"data.resolution": 32}
    with pytest.raises(UserError, match="selects at the runs' own image size, 16 x 16"):
        api.average(runs, tmp_path / "larger", split="val", quiet=True, **larger)
    at_32 = api.evaluate(runs[0], "val", quiet=True, **larger)
    source = pretrained.load_model(runs[0])
    pretrained.convert(runs[0], tmp_path / "at-32", ["data.resolution=32"])
    assert at_32["loss"] == api.evaluate(tmp_path / "at-32", "val", quiet=True, **larger)["loss"]
    assert source.model.shape.tokens == 5


@pytest.mark.slow
def test_a_greedy_soup_is_selected_by_the_split_and_evaluates(cifar, tmp_path, capsys):
    fields = ("model.classes=10", "data.train=train[:90%]", f"data.path={cifar}", "eval.batch=512")
    model = tiny_model(*fields)
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    runs = [
        write_run(
            tmp_path / str(seed),
            tiny_config(*fields),
            random_params(model, seed),
            classes=[*classes, "truck"],
        )
        for seed in (0, 1)
    ]
    out = tmp_path / "out"
    arguments = ["--greedy", "--split", "train[99%:]"]
    assert cli.main(["average", *map(str, runs), str(out), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "selecting by cifar10 train[99%:]: 500 images"
    results = [api.evaluate(run, "train[99%:]", quiet=True)["accuracy"] for run in runs]
    for run, line, accuracy in zip(runs, lines[1:], results, strict=False):
        assert line == f"{run}/checkpoints/5: accuracy {100 * accuracy:.2f} %, n 500"
    assert api.evaluate(out, "train[99%:]", quiet=True)["accuracy"] >= max(results)

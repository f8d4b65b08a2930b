"""Runs that learn several classes an image, or numbers: from a listing to predictions."""

import csv
import json
import pathlib
import shutil

import numpy as np
import pytest

import vit_scale
from tests.data.test_image_folder import save
from tests.laws.test_laws import command, losses, report
from tests.laws.test_mesh import Pods
from vit_scale import checkpoint, cli

COLOURS = ("red", "green", "blue")
COUNTS = {"train": 48, "val": 21}
FIELDS = {
    "data__name": "folder",
    "data__resolution": 16,
    "data__batch": 12,
    "data__workers": 0,
    "data__train": "train[:50%]",
    "eval__split": "train[50%:]",
    "eval__final": "val",
    "eval__batch": 8,  # which divides neither split
    "steps": 12,
    "eval__every": 4,
    "checkpoint__every": 4,
    "checkpoint__keep": 9,
    "model__classes": 3,
    "augment__crop": "none",
    "optim__warmup": 0,
}
SEVERAL = {"data__target": "classes", "loss": "focal"}
NUMBERS = {
    "data__target": "value",
    "objective": "regression",
    "loss": "huber",
    "augment__smoothing": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Photos whose three channels are bright or dark; each is a class, and a number."""
    top, draw = tmp_path_factory.mktemp("colours"), np.random.RandomState(0)
    for split, count in COUNTS.items():
        levels = draw.uniform(size=(count, 3))
        for number, row in enumerate(levels):
            noise = draw.uniform(-60, 60, size=(16, 16, 3))
            pixels = np.clip(40 + 175 * row + noise, 0, 255).astype(np.uint8)
            save(top / f"images/{split}-{number}.png", pixels)
        files = [f"images/{split}-{number}.png" for number in range(count)]
        present = {
            file: [name for name, level in zip(COLOURS, row, strict=True) if level > 0.5]
            for file, row in zip(files, levels, strict=True)
        }
        (top / "classes").mkdir(exist_ok=True)
        (top / "classes/images").exists() or (top / "classes/images").symlink_to(top / "images")
        (top / f"classes/{split}.json").write_text(json.dumps(present))
        (top / "numbers").mkdir(exist_ok=True)
        (top / "numbers/images").exists() or (top / "numbers/images").symlink_to(top / "images")
        with (top / f"numbers/{split}.csv").open("w", newline="") as stream:
            rows = ([file, *(1000 + 50 * row)] for file, row in zip(files, levels, strict=True))
            csv.writer(stream).writerows([["file", *COLOURS], *rows])
    return top


def trained(run: pathlib.Path, path: pathlib.Path, **fields) -> pathlib.Path:
    arguments = command(run, **FIELDS, data__path=path, **fields)
    assert cli.main([*arguments, "--quiet"]) == 0
    return run


@pytest.fixture(scope="module")
def several(folder, tmp_path_factory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("several") / "run"
    return trained(run, folder / "classes", **SEVERAL, optim__lr=0.1)  # its last step isn't best


@pytest.fixture(scope="module")
def numbers(folder, tmp_path_factory) -> pathlib.Path:
    return trained(tmp_path_factory.mktemp("numbers") / "run", folder / "numbers", **NUMBERS)


def predictions(run: pathlib.Path, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """What `predict` makes of each file of the validation set."""
    predictor = vit_scale.load(run)
    files = [f"images/val-{number}.png" for number in range(COUNTS["val"])]
    return {file: dict(predictor.top(folder / file, 3)) for file in files}


def truth(folder: pathlib.Path) -> np.ndarray:
    content = json.loads((folder / "classes/val.json").read_text())
    return np.array([[name in row for name in sorted(COLOURS)] for row in content.values()])


def test_the_map_of_a_run_is_that_of_its_predictions(several, folder):
    """By the definition: the precision at each positive example, of those that score as high."""
    made = predictions(several, folder)
    scores = np.array([[row[name] for name in sorted(COLOURS)] for row in made.values()])
    present, precisions = truth(folder), []
    for score, hot in zip(scores.T, present.T, strict=True):
        at_least = score[None, :] >= score[:, None]
        precision = (at_least & hot).sum(1) / at_least.sum(1)
        precisions.append(precision[hot].mean())
    result = report(several)
    assert result["measure"] == "mAP" and result["eval"]["n"] == COUNTS["val"]
    assert result["eval"]["mAP"] == pytest.approx(np.mean(precisions), abs=1e-12)
    assert 0.4 < result["eval"]["mAP"] < 1
    marked = scores >= result["eval"]["thresholds"]
    f1 = 2 * (marked & present).sum(0) / (marked.sum(0) + present.sum(0))
    assert result["eval"]["macro_f1"] == pytest.approx(f1.mean(), abs=1e-12)


def test_thresholds_and_the_best_step_are_chosen_on_the_split_that_selects(several):
    steps = checkpoint.finished_steps(several)
    assert steps == [4, 8, 12]
    selected = {
        step: checkpoint.read_selection(several / "checkpoints" / str(step)) for step in steps
    }
    result = report(several)["eval"]
    assert result["thresholds"] == selected[12]["thresholds"] != [0.5] * 3
    best = max(steps, key=lambda step: (selected[step]["mAP"], step))
    assert result["best"]["step"] == best != result["step"]
    assert result["best"]["selected_by"]["mAP"] == selected[best]["mAP"]
    assert result["best"]["thresholds"] == selected[best]["thresholds"]
    curves = [json.loads(line) for line in (several / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row["eval/mAP"] for row in curves if "eval/mAP" in row}
    assert logged == {step: selected[step]["mAP"] for step in steps}
    assert not any("accuracy" in name or "thresholds" in name for row in curves for name in row)


def test_the_command_line_says_what_was_measured(several, folder, capsys):
    result = report(several)["eval"]
    assert cli.main(["eval", str(several), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {name: again[name] for name in result if name != "best"} == {
        name: value for name, value in result.items() if name != "best"
    }
    assert cli.main(["eval", str(several), "--config.eval.batch=21"]) == 0
    line = f"classes val: mAP {100 * result['mAP']:.2f} %, macro F1 {100 * result['macro_f1']:.2f}"
    assert capsys.readouterr().out.startswith(line)
    assert cli.main(["show", str(several)]) == 0
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert "mAP" in header and "accuracy" not in header
    assert f"{100 * result['mAP']:.2f} %  {100 * result['best']['mAP']:.2f} %" in row
    image = str(folder / "images/val-3.png")
    assert cli.main(["predict", str(several), image, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)[image]
    assert content["probabilities"] == predictions(several, folder)["images/val-3.png"]
    thresholds = dict(zip(sorted(COLOURS), result["thresholds"], strict=True))
    marked = [name for name, p in content["probabilities"].items() if p >= thresholds[name]]
    assert content["marked"] == marked
    assert cli.main(["predict", str(several), image]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "%*" in line] == marked and len(lines) == 3


def test_numbers_are_normalised_in_training_and_predicted_as_they_are(numbers, folder, capsys):
    listed = np.loadtxt(folder / "numbers/val.csv", delimiter=",", skiprows=1, usecols=(1, 2, 3))
    made = np.array([[*row.values()] for row in predictions(numbers, folder).values()])
    errors, result = made - listed, report(numbers)["eval"]
    r2 = 1 - (errors**2).sum(0) / ((listed - listed.mean(0)) ** 2).sum(0)
    assert result["r2"] == pytest.approx(r2.mean(), abs=1e-4) and result["n"] == COUNTS["val"]
    assert result["rmse"] == pytest.approx(np.sqrt((errors**2).mean(0)).mean(), rel=1e-4)
    assert result["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert report(numbers)["measure"] == "r2" and 5 < result["rmse"] < 30
    recorded = json.loads((numbers / "run.json").read_text())["config"]["regression"]
    assert np.abs(np.array(recorded["mean"]) - 1025).max() < 15
    assert (np.abs(np.array(recorded["std"]) - 50 / np.sqrt(12)) < 5).all()
    image = str(folder / "images/val-0.png")
    assert cli.main(["predict", str(numbers), image]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        [f"{value:.6g}", name] for value, name in zip(made[0], COLOURS, strict=True)
    ]
    assert cli.main(["eval", str(numbers)]) == 0
    assert f"R2 {result['r2']:.4f}, RMSE {result['rmse']:.4f}" in capsys.readouterr().out


def test_a_run_resumes_with_the_scale_that_it_began_with(numbers, folder, tmp_path):
    """As if killed after step 4, and with an image fewer in the listing since."""
    run = tmp_path / "run"
    shutil.copytree(numbers, run)
    for step in ("8", "12"):
        shutil.rmtree(run / "checkpoints" / step)
    (run / "report.json").unlink()
    trained(run, folder / "numbers", **NUMBERS)
    assert report(run)["eval"] == report(numbers)["eval"]
    assert losses(run)[-8:] == losses(numbers)[-8:]
    shutil.rmtree(run / "checkpoints" / "12")
    (run / "report.json").unlink()
    shutil.copytree(folder / "numbers", tmp_path / "set", symlinks=True)
    lines = (folder / "numbers/train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "set/train.csv").write_text("".join(lines[:-3]))
    trained(run, tmp_path / "set", **NUMBERS, data__changed=True)
    before, after = (json.loads((r / "run.json").read_text()) for r in (numbers, run))
    assert before["config"]["regression"] == after["config"]["regression"]


@pytest.mark.slow  # two pods start: 40 s
def test_two_processes_measure_and_draw_the_same(folder, cifar, tmp_path):
    pods, runs = Pods(tmp_path, cifar), {}
    common = {**FIELDS, "optim__lr": 0.01, "optim__ema": 0.0, "steps": 8}
    common |= {"data__batch": 8, "augment__smoothing": 0.0}
    for name, fields in (("classes", SEVERAL), ("numbers", NUMBERS)):
        values = {**common, **fields, "data__path": folder / name}
        runs[name] = [f"{k.replace('__', '.')}={v}" for k, v in values.items()]
    runs["balanced"] = ["data.sampling=balanced", "data.train=train[:300]"]
    pods.start(1, 1, {f"{name} alone": flags for name, flags in runs.items()})
    pods.start(2, 1, runs)
    for name in runs:
        alone, both = f"{name} alone", name
        expected, result = pods.report(alone)["eval"], pods.report(both)["eval"]
        assert pods.report(both)["devices"]["hosts"] == 2
        np.testing.assert_allclose(
            [*pods.losses(both).values()], [*pods.losses(alone).values()], rtol=0, atol=1e-5
        )
        assert result["n"] == expected["n"]
        for measure in {"mAP", "macro_f1", "r2", "rmse", "accuracy"} & expected.keys():
            assert result[measure] == pytest.approx(expected[measure], rel=1e-5)
        if name == "classes":
            np.testing.assert_allclose(result["thresholds"], expected["thresholds"], atol=1e-5)

"""The measurements that wait for an accelerator, at their toy size, and the listing of all."""

import io
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks import __main__ as listing
from benchmarks import comparison, cpu_parts, measurement, speed
from benchmarks.contender import Contender
from tests.conftest import ROOT, colour_coded
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.models.flops import count_macs

NOTE = "CIFAR-10 (colours)"
FAST_COMPILATION = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # halves a toy's time


@pytest.fixture(scope="module")
def image_sets(cifar, tmp_path_factory) -> pathlib.Path:
    """What --data wants: CIFAR-10, and Tiny-ImageNet-200's 200 classes with 2 images each."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "cifar-10-batches-bin").symlink_to(cifar / "cifar-10-batches-bin")
    top = folder / "tiny-imagenet-200"
    annotations = ""
    for number, (image, label) in enumerate(colour_coded(500, 200, 64, 3)):
        name = f"n{label:08}"
        train = number < 400
        parent = top / "train" / name / "images" if train else top / "val" / "images"
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(parent / f"{number}.JPEG")
        annotations += "" if train else f"{number}.JPEG\t{name}\t0\t0\t9\t9\n"
    (top / "val" / "val_annotations.txt").write_text(annotations)
    return folder


def run(name, image_sets, workdir, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--toy", "--data", str(image_sets)]
    command += ["--data-note", NOTE, "--workdir", str(workdir), *options]
    env = os.environ | FAST_COMPILATION
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def result(name, image_sets, workdir, *options) -> dict:
    done = run(name, image_sets, workdir, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((workdir / f"{name}.json").read_text())
    assert content["toy"] is True
    assert content["command"].startswith(f"python -m benchmarks.{name} --minutes ")
    assert content["device"] == {"kind": "cpu", "count": 1, "hosts": 1}
    assert {"python", "jax", "flax"} <= content["versions"].keys()
    assert str(workdir) not in json.dumps(content)
    return content


def check_result(trained: dict, split: str, n: int) -> None:
    assert trained["step"] == 4
    assert (trained["eval"]["split"], trained["eval"]["n"]) == (split, n)
    assert 0 <= trained["eval"]["accuracy"] <= 1
    assert trained["images_per_second"] > 0
    assert 0 <= trained["data_wait_fraction"] <= 1
    assert trained["mfu"] is None  # nobody publishes a CPU's peak


@pytest.mark.slow
def test_tutorial_in_two_pieces(image_sets, tmp_path):
    first = run("tutorial", image_sets, tmp_path, "--minutes", "0.001")
    assert first.returncode == RESUMABLE, first.stderr
    assert "rerun the same command to resume" in first.stdout
    assert not (tmp_path / "tutorial.json").exists()

    content = result("tutorial", image_sets, tmp_path)
    assert content["pieces"] == 2
    assert content["data"] == [NOTE]
    check_result(content["figures"]["vit_scale"], "test[:1000]", 1000)
    assert content["figures"]["reference"]["test accuracy"] == 0.784
    assert content["fingerprint"] == listing.tutorial.MEASUREMENT.fingerprint


@pytest.mark.slow
def test_finetune(image_sets, tmp_path):
    content = result("finetune", image_sets, tmp_path)
    assert content["data"] == [NOTE, "Tiny-ImageNet-200"]
    figures = content["figures"]
    check_result(figures["pretraining"], "val", 100)
    (at_96,) = figures["fine-tuning"].values()
    for start in ("pretrained", "scratch"):
        check_result(at_96[start], "test[:500]", 500)
        assert at_96[start]["resolution"] == [96, 96]
    assert at_96["pretrained"]["eval"]["loss"] != at_96["scratch"]["eval"]["loss"]
    accuracy = {start: at_96[start]["eval"]["accuracy"] for start in ("pretrained", "scratch")}
    assert at_96["gain"] == accuracy["pretrained"] - accuracy["scratch"]

    pair = [json.loads((tmp_path / f"{s}-96/run.json").read_text())["config"] for s in accuracy]
    sources = [config["init"].pop("source") for config in pair]
    assert sources == [str(tmp_path / "pretrain"), ""]
    assert pair[0] == pair[1]


@pytest.mark.slow
def test_comparison(image_sets, tmp_path):
    figures = result("comparison", image_sets, tmp_path)["figures"]
    names = list(comparison.CONTENDERS)
    assert (
        [row["model"] for row in figures["table"]] == names == ["ViT", "hybrid", "CNN", "ResNet-18"]
    )
    for row in figures["table"]:
        trained = figures[row["model"]]
        check_result(trained, "test[:1000]", 1000)
        assert row["n"] == 1000
        assert row["loss"] == trained["eval"]["loss"]
        assert row["images_per_second"] > 0
    assert len({row["parameters"] for row in figures["table"]}) == 4


@pytest.mark.slow
def test_speed(image_sets, tmp_path):
    content = result("speed", image_sets, tmp_path)
    (case,) = content["figures"].values()
    ours = case["vit_scale"]
    rates = ours["images_per_second"]
    assert 0 < rates["min"] <= rates["median"] <= rates["max"]
    assert (ours["batch"], ours["turns"], ours["mfu"]) == (16, speed.TURNS, None)
    if case["timm"] is None:  # the tests need no torch
        assert "No module named" in case["absent"]["timm"]
        assert case["speed over timm's"] is None
    else:
        assert case["timm"]["images_per_second"]["min"] > 0
        assert case["timm"]["batch"] == 16
    trainer = case["vit-scale train on CIFAR-10"]
    assert trainer["images_per_second"] > 0
    assert 0 <= trainer["data_wait_fraction"] <= 1


class FakeContender:
    """What speed.compete talks to, without a process: turns that double in speed; no cuDNN here."""

    asked: list = []  # noqa: RUF012

    def __init__(self, module, arguments, seconds):
        assert module == "speed_contender"
        program = arguments[1:]
        if "model.attention=cudnn" in program:
            raise UserError("no such kernel")
        self.name, self.speed = program[0], 100.0 if program[0] == "timm" else 150.0
        steps = {"steps_per_turn": 4, "batch": 8, "parameters": 9}
        self.description = {"device": "NVIDIA H200", "versions": {self.name: "1"}, **steps}

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def ask(self, question):
        if question == "memory":
            return {"peak_memory_bytes": 7}
        self.asked.append(self.name)
        self.speed *= 2
        return {"images_per_second": self.speed}


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(speed, "Contender", FakeContender)
    monkeypatch.setattr(FakeContender, "asked", [])
    found = speed.compete(SimpleNamespace(toy=False), "S/16@224")
    assert FakeContender.asked == ["vit_scale", "timm"] * speed.TURNS
    assert found["timm"]["images_per_second"] == {"min": 200, "median": 1600, "max": 12800}
    # 6 FLOPs for each of ViT-S/16's 4.6 G multiply-accumulates (4.61 with a head of 1000).
    assert found["timm"]["mfu"] == pytest.approx(1600 * 6 * 4.60e9 / 989e12, rel=3e-3)
    assert found["timm"]["peak_memory_bytes"] == 7
    assert found["vit_scale, cudnn attention"] is None
    assert found["absent"] == {"vit_scale, cudnn attention": "no such kernel"}
    same = {"min": 1.5, "median": 1.5, "max": 1.5}
    assert found["speed over timm's"] == {"vit_scale": same}
    assert found["versions"] == {"vit_scale": "1", "timm": "1"}


def test_a_dead_contender_is_told_from_time_up():
    left = iter([9.0, -0.1])
    contender = Contender("speed_contender", ("vit_cifar", "timm"), lambda: next(left))
    dead = {"stdout": io.StringIO(""), "wait": lambda: -9, "kill": lambda: None}
    contender._process = SimpleNamespace(**dead)
    with pytest.raises(UserError, match="ended with -9"):
        contender._answer()
    with pytest.raises(measurement.TimeUp):
        contender._answer()


def test_work_of_another_version_is_not_continued(image_sets, tmp_path):
    (tmp_path / "pieces.json").write_text('{"of": "earlier", "toy": true, "seconds": [5.0]}')
    done = run("tutorial", image_sets, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "was begun with another script or config" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["pieces.json"]


def test_missing_data_is_one_line_and_no_result(tmp_path):
    done = run("tutorial", tmp_path / "nothing", tmp_path / "work")
    assert done.returncode == 1
    assert "CIFAR-10 is not in" in done.stderr
    assert not (tmp_path / "work" / "tutorial.json").exists()


def test_speed_is_the_median_of_all_rows(tmp_path):
    rows = [
        {"step": 1, "seconds": 3.0},
        {"step": 2, "images_per_second": 10.0, "data_wait_fraction": 0.5},
        {"step": 3, "images_per_second": 30.0, "data_wait_fraction": 0.1},
        {"step": 3, "eval/accuracy": 0.5},
        {"step": 4, "images_per_second": 20.0, "data_wait_fraction": 0.3},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines)
    expected = {"images_per_second": 20.0, "data_wait_fraction": 0.3, "mfu": None}
    assert measurement.speed(tmp_path) == expected


def test_listing_knows_new_measured_and_outdated(tmp_path):
    tutorial = listing.tutorial.MEASUREMENT
    assert listing.listing(tmp_path).count("no result yet") == len(listing.MEASUREMENTS)
    content = {"toy": False, "date": "2026-11-21", "device": {"kind": "NVIDIA H200"}}
    file = tmp_path / "tutorial.json"
    file.write_text(json.dumps({**content, "fingerprint": tutorial.fingerprint}))
    assert (
        listing.status(tutorial, tmp_path) == "result of 2026-11-21 on NVIDIA H200, tutorial.json"
    )
    file.write_text(json.dumps({**content, "fingerprint": "another"}))
    assert listing.status(tutorial, tmp_path).startswith("outdated")
    assert listing.listing(tmp_path).count("no result yet") == len(listing.MEASUREMENTS) - 1


def test_fingerprint_follows_script_and_config(tmp_path, monkeypatch):
    original = listing.tutorial.MEASUREMENT
    same, other = (
        measurement.Measurement("tutorial", "", {}, (config,), ("tutorial.py",))
        for config in ("vit_tutorial_cifar", "vit_tutorial_cifar:2")
    )
    assert same.fingerprint == original.fingerprint != other.fingerprint
    before = original.fingerprint
    (tmp_path / "tutorial.py").write_bytes((measurement.HERE / "tutorial.py").read_bytes() + b"\n")
    monkeypatch.setattr(measurement, "HERE", tmp_path)
    assert original.fingerprint != before


def test_listing_as_a_user_types_it():
    command = [sys.executable, "-m", "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for each in listing.MEASUREMENTS:
        assert f"{each.name}: " in done.stdout
        assert each.command in done.stdout


def test_committed_results_are_real_and_of_known_measurements():
    names = {each.name for each in listing.MEASUREMENTS}
    for file in measurement.RESULTS.glob("*"):
        content = json.loads(file.read_text())
        assert (file.suffix, content["measurement"], content["toy"]) == (".json", file.stem, False)
        assert file.stem in names


def test_the_macs_of_the_parts_add_up_to_those_of_the_block():
    parts = cpu_parts.parts("float32", 1)
    block, macs = parts["block"], {name: part.macs for name, part in parts.items()}
    assert macs["block"] == count_macs(block.function, block.parameters, block.inputs)
    assert macs["block"] == 4 * macs["projection"] + macs["attention"] + macs["MLP"]


@pytest.mark.slow
def test_parts_are_added_to_the_result_by_label(tmp_path):
    file = tmp_path / "cpu_parts.json"
    file.write_text('{"before": {}}')
    cpu_parts.main(["--label", "after", "--toy", "--out", str(file)])
    content = json.loads(file.read_text())
    assert list(content) == ["before", "after"] and content["after"]["toy"] is True
    rows = content["after"]["figures"]["float32"]
    unmeasured = {name for name, row in rows.items() if row["gflop_per_second"] is None}
    assert unmeasured == {"GELU", "LayerNorm", "dropout"}
    assert all(row["ms"] > 0 for row in rows.values())

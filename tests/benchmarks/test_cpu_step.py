"""The measurement of training steps on a CPU: with contenders that are made up, and a toy."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import cpu_step, speed_contender
from benchmarks.contender import Contender
from benchmarks.measurement import TimeUp
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.parameters import count

CASE_KEYS = [
    *("date", "toy", "processor", "cores", "versions", "turns", "contenders", "absent"),
    "speed over the best other",
]


def test_ratios_are_over_the_other_with_the_best_median():
    rates = {
        "vit_scale f32": [10.0, 30.0, 40.0],
        "vit_scale bf16": [5.0, 5.0, 5.0],
        "timm eager f32": [99.0, 1.0, 1.0],
        "big_vision f32": [5.0, 10.0, 80.0],
    }
    assert cpu_step.ratios(rates) == {
        "vit_scale f32": {"min": 0.5, "median": 2.0, "max": 3.0},
        "vit_scale bf16": {"min": 0.0625, "median": 0.5, "max": 1.0},
    }
    assert cpu_step.ratios({"vit_scale f32": [10.0]}) is None


class FakeContender:
    """What cpu_step.measure talks to, without a process; one is never ready, one dies later."""

    SPEEDS = {"vit_scale": 300.0, "timm_eager": 100.0, "big_vision": 200.0}  # noqa: RUF012
    asked: list = []  # noqa: RUF012

    def __init__(self, module, arguments, seconds, environment):
        assert module == "speed_contender"
        config_name, *program = arguments
        program = tuple(part for part in program if part != "--toy")
        self.case, self.program = config_name.partition(":")[2], program
        self.seconds, self.environment = seconds, environment
        steps = {"steps_per_turn": 4, "batch": 8, "parameters": 9}
        self.description = {"device": "cpu", "versions": {program[0]: "1"}, **steps}

    def __enter__(self):
        if self.program == ("timm_eager", cpu_step.BFLOAT16):
            raise UserError("one step takes 131 s")
        if self.program[0] == "timm":
            raise TimeUp(f"no answer within {self.seconds():g} s")
        return self

    def __exit__(self, *_): ...

    def ask(self, question):
        assert question == "turn"
        self.asked.append((self.case, self.program))
        if self.program == ("big_vision", cpu_step.BFLOAT16) and len(self.asked) > 5:
            raise UserError("ended with -9")
        return {"images_per_second": self.SPEEDS[self.program[0]]}


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(cpu_step, "Contender", FakeContender)
    monkeypatch.setattr(FakeContender, "asked", [])


def test_contenders_take_turns_and_who_cannot_is_absent(faked):
    figures = cpu_step.measure("tutorial", turns=3, deadline=7.0)
    assert list(figures) == CASE_KEYS
    programs = [program for _, program in FakeContender.asked]
    ours, eager = [("vit_scale",), ("vit_scale", cpu_step.BFLOAT16)], [("timm_eager",)]
    theirs = [("big_vision",), ("big_vision", cpu_step.BFLOAT16)]
    assert programs == 2 * [*ours, *eager, *theirs] + [*ours, *eager, *theirs[:1]]
    assert figures["absent"] == {
        "timm eager bf16": "one step takes 131 s",
        "timm compile f32": "no answer within 7 s",
        "timm compile bf16": "no answer within 7 s",
        "big_vision bf16": "ended with -9",
    }
    names = ["vit_scale f32", "vit_scale bf16", "timm eager f32", "big_vision f32"]
    assert list(figures["contenders"]) == names
    same = {"min": 1.5, "median": 1.5, "max": 1.5}
    assert figures["speed over the best other"] == dict.fromkeys(names[:2], same)
    # 6 FLOPs for each multiply-accumulate of 6 blocks, the embedding and the head.
    block = 65 * (4 * 256**2 + 2 * 256 * 512) + 2 * 65**2 * 256
    macs = 6 * block + 64 * 48 * 256 + 256 * 10
    assert figures["contenders"]["vit_scale f32"] == {
        "images_per_second": {"min": 300.0, "median": 300.0, "max": 300.0},
        "gflop_per_second": round(300 * 6 * macs / 1e9, 1),
        "parameters": 9,
        "steps_per_turn": 4,
    }
    assert figures["versions"] == {"vit_scale": "1", "timm_eager": "1", "big_vision": "1"}


def test_a_finished_case_is_kept(faked, tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "cpu_step.json"

    def options(label, *cases):
        return ["--label", label, "--case", *cases, "--out", str(file), "--turns", "1"]

    cpu_step.main(options("before", "tutorial"))
    cpu_step.main(options("after", "tutorial", "C+Ti/4"))
    lines = capsys.readouterr().out.splitlines()
    assert "tutorial, 1 turns" in lines and "C+Ti/4, 1 turns" in lines
    assert "timm eager bf16    absent: one step takes 131 s" in lines
    row = "300.0 (300.0 to 300.0) 392.8 1.50 (1.50 to 1.50)"  # see the sum above
    assert f"vit_scale f32 {row}" in [" ".join(line.split()) for line in lines]

    def interrupt(case, *_):
        if case == "Ti/16@224":
            raise KeyboardInterrupt
        return {"case": case}

    monkeypatch.setattr(cpu_step, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cpu_step.main(options("after", "Ti/4@32", "Ti/16@224"))
    content = json.loads(file.read_text())
    assert {label: list(cases) for label, cases in content.items()} == {
        "before": ["tutorial"],
        "after": ["tutorial", "C+Ti/4", "Ti/4@32"],
    }


def test_a_contender_that_is_not_ready_in_time_is_killed():
    contender = Contender("speed_contender", ("vit_cifar", "timm"), lambda: 0.1)
    contender._command = [sys.executable, "-c", "input()"]
    with pytest.raises(TimeUp, match=r"no answer within 0\.1 s"), contender:
        pass
    assert contender._process.returncode == -9


@pytest.mark.parametrize("seconds, trained", [(0.5, [1, 1, 10, 3]), (4.0, [1, 1, 2, 3])])
def test_warm_up_of_a_slow_program_is_shorter(monkeypatch, seconds, trained):
    program, steps = slow_program(monkeypatch, seconds)
    assert speed_contender.warm_up(program, 10) == seconds
    assert steps == trained


def test_a_hopeless_program_is_refused_after_two_steps(monkeypatch):
    program, steps = slow_program(monkeypatch, 131.0)
    with pytest.raises(UserError, match=r"^one step takes 131 s$"):
        speed_contender.warm_up(program, 10)
    assert steps == [1, 1]


def slow_program(monkeypatch, seconds: float):
    """A program whose steps take so long by a clock of their own, and the list of what it did."""
    done: list[int] = []
    clock = SimpleNamespace(perf_counter=lambda: seconds * sum(done))
    monkeypatch.setattr(speed_contender, "time", clock)
    return speed_contender.Program(done.append, lambda: None, {}), done


def test_big_vision_refuses_a_hybrid():
    hybrid = config.load(f"{cpu_step.CONFIG}:C+Ti/4")
    with pytest.raises(UserError, match="big_vision has no ViT with a convolutional stem"):
        speed_contender.big_vision(hybrid)


def test_the_cases_are_the_models_that_they_name():
    sizes = {}
    for case, batch in cpu_step.BATCH.items():
        cfg = config.load(f"{cpu_step.CONFIG}:{case}")
        model = build(cfg.model, config.image_size(cfg))
        sizes[case] = count(model.abstract_params), model.shape.tokens, cfg.optim.clip
        assert (cfg.data.batch, cfg.model.classes, cfg.model.scan) == (batch, 10, False)
        assert (cfg.model.dtype, cfg.optim.weight_decay) == ("float32", 0.05)
    assert sizes == {
        "tutorial": (3_194_890, 65, 1.0),
        "Ti/4@32": (5_362_570, 65, 0.0),
        "Ti/16@224": (5_526_154, 197, 0.0),
        "C+Ti/4": (632_138, 65, 0.0),
    }


@pytest.mark.slow
def test_a_toy(tmp_path):
    file = tmp_path / "cpu_step.json"
    cpu_step.main(["--label", "toy", "--toy", "--turns", "3", "--out", str(file)])
    content = json.loads(file.read_text())
    assert list(content["toy"]) == ["tutorial"]
    figures = content["toy"]["tutorial"]
    assert list(figures) == CASE_KEYS
    assert (figures["toy"], figures["turns"], figures["absent"]) == (True, 3, {})
    assert figures["speed over the best other"] is None
    (ours,) = figures["contenders"].values()
    rates = ours["images_per_second"]
    assert 0 < rates["min"] <= rates["median"] <= rates["max"]
    assert ours["steps_per_turn"] == 2
    assert {"jax", "flax"} <= figures["versions"].keys()

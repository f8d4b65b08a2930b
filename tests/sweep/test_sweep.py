"""sweep: which runs are trained how far, what fails, and what is said of the best."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from tests.laws.test_laws import final_state, losses, same_bits
from vit_scale import cli, config, sweep
from vit_scale.errors import UserError
from vit_scale.inspect.plots.canvas import rasterize
from vit_scale.inspect.plots.sweep import plot_sweep
from vit_scale.runs.json_files import write_json
from vit_scale.runs.lock import Lock
from vit_scale.sweep import definition, processes, slots
from vit_scale.sweep.slots import Slot, make_slots

FAKE = pathlib.Path(__file__).with_name("fake_train.py")
GOLDEN = pathlib.Path(__file__).parent.parent / "golden/weights/huggingface"
FIELDS = (
    "steps=40",
    "optim.warmup=0",
    "eval.every=10",
    "eval.split=train[98%:]",
    "data.train=train[:98%]",
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Sweep learning rates without training; return (result, folder)."""
    monkeypatch.setattr(processes, "TRAIN", (sys.executable, str(FAKE)))
    monkeypatch.setattr(processes, "POLL", 0.01)

    def start(*rates, keep=None, parallel=1, config="vit_imagenet:S/16", fields=FIELDS):
        points = [{"optim.lr": rate} for rate in rates]
        one = sweep.Sweep(config, fields, points, tmp_path / "sweep", keep)
        return sweep.run_sweep(one, parallel, quiet=True), one

    return start


def calls(folder: pathlib.Path) -> dict[str, list[str]]:
    """What was trained: {name: its calls' --until, or "end"}."""
    return {
        file.parent.name: [
            line.split("--until ")[1] if "--until" in line else "end"
            for line in file.read_text().splitlines()
        ]
        for file in folder.glob("*/calls.txt")
    }


def test_all_runs_are_trained_and_ranked(run):
    result, one = run("1", "3", "2")
    assert [row["name"] for row in result["runs"]] == ["optim.lr=3", "optim.lr=2", "optim.lr=1"]
    assert result["best"] == "optim.lr=3" and result["measure"] == "accuracy"
    assert result["runs"][0] | {"name": ""} == {
        "name": "", "point": {"optim.lr": "3"}, "step": 40, "result": 1 - 1 / 41, "n": 500,
        "status": "finished",
    }  # fmt: skip
    assert calls(one.folder) == {f"optim.lr={rate}": ["end"] for rate in "132"}
    assert json.loads((one.folder / "sweep.json").read_text()) == result
    table = sweep.format_sweep(result).splitlines()
    assert table[0].split() == ["optim.lr", "step", "accuracy", "n", "status"]
    assert table[1].split() == ["3", "40", "97.56", "%", "500", "finished"]
    lines = sweep.describe_best(one, result)
    assert lines[1] == "on test: accuracy 50.00 %, n 10"
    assert lines[2].startswith("vit-scale train --config vit_imagenet:S/16 --config.steps=40 ")
    run("1", "3", "2")
    assert calls(one.folder)["optim.lr=1"] == ["end"], "what is finished is not trained again"
    again, _ = run("1", "3", "2", "4")
    assert len(again["runs"]) == 4, "points may be added"


def test_successive_halving_trains_the_better_half_on(run):
    result, one = run("0", "1", "2", "3", keep=2)
    assert result["rungs"] == [10, 20, 40]
    assert calls(one.folder) == {
        "optim.lr=0": ["10"],
        "optim.lr=1": ["10"],
        "optim.lr=2": ["10", "20"],
        "optim.lr=3": ["10", "20", "end"],
    }
    shown = [(row["point"]["optim.lr"], row["step"], row["status"]) for row in result["runs"]]
    assert shown == [
        ("3", 40, "finished"), ("2", 20, "stopped"), ("1", 10, "stopped"), ("0", 10, "stopped"),
    ]  # fmt: skip
    assert run("0", "1", "2", "3", keep=2)[0] == result
    assert calls(one.folder)["optim.lr=2"] == ["10", "20"]


def test_a_run_that_diverges_or_fails_ranks_last(run, capsys):
    result, one = run("9", "1", "8", "3")
    status = {row["point"]["optim.lr"]: row["status"] for row in result["runs"]}
    assert status == {
        "3": "finished", "1": "finished", "9": "diverged",
        "8": "failed: something is wrong (exit code 1)",
    }  # fmt: skip
    assert result["best"] == "optim.lr=3"
    assert [row["result"] for row in result["runs"][2:]] == [None, None]
    code = cli.main([
        "sweep", "--config", "vit_imagenet:S/16", *(f"--config.{field}" for field in FIELDS),
        "--grid", "optim.lr=9,1,8,3", "--workdir", str(one.folder),
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 1 and "1 of 4 runs failed, the first optim.lr=8; see" in err
    assert "diverged" in out and f"best: {one.folder / 'optim.lr=3'}" in out
    assert (one.folder / "sweep.png").stat().st_size > 10_000


def test_a_run_that_stops_resumably_stops_the_sweep(run):
    with pytest.raises(UserError, match=r"run optim.lr=7 stopped: the disk is full") as caught:
        run("7", "3")
    assert caught.value.code == 42
    result, one = run("7", "3")
    assert [row["status"] for row in result["runs"]] == ["finished", "finished"]
    assert calls(one.folder) == {"optim.lr=7": ["end", "end"], "optim.lr=3": ["end"]}


def test_an_interrupted_sweep_stops_its_runs(run, tmp_path):
    ready = tmp_path / "sweep" / "optim.lr=6" / "ready"

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run("6", "3")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 30, "the run sleeps for 60 s unless it gets SIGTERM"
    assert calls(tmp_path / "sweep") == {"optim.lr=6": ["end"]}


def test_a_rung_without_its_evaluation_is_evaluated(run):
    """Stopped after the checkpoint was saved: the same command evaluates it first."""
    result, one = run("0", "3", keep=2)
    rows = one.folder / "optim.lr=0" / "metrics.jsonl"
    rows.write_text("")
    assert run("0", "3", keep=2)[0] == result
    assert calls(one.folder)["optim.lr=0"] == ["20", "20"]


def test_a_run_that_another_process_trains_stops_the_sweep(run):
    with pytest.raises(UserError, match=r"optim\.lr=5 stopped: workdir x is in use by process 7"):
        run("5", "3")


def test_one_sweep_at_a_time(run, tmp_path):
    held = Lock(tmp_path / "sweep")
    held.acquire()
    try:
        with pytest.raises(UserError, match="is in use by process"):
            run("1")
    finally:
        held.release()
    assert not calls(tmp_path / "sweep")


def test_what_is_trained_is_compared_without_training(run, capsys):
    result, one = run("1", "3")
    flags = [f"--config.{field}" for field in FIELDS]
    words = ["sweep", "--config", "vit_imagenet:S/16", *flags, "--workdir", str(one.folder)]
    assert cli.main([*words, "--grid", "optim.lr=1,3,2", "--compare", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["runs"][:2] == result["runs"]
    assert (compared["runs"][2]["status"], compared["runs"][2]["step"]) == ("waiting", 0)
    assert calls(one.folder).keys() == {"optim.lr=1", "optim.lr=3"}
    words[-1] = str(one.folder / "mistyped")
    assert cli.main([*words, "--grid", "optim.lr=1,3,2", "--compare"]) == 1
    assert "mistyped has none of these runs: give the sweep's --workdir" in capsys.readouterr().err
    assert not (one.folder / "mistyped").exists()


def test_runs_that_are_under_way_are_compared_by_their_newest_result(run, tmp_path):
    one = run("0", "3", "2", "1", keep=2)[1]
    for name, last in (("optim.lr=3", 30), ("optim.lr=2", 20)):
        rows = (one.folder / name / "metrics.jsonl").read_text().splitlines()[: last // 10]
        (one.folder / name / "metrics.jsonl").write_text("\n".join(rows))
        (one.folder / name / "report.json").unlink(missing_ok=True)
    held = Lock(one.folder)
    held.acquire()  # as the sweep does
    try:
        compared = sweep.run_sweep(one, quiet=True, train=False)
    finally:
        held.release()
    rows = [(row["name"], row["step"], row["status"]) for row in compared["runs"]]
    assert rows[:2] == [("optim.lr=3", 30, "not finished"), ("optim.lr=2", 20, "not finished")]
    assert [step for _, step, _ in rows[2:]] == [10, 10] and compared["best"] is None


def test_a_run_of_another_config_is_refused(run):
    _, one = run("1")
    cfg = config.load("vit_imagenet:S/16", [*FIELDS, "optim.lr=1", "optim.weight_decay=.7"])
    stored = {"name": "x", "config": config.to_json(cfg)}
    write_json(one.run_folder({"optim.lr": "1"}) / "run.json", stored)
    with pytest.raises(UserError, match=r"different config \(optim.weight_decay: 0\.7 -> "):
        run("1", "3")
    assert "optim.lr=3" not in calls(one.folder)


def test_a_run_that_dies_without_a_word_is_not_blamed_on_an_earlier_one(run, tmp_path):
    logs = tmp_path / "sweep" / "logs"
    logs.mkdir(parents=True)
    (logs / "optim.lr=11.txt").write_text("vit-scale: workdir x is in use by process 7\n")
    result, _ = run("11", "3")
    assert result["runs"][1]["status"] == "failed: no output (killed by SIGKILL)"


def test_an_architecture_of_the_weights_is_swept(monkeypatch, tmp_path):
    read = []
    real = definition.with_source_model
    monkeypatch.setattr(definition, "with_source_model", lambda cfg: read.append(1) or real(cfg))
    fields = ["model.variant=source", f"init.source={GOLDEN}", "data.resolution=12"]
    points = [{"optim.lr": rate} for rate in ("1e-3", "1e-2")]
    one = sweep.Sweep("vit_cifar:S/16", fields, points, tmp_path / "sweep")
    assert [cfg.optim.lr for cfg in sweep.check(one)] == [1e-3, 1e-2] and len(read) == 1
    with pytest.raises(UserError, match="image height 13 is not divisible by"):
        sweep.check(one._replace(overrides=[*fields, "data.resolution=13"]))


def test_runs_side_by_side_have_their_own_slots(run, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    monkeypatch.setattr(slots, "count_devices", lambda: ("cpu", 1))
    _, one = run("4", "3", parallel=2)
    used = [json.loads((one.run_folder(p) / "slot.json").read_text()) for p in one.points]
    assert [slot["cores"] for slot in used] == [cores[0::2], cores[1::2]]
    assert sorted(os.sched_getaffinity(0)) == cores
    monkeypatch.setattr(slots, "count_devices", lambda: ("gpu", 2))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, one = run("2", "1", parallel=2)
    used = [json.loads((one.run_folder(p) / "slot.json").read_text()) for p in one.points]
    assert [slot["gpus"] for slot in used] == ["0", "1"]


def test_runs_side_by_side_share_the_cores(run, monkeypatch):
    monkeypatch.setattr(slots, "count_devices", lambda: ("cpu", 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7})
    assert make_slots(2) == [Slot({}, frozenset({2, 5})), Slot({}, frozenset({3, 7}))]
    with pytest.raises(UserError, match="--parallel 5 is more than this machine's 4 cores"):
        make_slots(5)
    monkeypatch.undo()


def test_accelerators_are_divided_evenly(monkeypatch):
    monkeypatch.setattr(slots, "count_devices", lambda: ("gpu", 4))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot.variables["CUDA_VISIBLE_DEVICES"] for slot in make_slots(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [slot.variables["CUDA_VISIBLE_DEVICES"] for slot in make_slots(4)] == [*"4567"]
    with pytest.raises(UserError, match="--parallel 3 does not divide this machine's 4 gpu dev"):
        make_slots(3)
    monkeypatch.setattr(slots, "count_devices", lambda: ("tpu", 4))
    first, second = make_slots(2)
    assert first.variables == {
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1", "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_VISIBLE_DEVICES": "0,1",
    }  # fmt: skip
    assert second.variables["TPU_VISIBLE_DEVICES"] == "2,3"
    assert make_slots(1) == [Slot({})]


@pytest.mark.parametrize(
    ("name", "fields", "keep", "message"),
    [
        ("quickstart", (), None, "is several runs: sweep one of quickstart:pretrain, "),
        (
            "vit_imagenet:S/16",
            ("eval.split=",),
            None,
            "must be held out .*eval.split='', eval.final='val'",
        ),
        (
            "vit_imagenet:S/16",
            (*FIELDS, "eval.split=val", "eval.final=val"),
            None,
            "must be held out",
        ),
        ("vit_imagenet:S/16", (*FIELDS, "data.train=train"), None, "must be held out"),
        ("vit_imagenet:S/16", (*FIELDS, "eval.final=train[99%:]"), None, "must be held out"),
        ("vit_imagenet:S/16", (*FIELDS, "model.heads=5"), None, "not divisible by 5 heads"),
        ("vit_imagenet:S/16", (*FIELDS, "optim.b2=1."), None, "optim.b2=1.0 must be"),
        ("vit_imagenet:S/16", (*FIELDS, "eval.every=40"), 2, "eval.every=40 is too rare"),
    ],
)
def test_a_config_that_can_not_be_swept_is_refused(run, tmp_path, name, fields, keep, message):
    with pytest.raises(UserError, match=message):
        run("1", "2", keep=keep, config=name, fields=fields)
    assert not (tmp_path / "sweep").exists()


def test_the_same_run_twice_is_refused(run):
    with pytest.raises(UserError, match=r"optim\.lr=1e-1 and optim\.lr=0\.1 are the same run"):
        run("1e-1", "0.1")


def test_another_sweep_in_the_same_folder_is_refused(run):
    folder = run("1")[1].folder
    with pytest.raises(UserError, match=r"holds another sweep \(overrides: .*eval.every=20"):
        run("1", fields=[*FIELDS, "eval.every=20"])
    other = sweep.Sweep(
        "vit_imagenet:S/16", [*FIELDS, "eval.every=20"], [{"optim.lr": "1"}], folder
    )
    with pytest.raises(UserError, match="holds another sweep"):
        sweep.run_sweep(other, quiet=True, train=False)


def test_the_picture_shows_runs_and_fields():
    points = [{"optim.lr": "1e-3", "model.pool": "gap"}, {"optim.lr": "1e-1", "model.pool": "cls"}]
    curves = [([10, 20], [0.5, 0.7]), ([10], [0.2])]
    figure = plot_sweep(curves, ["a", "b"], points, [0.7, None], "accuracy", True, "two runs")
    curve, rates, pools, empty = figure.axes
    assert [list(line.get_ydata()) for line in curve.lines] == [[0.5, 0.7], [0.2]]
    assert rates.get_xscale() == "log" and rates.get_xlabel() == "optim.lr"
    assert rates.collections[0].get_offsets().tolist() == [[1e-3, 0.7]]
    assert [text.get_text() for text in pools.get_xticklabels()] == ["cls", "gap"]
    assert pools.collections[0].get_offsets().tolist() == [[1.0, 0.7]]
    assert not empty.axison and rasterize(figure).std() > 5


def test_a_swept_run_equals_the_same_run_by_hand(cifar, tmp_path):
    """With real processes: two runs up to the rung, the better one to its end."""
    fields = [
        *("model.variant=Ti/16", "model.width=16", "model.depth=1", "model.heads=2"),
        *("model.mlp=16", "model.pool=gap", "data.batch=16", "data.workers=0", "eval.batch=64"),
        *("eval.split=train[49936:]", "eval.final=test[:64]", "eval.every=2", "steps=4"),
        *("optim.warmup=0", "log.every=1", "log.images=0"),
        *("log.wandb=false", "log.tensorboard=false", f"data.path={cifar}"),
    ]
    points = [{"optim.lr": "1e-3"}, {"optim.lr": "0"}]
    one = sweep.Sweep("vit_tutorial_cifar", fields, points, tmp_path / "sweep", keep=2)
    result = sweep.run_sweep(one, quiet=True)
    assert [row["status"] for row in result["runs"]] == ["finished", "stopped"]
    best = one.folder / result["best"]
    (point,) = [row["point"] for row in result["runs"] if row["name"] == result["best"]]
    arguments = sweep.train_arguments(one.config, fields, point, tmp_path / "hand")
    assert cli.main(["train", "--quiet", *arguments]) == 0
    same_bits(final_state(best), final_state(tmp_path / "hand"))
    assert losses(best) == losses(tmp_path / "hand")

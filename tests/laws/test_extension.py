"""A run that is extended, or stopped on the way, equals one that had all its steps at once."""

import json
import pathlib
import re
from collections.abc import Iterable

import pytest

from tests.laws.test_laws import final_state, losses, same_bits
from vit_scale import checkpoint, config
from vit_scale.errors import UserError
from vit_scale.runs import extension, rollbacks
from vit_scale.training import trainer

SIZES = (
    *("model.variant=Ti/8", "model.width=16", "model.depth=1", "model.heads=2", "model.mlp=16"),
    *("model.classes=10", "model.dropout=.1", "data.name=cifar10", "data.resolution=32"),
    *("data.batch=16", "eval.batch=64", "augment.crop=pad", "augment.flip=true"),
    *("optim.lr=.01", "optim.warmup=2", "optim.ema=.9", "optim.schedule=constant"),
    *("eval.split=train[98%:]", "data.train=train[:98%]", "eval.every=0", "eval.final="),
    *("log.every=1", "log.images=0", "log.wandb=false", "log.tensorboard=false"),
)


@pytest.fixture
def train(cifar, tmp_path):
    """Train in the folder `name` with further fields, for a number of steps."""

    def run(name: str, steps: int, *fields: str, until: int | None = None) -> pathlib.Path:
        overrides = [*SIZES, f"data.path={cifar}", f"steps={steps}", *fields]
        cfg = config.override(config.base(), overrides)
        trainer.train(cfg, tmp_path / name, "run", quiet=True, until=until)
        return tmp_path / name

    return run


WAYS = {  # fields of the first training, and of the longer one
    "constant": ((), ()),
    "rsqrt": (("optim.schedule=rsqrt",), ("optim.schedule=rsqrt",)),
    "wsd": (("optim.cooldown=2",), ("optim.cooldown=3", "optim.cooldown_shape=sqrt")),
    "a cool-down is added": ((), ("optim.cooldown=2",)),
}


def others_slow(names: Iterable[str], quick: str) -> list:
    """Return the cases, of which all but one are slow."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("way", others_slow(WAYS, "wsd"))
def test_an_extended_run_equals_a_longer_one(train, way, capfd):
    first, then = WAYS[way]
    run = train("run", 6, *first)
    shorter, old = final_state(run), json.loads((run / "report.json").read_text())
    train("run", 9, *then)
    assert "extending" in capfd.readouterr().err
    whole = train("whole", 9, *then)
    same_bits(final_state(run), final_state(whole))
    assert losses(run) == losses(whole)
    reports = [json.loads((one / "report.json").read_text()) for one in (run, whole)]
    for one in reports:
        del one["seconds"], one["images_per_second"]
    assert reports[0] == reports[1], "the best step too is one that the longer run measured"
    archive = run / "extended" / "6"
    assert json.loads((archive / "report.json").read_text()) == old
    if way == "wsd":  # the cooled-down model is a run of its own
        same_bits(final_state(archive), shorter)
        assert checkpoint.finished_steps(run)[0] == 6, "that of step 4 made way to the new one"
    train("run", 9, *then)  # and it is finished
    assert len(losses(run)) == 9


def test_rollbacks_of_what_is_undone_are_forgotten(train):
    run = train("run", 6, "optim.cooldown=2")
    past = [rollbacks.Rollback(1, 2), rollbacks.Rollback(4, 5)]
    rollbacks.write(run, past)
    description = json.loads((run / "run.json").read_text())
    description["config"]["steps"] = 9
    extension.extend(run, description)
    assert rollbacks.read(run) == past[:1]
    assert rollbacks.read(run / "extended" / "6") == past
    (run / "run.json").write_bytes((run / "extended" / "6" / "run.json").read_bytes())
    extension.extend(run, description)  # interrupted before run.json was written: done again
    assert rollbacks.read(run / "extended" / "6") == past


def test_other_data_is_refused(train):
    run = train("run", 3, until=1)
    stored = (run / "run.json").read_text()
    description = json.loads(stored)
    description["config"]["steps"] = 9
    description["classes"] = description["classes"][::-1]
    with pytest.raises(UserError, match="different classes"):
        extension.extend(run, description)
    description["classes"] = description["classes"][::-1]
    description["data"]["sets"]["train"]["images"] += 1
    with pytest.raises(UserError, match="began with different data"):
        extension.extend(run, description)
    assert (run / "run.json").read_text() == stored


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ((), []),
        (("optim.schedule=rsqrt", "augment.until=0."), []),
        (("optim.schedule=linear",), ["optim.schedule=linear"]),
        (("optim.schedule=piecewise",), ["optim.schedule=piecewise"]),
        (("optim.weight_decay=.1", "optim.weight_decay_end=.1"), []),
        (("optim.weight_decay_end=.2",), ["optim.weight_decay_end=0.2"]),
        (("dino.momentum_end=1.",), []),
        (("objective=dino",), ["dino.momentum_end=1.0"]),
        (("objective=dino", "dino.momentum_end=.996"), []),
    ],
)
def test_what_depends_on_the_number_of_steps(fields, reasons):
    cfg = config.override(config.base(), ["optim.schedule=constant", *fields])
    assert extension.depending_on_steps(cfg) == reasons


@pytest.mark.parametrize("stage", others_slow(("copied", "moved", "unlinked"), "moved"))
def test_an_interrupted_extension_is_completed(train, stage, monkeypatch):
    run = train("run", 6, "optim.cooldown=2")

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    target = {
        "copied": (extension.files, "move_folder"),
        "moved": (pathlib.Path, "unlink"),
        "unlinked": (extension, "write_json"),
    }[stage]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*target, interrupted)
        train("run", 9, "optim.cooldown=2")
    train("run", 9, "optim.cooldown=2")
    whole = train("whole", 9, "optim.cooldown=2")
    same_bits(final_state(run), final_state(whole))
    assert (run / "extended" / "6" / "report.json").exists()
    assert checkpoint.finished_steps(run / "extended" / "6") == [6]
    again = run / "extended" / "9" / "checkpoints" / "9"  # of an extension that did not end
    again.mkdir(parents=True)
    (again / "part").touch()
    train("run", 12, "optim.cooldown=2")
    assert checkpoint.finished_steps(run / "extended" / "9") == [9]


def test_what_depends_on_the_number_of_steps_is_not_extended(train):
    run = train("run", 3, "optim.schedule=cosine", "augment.until=.5", until=1)
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*.json*")}
    message = (
        "holds a run of 3 steps, which can't be extended to 5: with optim.schedule=cosine, "
        "augment.until=0.5 its first steps depend on their number"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        train("run", 5, "optim.schedule=cosine", "augment.until=.5")
    with pytest.raises(UserError, match=r"different config \(.*steps: 3 -> 2\)"):
        train("run", 2, "optim.schedule=cosine", "augment.until=.5", "optim.warmup=1")
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_only_the_steps_may_change(train):
    train("run", 3, until=1)
    with pytest.raises(UserError, match=r"different config \(optim.lr: 0.01 -> 0.02\)"):
        train("run", 5, "optim.lr=.02")


def test_a_cooldown_whose_beginning_is_not_stored_is_not_extended(train):
    run = train("run", 4)
    with pytest.raises(UserError, match=r"no checkpoint up to step 3, .*the first is of step 4"):
        train("run", 5, "optim.cooldown=2")
    assert checkpoint.finished_steps(run) == [4] and (run / "report.json").exists()


def test_a_run_stopped_at_a_step_equals_an_undisturbed_one(train):
    run = train("run", 6, "optim.schedule=cosine", "eval.every=2", until=4)
    assert not (run / "report.json").exists()
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
    assert checkpoint.read_selection(run / "checkpoints" / "4")["n"] > 0
    train("run", 6, "optim.schedule=cosine", "eval.every=2", until=3)  # it is past that
    with pytest.raises(UserError, match="until=0 must be at least 1"):
        train("run", 6, "optim.schedule=cosine", "eval.every=2", until=0)
    assert checkpoint.finished_steps(run)[-1] == 4
    train("run", 6, "optim.schedule=cosine", "eval.every=2")
    whole = train("whole", 6, "optim.schedule=cosine", "eval.every=2")
    same_bits(final_state(run), final_state(whole))
    assert losses(run) == losses(whole)

"""The guarantees of docs/design.md on one process: resuming, fine-tuning, evaluation.

Several devices and hosts: test_mesh.py. That every option has an effect: test_switches.py.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scale import checkpoint, cli, config, pretrained
from vit_scale.data import InMemory
from vit_scale.distributed.mesh import make_mesh
from vit_scale.models.build import build
from vit_scale.models.parameters import named, unstack
from vit_scale.training import trainer
from vit_scale.training.evaluator import Evaluate
from vit_scale.training.setup import make_setup

ROOT = pathlib.Path(__file__).resolve().parents[2]


# Everything that draws random numbers or keeps state from step to step is on.
TINY = {
    "data.batch": 32,
    "model.variant": "Ti/8",
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.mlp": 16,
    "model.dropout": 0.2,
    "model.drop_path": 0.2,
    "augment.mixup": 0.5,
    "augment.cutmix": 0.5,
    "augment.smoothing": 0.1,
    "optim.schedule": "cosine",
    "optim.warmup": 2,
    "optim.lr": 0.003,
    "optim.ema": 0.9,
    "eval.split": "",
    "eval.final": "test[:64]",
    "eval.batch": 64,
    "log.every": 1,
    "log.images": 0,
    "log.wandb": False,
    "log.tensorboard": False,
}
STEPS, EVERY = 10, 4


def command(workdir, **fields) -> list[str]:
    """`train` of the tutorial's config, made tiny, with fields such as data__path=..."""
    given = TINY | {name.replace("__", "."): value for name, value in fields.items()}
    overrides = [f"--config.{name}={value}" for name, value in given.items()]
    return ["train", "--config", "vit_tutorial_cifar", *overrides, "--workdir", str(workdir)]


def settings(cifar, **fields) -> dict:
    return {"data__path": cifar, "steps": STEPS, "checkpoint__every": EVERY, **fields}


def final_state(run: pathlib.Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint: parameters, optimizer state, average."""
    (*_, step) = checkpoint.finished_steps(run)
    folder = run / "checkpoints" / str(step)
    cfg = config.from_json(checkpoint.read_description(folder)["config"])
    state = make_setup(cfg).state._asdict()
    target = {name: tree for name, tree in state.items() if name != "step" and tree is not None}
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint.read(folder, target))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].tobytes() != right[name].tobytes()]
    assert not different


def rows(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def report(run: pathlib.Path) -> dict:
    return json.loads((run / "report.json").read_text())


def losses(run: pathlib.Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows(run) if "train/loss" in row]


@pytest.fixture(scope="module")
def whole(cifar, tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main([*command(run, **settings(cifar)), "--quiet"]) == 0
    return run


# Laws 1 and 4: killed is the same as never killed


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would cost too much."""


def stop_before(step: int, patch: pytest.MonkeyPatch) -> None:
    """End the next training in this process when it is about to compute step `step`."""
    count, shard_batch = iter(range(10**6)), trainer.shard_batch

    def put(batch, mesh, size):
        if next(count) == step and np.ndim(batch["mask"]):
            raise Killed
        return shard_batch(batch, mesh, size)

    patch.setattr(trainer, "shard_batch", put)


def test_the_undisturbed_run_trains_at_every_step(whole):
    assert [step for step, _ in losses(whole)] == list(range(1, STEPS + 1))
    # The head starts at zero, and so does the warm-up: the second loss may be the first.
    assert len({loss for _, loss in losses(whole)}) >= STEPS - 1
    state = final_state(whole)
    assert {name[:9] for name in state} == {"['params'", "['opt_sta", "['ema']['"}
    assert not np.array_equal(state["['params']['cls']"], state["['ema']['cls']"])


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="no-checkpoint", marks=pytest.mark.slow),
        pytest.param(4, id="at-checkpoint", marks=pytest.mark.slow),
        pytest.param(7, id="after-it"),
    ],
)
def test_stopped_and_resumed_is_bit_for_bit_the_undisturbed_run(step, whole, cifar, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_before(step, patch)
        with pytest.raises(Killed):
            cli.main([*command(run, **settings(cifar)), "--quiet"])
    assert checkpoint.finished_steps(run) == ([4] if step >= 4 else [])
    assert not (run / "report.json").exists()
    assert cli.main([*command(run, **settings(cifar)), "--quiet"]) == 0
    same_bits(final_state(run), final_state(whole))
    assert losses(run) == losses(whole)  # each row once, with the same numbers


def test_adapters_stopped_and_resumed_beside_a_base_that_is_stored_once(whole, cifar, tmp_path):
    fields = settings(cifar, init__source=whole, lora__rank=2, steps=6, checkpoint__every=3)
    # What takes long to compile is off.
    fields |= {"augment__mixup": 0.0, "augment__cutmix": 0.0, "eval__final": ""}
    expected, run = tmp_path / "expected", tmp_path / "run"
    assert cli.main([*command(expected, **fields), "--quiet"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_before(5, patch)
        with pytest.raises(Killed):
            cli.main([*command(run, **fields), "--quiet"])
    assert checkpoint.finished_steps(run) == [3]
    assert cli.main([*command(run, **fields), "--quiet"]) == 0
    same_bits(final_state(run), final_state(expected))
    assert losses(run) == losses(expected)
    base, saved = (
        {name.partition("/")[2] for name in checkpoint.read_manifest(run / folder)["arrays"]}
        for folder in ("base/0", "checkpoints/6")
    )
    adapters = {
        f"blocks/{layer}/attention/{kernel}/{leaf}"
        for layer in (0, 1)
        for kernel in ("query", "value")
        for leaf in ("lora_a", "lora_b")
    }
    assert {name for name in saved if name[0] != "i"} == {"head/kernel", "head/bias", *adapters}
    source, model = pretrained.load_model(whole), pretrained.load_model(run)
    before, after = named(source.params), named(model.params)
    assert base == before.keys() - saved and model.cfg.lora.rank == 0
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    merged = {f"{name.rpartition('/')[0]}/kernel" for name in adapters}
    assert before.keys() == after.keys() and changed == {"head/kernel", "head/bias", *merged}


@pytest.mark.slow
def test_a_damaged_best_checkpoint_does_not_end_a_run(cifar, tmp_path, capsys):
    """It is older than the newest, so that training itself never reads it."""
    run = tmp_path / "run"
    fields = settings(cifar, eval__split="test[64:96]", eval__every=EVERY)
    assert cli.main([*command(run, **fields), "--quiet"]) == 0
    (run / "report.json").unlink()  # as if it had been killed before the final evaluation
    with checkpoint.Checkpoints(run) as checkpoints:
        checkpoints.record(8, {"accuracy": 1.0})
    best = run / "checkpoints" / "8"
    shutil.copytree(run, tmp_path / "sound")
    for file in (best / "ema").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])
    assert cli.main([*command(run, **fields), "--quiet"]) == 0
    assert f"checkpoint {best} is damaged or of a different model" in capsys.readouterr().err
    assert (run / "damaged" / "8").is_dir() and 8 not in checkpoint.finished_steps(run)
    result = report(run)["eval"]
    assert result["best"]["step"] == result["step"] == STEPS
    assert cli.main([*command(tmp_path / "sound", **fields), "--quiet"]) == 0
    assert report(tmp_path / "sound")["eval"]["best"]["step"] == 8


def kill_at_random(arguments: Sequence[str], ready, delay: float, cwd: pathlib.Path) -> None:
    """Start `vit-scale`, and SIGKILL it `delay` seconds after `ready()` first holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vit_scale.cli", *map(str, arguments)],
        cwd=cwd,
        # A killed process may leave a half-written program in the cache, for itself alone.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cwd / "xla")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not ready():
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.005)
        time.sleep(delay)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def undisturbed(folder: pathlib.Path, fields: dict) -> pathlib.Path:
    """A run in `folder` from start to end; `kill_at_random` starts with what it compiled."""
    run = folder / "undisturbed"
    assert cli.main([*command(run, **fields), "--quiet"]) == 0
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"]
    shutil.copytree(compiled, folder / "xla", copy_function=os.symlink)
    return run


@pytest.mark.slow  # of the short tests, test_soak.py does the same to a smaller run
def test_sigkill_at_random_moments_then_the_same_command_again(cifar, tmp_path):
    """Once before any checkpoint exists, then once while one is saved after the other."""
    fields = settings(cifar, steps=40, checkpoint__every=2, eval__final="", log__every=10)
    run, expected = tmp_path / "run", undisturbed(tmp_path, fields)
    delay = np.random.RandomState(4).uniform(0, 0.3)

    def begun():
        return (run / "run.json").exists()

    def saved():
        return checkpoint.finished_steps(run) != []

    kill_at_random(command(run, **fields), begun, 0.0, tmp_path)
    assert checkpoint.finished_steps(run) == []
    kill_at_random(command(run, **fields), saved, delay, tmp_path)
    assert not (run / "report.json").exists()
    assert 0 < max(checkpoint.finished_steps(run)) < 40
    assert cli.main([*command(run, **fields), "--quiet"]) == 0
    same_bits(final_state(run), final_state(expected))
    assert [step for step, _ in losses(run)] == [10, 20, 30, 40]
    assert not list((run / "checkpoints").glob("*tmp*"))


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended since it was listed
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds children in /proc")
@pytest.mark.slow
def test_sigkill_with_decoding_workers_which_end_with_it(jpegs, tmp_path):
    fields = {
        "data__name": "folder",
        "data__path": jpegs,
        "data__train": "train",
        "data__workers": 2,
        "data__batch": 8,
        "model__classes": 3,
        "steps": 60,
        "checkpoint__every": 10,
        "eval__final": "val",
        "eval__batch": 8,
    }
    # Without workers: how images are read must not matter either.
    run, expected = tmp_path / "run", undisturbed(tmp_path, fields | {"data__workers": 0})
    workers: list[int] = []

    def saved():
        if not checkpoint.finished_steps(run):
            return False
        held = (run / ".lock").read_text()
        workers.extend(children(int(held)))
        return True

    kill_at_random(command(run, **fields), saved, 0.0, tmp_path)
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the run that was killed"
        time.sleep(0.05)
    assert cli.main([*command(run, **fields), "--quiet"]) == 0
    same_bits(final_state(run), final_state(expected))
    assert losses(run) == losses(expected)


# Law 5: fine-tuning is initialisation


def test_fine_tuning_keeps_resamples_and_replaces(whole, jpegs, tmp_path, capsys):
    """Another resolution, other classes, unrolled blocks; stopped before its first step."""
    run = tmp_path / "finetuned"
    fields = {
        "data__name": "folder",
        "data__path": jpegs,
        "data__train": "train",
        "data__resolution": 48,
        "data__workers": 0,
        "data__batch": 8,
        "augment__mixup": 0.0,  # whose Beta distribution takes long to compile
        "augment__cutmix": 0.0,
        "model__classes": 3,
        "model__scan": False,
        "init__source": whole,
        "steps": 4,
        "optim__warmup": 1,
        "eval__final": "val",
    }
    begun = {}
    init_state = trainer.init_state

    def keep(*arguments):
        state = init_state(*arguments)
        begun.update({name: np.asarray(leaf) for name, leaf in named(state.params).items()})
        begun["ema"] = jax.tree.map(np.asarray, state.ema)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "init_state", keep)
        assert cli.main(command(run, **fields)) == 0
    source = {
        k: np.asarray(x) for k, x in named(unstack(pretrained.load_model(whole).params)).items()
    }
    ema = begun.pop("ema")
    assert begun.keys() == source.keys()
    fresh = {"head/kernel": (16, 3), "head/bias": (3,)}
    for name, leaf in begun.items():
        if name in fresh:
            assert leaf.shape == fresh[name]
            assert not leaf.any()
        elif name == "posemb":
            expected = jax.image.resize(source[name], (6, 6, 16), "cubic")
            np.testing.assert_allclose(leaf, expected, atol=1e-6)
        else:
            assert leaf.tobytes() == source[name].tobytes(), name
        assert np.array_equal(named(ema)[name], leaf)
    printed = capsys.readouterr().out
    assert re.search(r"^posemb +6 x 6 x 16 +resampled 4 x 4 -> 6 x 6, cubic$", printed, re.M)
    assert re.search(r"^head/kernel +16 x 3 +new: the classes differ$", printed, re.M)
    assert re.search(r"^blocks/1/mlp/up/kernel +16 x 16 +kept$", printed, re.M)
    assert len(re.findall(r"  (?:kept|resampled .*|new: .*)$", printed, re.M)) == len(begun)
    assert f"initialised from {whole}/checkpoints/{STEPS}" in printed
    trained = named(pretrained.load_model(run).params)
    assert not np.array_equal(trained["blocks/1/mlp/up/kernel"], begun["blocks/1/mlp/up/kernel"])


def test_resample_methods_differ_and_same_classes_keep_the_head(whole, cifar):
    def begin(method):
        source = pretrained.load_model(whole)
        shapes = build(source.cfg.model, (64, 64)).abstract_params
        target = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        return pretrained.adapt(source.params, target, method, same_classes=True)[0]

    cubic, corners = begin("cubic"), begin("corners")
    assert np.abs(cubic["posemb"] - corners["posemb"]).max() > 1e-3
    given = pretrained.load_model(whole).params
    assert np.array_equal(cubic["head"]["kernel"], given["head"]["kernel"])
    assert np.asarray(given["head"]["kernel"]).any()


# Law 6: every example counts once


def test_evaluation_is_exact_for_every_batch_size(jpegs):
    """With one image that can't be read, against the same images one by one, in numpy."""
    cfg = config.load("vit_tutorial_cifar", [f"{k}={v}" for k, v in TINY.items()])
    cfg.model.classes = 3
    model = build(cfg.model, (32, 32))
    draw = np.random.RandomState(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 4, jnp.float32),
        model.abstract_params,
    )
    images = draw.randint(0, 256, (37, 32, 32, 3)).astype(np.uint8)
    labels, mask = draw.randint(0, 3, 37), np.arange(37) != 20
    source = InMemory("drawn", images, labels, ("a", "b", "c"), mask)

    pixels = (images / 255 - np.array(cfg.augment.mean)) / np.array(cfg.augment.std)
    logits = np.asarray(model.apply(params, jnp.asarray(pixels, jnp.float32)), np.float64)
    log_total = np.log(np.exp(logits).sum(axis=1))
    hits = (logits.argmax(axis=1) == labels)[mask]
    loss = (log_total - logits[np.arange(37), labels])[mask].mean()
    assert 0 < hits.sum() < 36
    for batch in (7, 64):
        cfg.eval.batch = batch
        result = Evaluate(cfg, model, make_mesh(cfg.mesh))(params, source)
        assert result["n"] == 36, batch
        assert result["accuracy"] == pytest.approx(hits.sum() / 36, abs=1e-7), batch
        assert result["loss"] == pytest.approx(loss, rel=1e-5), batch


def test_the_eval_verb_gives_the_same_for_every_batch_size(whole, capsys):
    seen = []
    for batch in (1, 128, 300):
        arguments = ["--split", "test[:257]", "--json", f"--config.eval.batch={batch}"]
        assert cli.main(["eval", str(whole), *arguments]) == 0
        seen.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [result["n"] for result in seen] == [257] * 3
    assert len({result["accuracy"] for result in seen}) == 1
    np.testing.assert_allclose([r["loss"] for r in seen], seen[0]["loss"], rtol=1e-6)


def test_the_report_is_what_eval_measures(whole, capsys):
    assert cli.main(["eval", str(whole), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    reported = report(whole)["eval"]
    assert reported["n"] == 64
    assert {k: measured[k] for k in ("n", "split", "step", "accuracy")} == {
        k: reported[k] for k in ("n", "split", "step", "accuracy")
    }
    assert measured["loss"] == pytest.approx(reported["loss"], rel=1e-6)


# Law 7: a run is a model


def test_a_moved_run_still_predicts_and_evaluates(whole, jpegs, tmp_path, monkeypatch, capsys):
    image = str(next((jpegs / "val" / "class_1").iterdir()))

    def use(run):
        assert cli.main(["eval", run, "--json"]) == 0
        assert cli.main(["predict", run, image, "--json"]) == 0
        results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return results[0]["loss"], results[0]["n"], results[1]

    before = use(str(whole))
    shutil.copytree(whole, tmp_path / "elsewhere" / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        hidden = whole.with_name("hidden")
        whole.rename(hidden)
        try:
            assert use("moved") == before
            assert use("moved/checkpoints/10") == before
        finally:
            hidden.rename(whole)
    assert before[1] == 64
    assert len(before[2][image]) == 5

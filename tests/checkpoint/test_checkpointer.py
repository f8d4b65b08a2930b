"""checkpointer: bit-exact; newest and best preserved across restarts; damage is one line."""

import errno
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scale import checkpoint
from vit_scale.checkpoint import Checkpoints, checkpointer, finished_steps, io, score
from vit_scale.checkpoint.integrity import MANIFEST
from vit_scale.errors import RESUMABLE, UserError
from vit_scale.runs.verify import verify

ABOUT = {"config": {"optim": {"lr": 0.1, "freeze": ["embed"]}}, "classes": ["cat", "dög"]}


def trees(seed: int, ema: bool = False) -> dict:
    """Every type that a state has, as device arrays, with a NaN payload and a denormal."""
    draw = np.random.RandomState(seed)
    params = {
        "kernel": jnp.asarray(draw.randn(3, 5), jnp.float32),
        "blocks": {"0": {"bias": jnp.array([np.nan, -0.0, 1e-42, np.inf], jnp.float32)}},
        "half": jnp.asarray(draw.randn(4), jnp.bfloat16),
    }
    opt_state = ({"count": jnp.int32(seed)}, (), [jnp.asarray(draw.randn(2), jnp.float32)])
    return {"params": params, "opt_state": opt_state, "ema": params if ema else None}


def like(tree):
    """The target of a restore."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def save(folder: pathlib.Path, metrics: dict[int, dict | None], keep: int = 1) -> None:
    """A finished run that saved these steps, with the metrics of each."""
    with Checkpoints(folder, keep) as checkpoints:
        for step, measured in metrics.items():
            checkpoints.save(step, trees(step), ABOUT)
            if measured:
                checkpoints.record(step, measured)


def same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("ema", [False, True])
def test_restored_is_what_was_saved_bit_for_bit(tmp_path, ema):
    saved = trees(7, ema)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.find_latest() is None
        checkpoints.save(7, saved, ABOUT)
        checkpoints.wait()
        assert checkpoints.find_latest() == 7
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(7, like(saved))
    assert restored.keys() == ({"params", "opt_state", "ema"} if ema else {"params", "opt_state"})
    for name, tree in restored.items():
        same_bits(tree, saved[name])
    folder = tmp_path / checkpoint.FOLDER / "7"
    assert checkpoint.has_ema(folder) == ema
    assert checkpoint.read_description(folder) == ABOUT


def test_parameters_are_read_without_the_optimizer(tmp_path):
    save(tmp_path, {1: None})
    folder = tmp_path / checkpoint.FOLDER / "1"
    read = checkpoint.read(folder, {"params": like(trees(1)["params"])})
    assert read.keys() == {"params"}
    same_bits(read["params"], trees(1)["params"])


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The next step overwrites the buffers while they are being written."""
    state = {"kernel": jnp.arange(2_000_000.0)}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * -3 + 1, tree), donate_argnums=0)
    expected = np.arange(2_000_000, dtype=np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": state, "opt_state": {"n": jnp.int32(1)}, "ema": None}, ABOUT)
        for _ in range(20):  # donated, unless the save still holds the buffer: that is the race
            state = step(state)
        checkpoints.wait()
        target = {"params": like(state), "opt_state": None, "ema": None}
        np.testing.assert_array_equal(checkpoints.restore(1, target)["params"]["kernel"], expected)


# Preservation


@pytest.mark.parametrize(
    ("accuracies", "keep", "kept", "best"),
    [
        ([0.1, 0.9, 0.3, 0.2], 1, [2, 4], 2),
        ([0.1, 0.2, 0.3, 0.4], 1, [3, 4], 4),
        ([0.9, 0.2, 0.3, 0.4], 2, [1, 3, 4], 1),
        ([0.1, 0.9, np.nan, np.nan], 1, [2, 4], 2),
        ([np.nan, 0.9, 0.3], 1, [2, 3], 2),
        ([0.5, None, None], 1, [1, 3], 1),
        ([None, 0.5, None, 0.1], 1, [2, 4], 2),
        ([None, None, None], 2, [2, 3], None),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, accuracies, keep, kept, best):
    measured = {
        step: None if accuracy is None else {"accuracy": accuracy, "n": 10}
        for step, accuracy in enumerate(accuracies, 1)
    }
    save(tmp_path, measured, keep)
    assert finished_steps(tmp_path) == kept
    with Checkpoints(tmp_path, keep) as checkpoints:
        assert (checkpoints.find_latest(), checkpoints.find_best()) == (kept[-1], best)
        if best:
            assert checkpoints.read_metrics(best) == measured[best]


def test_the_best_survives_a_restart(tmp_path):
    save(tmp_path, {1: {"accuracy": 0.9}, 2: {"accuracy": 0.5}})
    save(tmp_path, {3: {"accuracy": 0.6}, 4: None})
    assert finished_steps(tmp_path) == [1, 4]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.find_best() == 1 and checkpoints.read_metrics(1) == {"accuracy": 0.9}
        assert checkpoints.read_metrics(4) == {}
        checkpoints.save(5, trees(5), ABOUT)
        checkpoints.record(5, {"accuracy": 0.95})
        checkpoints.save(6, trees(6), ABOUT)
    assert finished_steps(tmp_path) == [5, 6]


def test_score_orders_what_was_measured():
    assert score({"accuracy": 0.1}) > score({"accuracy": float("nan")}) == score(None) == score({})


def test_steps_are_the_finished_ones(tmp_path):
    assert finished_steps(tmp_path) == []
    save(tmp_path, {9: None, 10: None}, keep=2)
    folder = tmp_path / checkpoint.FOLDER
    (folder / "11.orbax-checkpoint-tmp").mkdir()
    (folder / "12").mkdir()
    (folder / "notes").mkdir()
    assert finished_steps(tmp_path) == [9, 10]


# Damage. Orbax leaves the futures of a failed restore unread.

unread = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def remove_tree(folder):
    shutil.rmtree(folder / "params")


def remove_all(folder):
    shutil.rmtree(folder)


def remove_values(folder):
    for file in (folder / "params").rglob("d/*"):
        file.unlink()


def truncate(folder):
    for file in (folder / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def break_metadata(folder):
    for file in folder.rglob("_METADATA"):
        file.write_text("{")


@unread
@pytest.mark.parametrize(
    "damage", [remove_tree, remove_all, remove_values, truncate, break_metadata]
)
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    save(tmp_path, {1: None})
    folder = tmp_path / checkpoint.FOLDER / "1"
    damage(folder)
    with pytest.raises(UserError) as caught:
        checkpoint.read(folder, {"params": like(trees(1)["params"])})
    message = str(caught.value)
    assert message.startswith(f"checkpoint {folder} is damaged or of a different model: ")
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("content", ["", "[", "\0\0"])
def test_a_damaged_description_is_one_line(tmp_path, content):
    save(tmp_path, {1: None})
    folder = tmp_path / checkpoint.FOLDER / "1"
    (folder / MANIFEST / "metadata").write_text(content)
    with pytest.raises(UserError, match="is damaged or of a different model"):
        checkpoint.read_description(folder)


@unread
def test_another_model_is_one_line(tmp_path):
    save(tmp_path, {1: None})
    target = like(trees(1)["params"])
    wrong_shape = target | {"kernel": jax.ShapeDtypeStruct((3, 6), jnp.float32)}
    with pytest.raises(UserError, match="is damaged or of a different model"):
        checkpoint.read(tmp_path / checkpoint.FOLDER / "1", {"params": wrong_shape})
    wrong_names = {"weight": target["kernel"]}
    with pytest.raises(UserError, match="is damaged or of a different model"):
        checkpoint.read(tmp_path / checkpoint.FOLDER / "1", {"params": wrong_names})


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("a file where the folder should be")
    with pytest.raises(UserError) as caught:
        save(tmp_path, {1: None})
    assert str(caught.value).startswith(f"cannot write or read {tmp_path / checkpoint.FOLDER}: ")


# Recovery from the newest intact checkpoint


def flip(file: pathlib.Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << (bit % 8)
    file.write_bytes(content)


def recovered(folder: pathlib.Path):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.recover(like(trees(0)))


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def of_another_step(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("1"), folder)


@unread
@pytest.mark.parametrize(
    "damage", [remove_tree, remove_values, truncate, break_metadata, empty, of_another_step]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, capsys, damage):
    save(tmp_path, {1: {"accuracy": 0.5}, 2: None}, keep=2)
    folder = tmp_path / checkpoint.FOLDER / "2"
    damage(folder)
    left = sorted(file.name for file in folder.rglob("*"))
    step, result = recovered(tmp_path)
    assert step == 1
    same_bits(result["params"], trees(1)["params"])
    aside = tmp_path / checkpoint.DAMAGED / "2"
    assert sorted(file.name for file in aside.rglob("*")) == left
    output = capsys.readouterr().err
    assert output.startswith(f"vit-scale: checkpoint {folder} ") and f"moved to {aside}" in output
    # The step is saved again, and damaged again: the first damaged copy stays.
    save(tmp_path, {2: None}, keep=2)
    damage(folder)
    assert recovered(tmp_path)[0] == 1
    assert (tmp_path / checkpoint.DAMAGED / "2-1").is_dir()


@unread
def test_without_a_whole_checkpoint_nothing_is_touched_and_nothing_begins(tmp_path):
    save(tmp_path, {1: None, 2: None}, keep=2)
    for step in ("1", "2"):
        truncate(tmp_path / checkpoint.FOLDER / step)
    for _ in range(2):  # the same command says the same again
        with pytest.raises(UserError, match=r"can be restored \(.*/2 .*; .*/1 "):
            recovered(tmp_path)
        assert checkpoint.all_steps(tmp_path) == [1, 2]
    assert recovered(tmp_path / "new") is None


def test_storage_that_fails_while_a_measurement_is_read_deletes_no_checkpoint(
    tmp_path, monkeypatch
):
    save(tmp_path, {1: {"accuracy": 0.9}, 2: {"accuracy": 0.5}}, keep=1)

    def refused(path):
        raise UserError("UNAVAILABLE", RESUMABLE)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(checkpointer, "read_selection", refused)
        with pytest.raises(UserError, match="UNAVAILABLE"):
            checkpoints.save(3, trees(3), ABOUT)
    monkeypatch.undo()
    assert 1 in finished_steps(tmp_path)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, trees(4), ABOUT)
    assert finished_steps(tmp_path) == [1, 4]


def test_a_damaged_measurement_of_an_older_checkpoint_does_not_end_the_run(tmp_path, capsys):
    save(tmp_path, {1: {"accuracy": 0.9}, 2: {"accuracy": 0.5}}, keep=2)
    flip(tmp_path / checkpoint.FOLDER / "1" / checkpoint.SELECTION, 300)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.find_best() == 2
        checkpoints.save(3, trees(3), ABOUT)
    assert finished_steps(tmp_path) == [1, 2, 3], "nobody knows that it is not the best: it stays"
    assert "checkpoints/1 is damaged or of a different model" in capsys.readouterr().err


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, {1: None, 2: None}, keep=2)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(io, "_restore", fail)
    with pytest.raises(UserError, match=r"cannot read .*Input/output error") as caught:
        recovered(tmp_path)
    assert caught.value.code == RESUMABLE and checkpoint.all_steps(tmp_path) == [1, 2]


@unread
def test_every_flipped_bit_is_seen_or_harmless(tmp_path):
    """A bit flipped in each file: Orbax alone restores most of them as wrong values."""
    save(tmp_path / "good", {1: None, 2: {"accuracy": 0.5}}, keep=2)
    place = pathlib.Path(checkpoint.FOLDER, "2")
    files = sorted(f for f in (tmp_path / "good" / place).rglob("*") if f.is_file())
    draw, detected = np.random.RandomState(0), 0
    for number in range(60):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", run)
        file = run / files[draw.randint(len(files))].relative_to(tmp_path / "good")
        flip(file, draw.randint(2**31))
        with Checkpoints(run) as checkpoints:
            step, result = checkpoints.recover(like(trees(0)))
            metrics = checkpoints.read_metrics(2) if step == 2 else {}
            assert metrics in ({}, {"accuracy": 0.5})  # measured again without
        same_bits(result["params"], trees(step)["params"])
        same_bits(result["opt_state"], trees(step)["opt_state"])
        detected += not metrics
    assert 10 < detected < 60


@unread
def test_verify_reads_everything(tmp_path):
    save(tmp_path, {1: None, 2: None}, keep=2)
    rows = {row["file"]: row for row in verify(tmp_path)}
    assert rows["checkpoints/1"] == {"file": "checkpoints/1", "state": "whole", "what": "5 arrays"}
    assert rows["run.json"]["state"] == "damaged"  # a run has one
    for file in (tmp_path / checkpoint.FOLDER / "2" / "opt_state").rglob("d/*"):
        flip(file, 8 * file.stat().st_size // 2)
    rows = {row["file"]: row for row in verify(tmp_path)}
    assert [rows[f"checkpoints/{step}"]["state"] for step in (1, 2)] == ["whole", "damaged"]
    with pytest.raises(UserError, match="is not a run folder"):
        verify(tmp_path / "nothing")


def test_a_deleted_workdir_is_not_made_again(tmp_path):
    run = tmp_path / "run"
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, trees(1), ABOUT)
        checkpoints.wait()
        shutil.rmtree(run)
        with pytest.raises(UserError, match="was deleted during training") as caught:
            checkpoints.save(2, trees(2), ABOUT)
    assert caught.value.code == RESUMABLE
    assert not run.exists()


# A base: frozen parameters that are stored once


def save_beside_base(folder: pathlib.Path, seed: int = 7, step: int = 7) -> dict:
    """A run whose `blocks` are frozen, and what it saved."""
    saved = trees(seed, ema=True)
    frozen = {"blocks": saved["params"]["blocks"]}
    with Checkpoints(folder) as checkpoints:
        checkpoints.store_base(frozen, ABOUT, new=True)
        checkpoints.save(step, saved, ABOUT)
    return saved


def test_what_is_in_the_base_is_not_in_the_checkpoint_and_restored_with_it(tmp_path):
    saved = save_beside_base(tmp_path)
    path = tmp_path / "checkpoints" / "7"
    own = {name for name in checkpoint.read_manifest(path)["arrays"] if name[:3] != "opt"}
    assert own == {f"{tree}/{leaf}" for tree in ("params", "ema") for leaf in ("half", "kernel")}
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(7, like(saved))
    same_bits(restored, saved)
    pairs = [restored[tree]["blocks"]["0"]["bias"] for tree in ("params", "ema")]
    first, second = (leaf.unsafe_buffer_pointer() for leaf in pairs)
    assert first != second  # both are donated
    same_bits(checkpoint.read(path, {"ema": like(saved["ema"])}), {"ema": saved["ema"]})
    rows = {row["file"]: row["state"] for row in verify(make_run(tmp_path))}
    assert rows["base/0"] == rows["checkpoints/7"] == "whole"


def make_run(folder: pathlib.Path) -> pathlib.Path:
    (folder / "run.json").write_text('{"name": "run"}')
    return folder


def test_a_base_is_kept_by_a_run_that_resumes_and_replaced_by_one_that_begins(tmp_path):
    save_beside_base(tmp_path)
    other = {"blocks": {"0": {"bias": jnp.ones(4)}}}
    for new in (False, True):
        before = checkpoint.read_manifest(tmp_path / "base/0")["arrays"]
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.store_base(other, ABOUT, new)
        after = checkpoint.read_manifest(tmp_path / "base/0")["arrays"]
        assert (after != before) == new and after.keys() == {"params/blocks/0/bias"}


def test_a_missing_damaged_or_other_base_is_refused(tmp_path):
    saved = save_beside_base(tmp_path / "run")
    save_beside_base(tmp_path / "other", seed=8)
    base, path = tmp_path / "run/base", tmp_path / "run/checkpoints/7"
    shutil.move(base, tmp_path / "kept")
    target = {"params": like(saved["params"])}
    with pytest.raises(UserError, match=r"needs the frozen parameters in \S+base/0, which is miss"):
        checkpoint.read(path, target)
    frozen = {"blocks": {"0": {"bias": jnp.ones(4)}}}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.store_base(frozen, ABOUT, new=True)
    with pytest.raises(UserError, match=r"base/0 has the checksum \w+, checkpoint \S+ was written"):
        checkpoint.read(path, target)
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "kept", base)
    checkpoint.read(path, target)
    for file in (base / "0/params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"checkpoint \S+base/0 is damaged"):
        checkpoint.read(path, target)
    rows = {row["file"]: row["state"] for row in verify(make_run(tmp_path / "run"))}
    assert rows["base/0"] == "damaged" and rows["checkpoints/7"] == "whole"

"""resume: a run continues with its own config and data, or is refused with the differences."""

import numpy as np
import pytest

from tests.runs.test_run_folder import enter, metadata, refusal
from vit_scale import config
from vit_scale.checkpoint import Checkpoints
from vit_scale.errors import UserError
from vit_scale.runs.json_files import read_json, write_json
from vit_scale.runs.resume import resumed_config
from vit_scale.runs.run_folder import Run
from vit_scale.storage import paths


def test_a_different_config_is_refused_with_the_differences(tmp_path):
    enter(tmp_path)()
    with pytest.raises(UserError) as caught:
        enter(tmp_path, "optim.lr=0.5", "model.depth=3")()
    message = str(caught.value)
    assert "model.depth: None -> 3; optim.lr: 0.001 -> 0.5" in message
    assert "use another --workdir" in message
    assert read_json(tmp_path / "run.json") == metadata(), "unchanged"
    enter(tmp_path)()  # unlocked, though `caught` keeps the refused run alive


@pytest.mark.parametrize(
    "override",
    [
        "log.every=3",
        "checkpoint.keep=4",
        "data.workers=0",
        "data.cache=0.",
        "data.path=elsewhere",
        "data.memory=True",
        "data.on_corrupt=skip",
        "eval.batch=7",
        "mesh.fsdp=2",
    ],
)
def test_fields_that_do_not_affect_the_result_may_change(tmp_path, override):
    enter(tmp_path)()
    enter(tmp_path, override)()
    assert read_json(tmp_path / "run.json") == metadata(), "written once"


@pytest.mark.parametrize(
    "override", ["seed=1", "steps=2000", "data.batch=64", "eval.split=train[98%:]", "optim.ema=0.9"]
)
def test_fields_that_affect_the_result_may_not_change(tmp_path, override):
    enter(tmp_path)()
    assert override.partition("=")[0] in refusal(enter(tmp_path, override))


def test_init_source_may_change_after_the_first_checkpoint(tmp_path):
    enter(tmp_path, "init.source=runs/old")()
    moved = enter(tmp_path, "init.source=gs://bucket/new")
    assert "(init.source: runs/old -> gs://bucket/new); " in refusal(moved)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)  # an unfinished one
    assert "(init.source: runs/old -> gs://bucket/new); " in refusal(moved)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            4, {"params": {"x": np.ones(2)}, "ema": None, "opt_state": None}, metadata()
        )
    moved()
    enter(tmp_path)()
    assert "(init.head: auto -> new); " in refusal(enter(tmp_path, "init.head=new"))
    assert read_json(tmp_path / "run.json") == metadata("init.source=runs/old"), "written once"


def metadata_from(source: str, cwd: str | None = None) -> dict:
    result = metadata(f"init.source={source}")
    return result if cwd is None else {**result, "cwd": cwd}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """PROJECT/runs/pre and PROJECT/runs/fine; the process is in another folder."""
    (tmp_path / "project" / "runs" / "pre").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


@pytest.mark.parametrize("cwd", ["", "project", "gone"])
def test_a_recorded_path_resolves_from_any_folder(project, monkeypatch, cwd):
    """From the folder where the run began, which old runs don't record, else from a parent."""
    run, cwd = project / "runs" / "fine", cwd and str(project.parent / cwd)
    assert paths.resolve("runs/pre", run, cwd) == str(project / "runs/pre")
    assert paths.resolve("runs/none", run, cwd) == "runs/none"
    for name in ("", "gs://bucket/pre", "https://a.b/c.npz", str(project / "runs/pre")):
        assert paths.resolve(name, run, cwd) == name
    monkeypatch.chdir(project)
    assert paths.resolve("runs/pre", run, cwd) == "runs/pre", "unchanged if it is right from here"


def test_the_original_folder_takes_precedence_over_the_current_one(project, tmp_path):
    (tmp_path / "elsewhere" / "runs" / "pre").mkdir(parents=True)
    far = tmp_path / "disk" / "fine"
    assert paths.resolve("runs/pre", far, str(project)) == str(project / "runs/pre")
    assert paths.resolve("runs/pre", far) == "runs/pre", "no original folder is known"


@pytest.mark.parametrize("cwd", [None, "project"])
def test_resuming_from_another_folder_continues_the_same_run(project, cwd):
    """Before the first checkpoint, while init.source matters, with a relative or absolute path."""
    run, began = project / "runs" / "fine", cwd and str(project)
    with Run(run, metadata_from("runs/pre", began)):
        pass
    with Run(run, metadata_from(str(project / "runs" / "pre"))):
        pass
    (project / "runs" / "other").mkdir()
    line = refusal(lambda: Run(run, metadata_from(str(project / "runs" / "other"))).__enter__())
    assert "different config (init.source: runs/pre -> " in line


@pytest.mark.parametrize("field", ["init.source", "distill.teacher"])
def test_a_path_given_in_another_folder_resolves_when_resuming(project, monkeypatch, field):
    """Rerun the same command from another folder."""
    run, recorded = project / "runs" / "fine", metadata(f"{field}=runs/pre")
    with Run(run, {**recorded, "cwd": str(project)}):
        pass
    cfg = resumed_config(config.from_json(recorded["config"]), run)
    assert config.fields(cfg)[field] == str(project / "runs" / "pre")
    other = resumed_config(config.override(config.base(), [f"{field}=runs/else"]), run)
    assert config.fields(other)[field] == "runs/else", "a different path stays different"
    monkeypatch.chdir(project)
    cfg = resumed_config(config.from_json(recorded["config"]), run)
    assert config.fields(cfg)[field] == "runs/pre"


def test_a_run_with_a_removed_field_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(config.REMOVED, "model.fused", "all kernels are apart")
    old = metadata("optim.lr=0.5")
    old["config"]["model"]["fused"] = True
    write_json(tmp_path / "run.json", old)
    enter(tmp_path, "optim.lr=0.5")()
    assert "with a different config (optim.lr: 0.5 -> 0.001); " in refusal(enter(tmp_path))
    assert read_json(tmp_path / "run.json") == old


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '"x"', "\0", "{}", '{"config": 3}', '{"config": {"steps": "x"}}']
)
def test_a_damaged_description_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    refusal(enter(tmp_path))
    assert (tmp_path / "run.json").read_text() == content, "left unchanged"


# Data that changed

SET = {"name": "set train", "images": 16, "classes": 2, "fingerprint": "0f"}
SLICE = SET | {"name": "set train[:75%]", "images": 12, "of": 16, "slices": "example"}


def of_data(train: dict, *overrides: str, classes=("down", "up"), **others: dict) -> dict:
    data = {**train, "sets": {"train": train, **others}}
    return {**metadata(*overrides), "classes": list(classes), "data": data}


def begin(folder, description: dict):
    def call():
        with Run(folder, description):
            pass

    return call


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("above", "down"), "removed 'up', added 'above', class 0 was 'down', is now 'above'"),
        (("up", "down"), "class 0 was 'down', is now 'up'"),
        (("down", "up", "zebra"), "added 'zebra', 2 -> 3 classes"),
        (("down",), "removed 'up', 2 -> 1 classes"),
    ],
)
def test_different_classes_are_refused_even_with_data_changed(tmp_path, classes, expected):
    begin(tmp_path, of_data(SET))()
    changed = of_data(SET, "data.changed=True", classes=classes)
    assert f"holds a run with different classes ({expected}); use" in refusal(
        begin(tmp_path, changed)
    )


CHANGES = {
    "train: set train went from 16 to 18 images, 2 more": {"images": 18, "fingerprint": "1f"},
    "train: set train went from 16 to 9 images, 7 fewer": {"images": 9, "fingerprint": "1f"},
    "train: set train still has 16 images, but their paths or labels changed": {
        "fingerprint": "1f"
    },
}


@pytest.mark.parametrize("expected", CHANGES)
def test_changed_images_are_refused_unless_accepted(tmp_path, expected, capsys):
    begin(tmp_path, of_data(SET))()
    now = SET | CHANGES[expected]
    message = refusal(begin(tmp_path, of_data(now)))
    assert (
        f"holds a run that began with different data ({expected}); use another --workdir" in message
    )
    assert "--config.data.changed=True" in message and capsys.readouterr().err == ""
    begin(tmp_path, of_data(now, "data.changed=True"))()
    assert capsys.readouterr().err == f"vit-scale: data.changed: since this run began, {expected}\n"
    begin(tmp_path, of_data(SET))()
    assert capsys.readouterr().err == "", "no message about the original data"


def test_every_set_of_a_run_is_compared(tmp_path):
    final = SET | {"name": "set val"}
    begin(tmp_path, of_data(SLICE, final=final))()
    now = of_data(SLICE | {"fingerprint": "2f", "of": 17}, final=final | {"images": 15})
    message = refusal(begin(tmp_path, now))
    assert (
        "(train: set train[:75%] went from 16 to 17 images, 1 more; final: set val went" in message
    )
    begin(tmp_path, of_data(SLICE | {"of": 17}, final=final))()  # added outside the slice


def test_different_slicing_is_refused_even_with_data_changed(tmp_path):
    begin(tmp_path, of_data(SLICE | {"slices": "position", "fingerprint": None}))()
    message = refusal(begin(tmp_path, of_data(SLICE, "data.changed=True")))
    assert (
        "different split (train: set train[:75%] is sliced by example, was by position)" in message
    )


def test_an_earlier_run_is_compared_by_what_it_recorded(tmp_path):
    old = {"name": "set train", "images": 12, "classes": 2}
    before = {**metadata(), "classes": ["down", "up"], "data": old}
    write_json(tmp_path / "run.json", before)
    begin(tmp_path, of_data(SLICE))()
    more = SLICE | {"images": 13}
    assert "from 12 to 13 images, 1 more" in refusal(begin(tmp_path, of_data(more)))
    assert "different classes" in refusal(begin(tmp_path, of_data(SLICE, classes=("a", "b"))))

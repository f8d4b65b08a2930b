"""classes: a model's outputs are matched to a set's classes by name, not by index."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import (
    CLASSES,
    random_images,
    random_params,
    tiny_config,
    tiny_model,
    write_run,
)
from vit_scale import cli, config
from vit_scale.cli.commands import by_class
from vit_scale.data import InMemory, Match, align, match, open_split
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.pretrained import convert
from vit_scale.training.init_state import check_source, init_state
from vit_scale.training.setup import make_setup

REVERSED = CLASSES[::-1]


def test_the_same_names_in_another_order_are_mapped():
    assert match(CLASSES, CLASSES) == Match()
    assert match(CLASSES, ("dog", "cat", "fox", "eel")).outputs == (1, 0, 3, 2)
    assert match(("b", "c", "a"), ("a", "b", "c")).outputs == (2, 0, 1)


def test_folder_names_may_differ_from_class_names():
    """Folders are named by WordNet ids, shown as words; timm's label_names are the ids."""
    actual = match(("n02", "n01"), ("tench", "goldfish"), ids=("n01", "n02"))
    assert actual.outputs == (1, 0)
    assert match(("n01", "n02"), ("tench", "goldfish"), ids=("n01", "n02")) == Match()


def test_the_first_synonym_is_enough():
    """Hugging Face's ImageNet has all of WordNet's words for a class."""
    theirs = ("goldfish, Carassius auratus", "tench, Tinca tinca", "Great_White_Shark, white shark")
    actual = match(theirs, ("tench", "great white shark", "goldfish"))
    assert actual.outputs == (1, 2, 0) and "by first synonym" in actual.line
    with pytest.raises(UserError):  # two cranes are ambiguous
        match(("crane, bird", "crane, machine"), ("crane", "derrick"))


@pytest.mark.parametrize(
    ("outputs", "classes"),
    [
        (CLASSES, ("cat", "dog", "eel", "gnu")),
        (("a", "b"), ("A", "c")),
        (("a", "a"), ("a", "b")),
    ],
)
def test_different_names_are_refused_naming_the_override(outputs, classes):
    with pytest.raises(UserError) as caught:
        match(outputs, classes)
    line = str(caught.value)
    assert "--config.init.classes=order" in line and "\n" not in line
    assert match(outputs, classes, "order").outputs is None
    with pytest.raises(UserError, match=r"init\.classes='name' is unknown; did you mean names"):
        match(outputs, classes, "name")


def test_duplicate_names():
    """ImageNet has two cranes, which only the order can tell apart."""
    theirs = ("tench, Tinca tinca", "crane", "crane")
    assert match(theirs, ("tench", "crane (n02012849)", "crane (n03126707)")) == Match()
    with pytest.raises(UserError, match=r"in another order, and 'crane' more than once"):
        match(theirs, ("crane", "tench, Tinca tinca", "crane"))


def test_full_names_take_precedence_over_first_synonyms():
    """Both are cranes: matched by index, each would be mistaken for the other."""
    cranes = ("crane, bird", "crane, machine")
    assert match(cranes, cranes[::-1]).outputs == (1, 0)
    assert match(("crane", "crane, bird"), ("x", "y"), ids=("crane, bird", "crane")).outputs == (
        1,
        0,
    )


def test_composed_and_decomposed_accents_are_equal():
    assert match(("caf\u00e9", "bar"), ("bar", "cafe\u0301")).outputs == (1, 0)


def test_json_has_every_class():
    top = [("crane", 0.5), ("tench", 0.3), ("crane", 0.1), ("crane", 0.05)]
    assert by_class(top) == {"crane": 0.5, "tench": 0.3, "crane (2)": 0.1, "crane (3)": 0.05}


def test_numbered_classes_are_matched_in_order_with_a_message():
    for outputs, classes in ((("0", "1", "2", "3"), CLASSES), (CLASSES, ("0", "1", "2", "3"))):
        actual = match(outputs, classes)
        assert actual.outputs is None and "assuming that output i is class i" in actual.line
    tens = tuple(sorted(map(str, range(12))))  # folders "0", "1", "10", "11", "2"...
    assert match(tuple(map(str, range(12))), tens).outputs == tuple(map(int, tens))


def test_a_set_is_read_with_the_models_labels():
    images, labels = random_images(5), np.array([0, 1, 2, 3, 0])
    mask = np.array([True, True, True, False, True])
    source = InMemory("turned", images, labels, REVERSED, mask)
    aligned, line = align(source, CLASSES)
    batch = aligned.read(np.arange(5))
    assert batch["label"].tolist() == [3, 2, 1, 0, 3] and batch["mask"].tolist() == mask.tolist()
    assert aligned.classes == CLASSES and len(aligned) == 5 and "another order" in line
    np.testing.assert_array_equal(batch["image"], images)
    assert align(source, REVERSED) == (source, "")
    assert align(source, ("a", "b")) == (source, ""), "the number of classes is checked elsewhere"


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
    """Uniform grey photos, brighter for later classes."""
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((16, 16, 3), 60 * label, np.uint8)).save(folder / "0.png")
    return tmp_path / "photos"


@pytest.fixture
def biased_run(tmp_path, photos):
    """biased_run(names, order) writes a run that predicts the same class for every image.

    Its outputs have these names, and output i has the logit order[i].
    """

    def make(names, order=(0, 1, 2, 3)) -> pathlib.Path:
        cfg = tiny_config("data.name=folder", f"data.path={photos}", "data.workers=0")
        params = jax.tree.map(np.zeros_like, random_params(tiny_model()))
        params["norm"]["bias"][:2] = 1.0  # the features are constant: the bias decides
        params["head"]["bias"][:] = np.array([0.0, 1.0, 2.0, 3.0])[list(order)]
        folder = tmp_path / "-".join(names)
        return write_run(folder, cfg, params, classes=list(names), data={"images": 4})

    return make


@pytest.fixture
def evaluate(capsys):
    """evaluate(RUN, ...) runs `vit-scale eval RUN --split val --json`; returns (code, out, err)."""

    def run(*arguments) -> tuple[int, str, str]:
        code = cli.main(["eval", *map(str, arguments), "--split", "val", "--json"])
        return code, *capsys.readouterr()

    return run


def test_eval_matches_classes_by_name(biased_run, evaluate):
    """All photos are classified as the output with the highest bias."""
    code, out, err = evaluate(biased_run(CLASSES))
    assert code == 0 and "order" not in err
    same = json.loads(out)
    assert same["accuracy"] == 0.25
    code, out, err = evaluate(biased_run(REVERSED, (3, 2, 1, 0)))
    assert json.loads(out)["loss"] == pytest.approx(same["loss"], abs=1e-6)
    assert "photos val: mapping the model's classes, in another order" in err
    other = biased_run(("cat", "dog", "eel", "gnu"))
    code, out, err = evaluate(other)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "'gnu' only in the model, 'fox' only in the set" in err
    code, out, err = evaluate(other, "--config.init.classes=order")
    assert code == 0 and "in order: init.classes=order" in err
    _, _, err = evaluate(biased_run(("0", "1", "2", "3")))
    assert "assuming that output i is class i of the set, cat to fox" in err


def test_inspect_matches_classes_by_name(biased_run, capsys):
    run = InspectedRun(biased_run(REVERSED))
    batch = run.open_split("val").read(np.arange(4))
    assert batch["label"].tolist() == [3, 2, 1, 0]
    assert "another order" in capsys.readouterr().err
    with pytest.raises(UserError, match="'gnu' only in the model"):
        InspectedRun(biased_run(("cat", "dog", "eel", "gnu"))).open_split("val")


def test_a_kept_head_is_reordered_to_the_sets_classes(tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny_config(), random_params(tiny_model()))
    pretrained_head = random_params(tiny_model())["head"]
    for head in ("auto", "keep"):
        program = make_setup(tiny_config(f"init.source={run}", f"init.head={head}"))
        check_source(program, REVERSED)
        state = init_state(program, REVERSED, quiet=False)
        np.testing.assert_array_equal(
            state.params["head"]["kernel"], pretrained_head["kernel"][:, ::-1]
        )
        np.testing.assert_array_equal(state.params["head"]["bias"], pretrained_head["bias"][::-1])
        assert "kept, reordered to the data set's classes" in capsys.readouterr().out
    others = ("cat", "dog", "eel", "gnu")
    with pytest.raises(UserError, match=r"init\.head=keep: the model's classes are not the set's"):
        check_source(program, others)
    program.cfg.init.head = "auto"
    state = init_state(program, others, quiet=False)
    assert not np.any(state.params["head"]["kernel"])
    assert "new: the classes differ" in capsys.readouterr().out
    program.cfg.init.head, program.cfg.init.classes = "keep", "order"
    state = init_state(program, others, quiet=False)
    np.testing.assert_array_equal(state.params["head"]["kernel"], pretrained_head["kernel"])


def test_a_head_without_class_names_is_kept_with_a_message(tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny_config(), random_params(tiny_model()))
    export(run, "safetensors-timm", tmp_path / "timm")
    (tmp_path / "timm" / "config.json").unlink()
    source = f"init.source={tmp_path / 'timm'}"
    program = make_setup(tiny_config(source))
    init_state(program, REVERSED, quiet=False)
    printed = capsys.readouterr().out
    assert "assuming that output i is class i of the set, fox to cat" in printed
    assert "classes are numbered 0 to 3" in printed


def test_hugging_face_classes_in_another_order(tmp_path, photos):
    """Export to the Hugging Face layout, reverse the names of its outputs, and convert it back."""
    cfg = tiny_config("data.name=folder", f"data.path={photos}")
    run = write_run(tmp_path / "run", cfg, random_params(tiny_model()), data={"images": 4})
    export(run, "safetensors-hf", tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    content = json.loads(file.read_text())
    content["id2label"] = {str(i): name for i, name in enumerate(REVERSED)}
    file.write_text(json.dumps(content))
    converted, _ = convert(tmp_path / "hf", tmp_path / "back")
    assert converted.classes == REVERSED
    cfg = config.override(converted.cfg, ["data.name=folder", f"data.path={photos}"])
    source, line = align(open_split(cfg.data, "val"), converted.classes)
    assert source.read(np.arange(4))["label"].tolist() == [3, 2, 1, 0] and line

"""configs/: each one loads, each model builds at full size (shapes only), each claim adds up."""

import json
import pathlib

import jax
import pytest

from vit_scale import config
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.parameters import count
from vit_scale.training.setup import summary
from vit_scale.training.validation import validate


def runs(name: str) -> list[str]:
    """The runs that a config names: itself, or each of its stages."""
    return [f"{name}:{stage}" for stage in config.load(name).stages] or [name]


RUNS = [run for name in config.names() for run in runs(name)]
# What `show --json` printed before presets, fields and formulas moved (golden/make_show.py).
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "show.json").read_text())


def flat(shown: dict) -> dict:
    return config.dotted(json.loads(json.dumps(shown)))


@pytest.mark.parametrize("run", RUNS)
def test_everything_but_the_data_is_accepted_and_shown_as_ever(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # quickstart looks for .data
    cfg = config.load(run)
    if cfg.objective == "distillation":
        cfg.distill.teacher = "RUN"
    validate(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    shown = summary(config.load(run))
    assert shown["parameters"] > 100_000
    assert cfg.steps >= 50
    shown = flat(shown["config"] if ":" in run else shown)
    golden = flat(GOLDEN.get(run, {}))
    assert {name: shown.get(name) for name in golden} == golden


@pytest.mark.parametrize("kind", ["imagenet", "cifar"])
@pytest.mark.parametrize(
    ("old", "variant"), [("tiny", "Ti"), ("small", "S"), ("base", "B"), ("large", "L")]
)
def test_a_preset_has_an_alias_under_its_former_name(kind, old, variant):
    preset, alias = config.load(f"vit_{kind}:{variant}/16"), config.load(f"vit_{old}_{kind}")
    assert preset.model.variant == f"{variant}/16"
    differences = config.differences(config.to_json(alias), config.to_json(preset))
    instead = f"init.instead: vit_{old}_imagenet -> vit_imagenet:{variant}/16"
    assert differences == ([instead] if kind == "cifar" else [])
    assert config.title(f"vit_{kind}:{variant}/16") == f"vit_{kind}-{variant}-16"


RECIPES = {  # recipe: (sizes, fields that make it what it is)
    "baselines": (
        "S",
        {"augment.policy": "randaug(2,10)", "model.pool": "gap", "augment.mixup": 0.2},
    ),
    "augreg": ("Ti S B L", {"loss": "sigmoid", "data.batch": 4096, "augment.crop": "inception"}),
    "deit": ("Ti S B", {"augment.policy": "rand-m9-mstd0.5-inc1", "data.repeats": 3}),
    "deit3": ("S B L", {"augment.policy": "3a", "optim.name": "lamb", "loss": "binary"}),
    "deit3-224": ("B L", {"model.layer_scale": 1e-4, "data.resolution": 224}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_recipes_are_accepted_for_their_sizes(recipe):
    sizes, fields = RECIPES[recipe]
    for size in ("Ti", "S", "B", "L"):
        name = f"vit_imagenet:{size}/16,recipe={recipe}"
        if size not in sizes.split():
            with pytest.raises(UserError, match=f"recipe={recipe} is for .*, not {size}/16"):
                config.load(name)
            continue
        cfg = config.load(name)
        validate(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
        shown = flat(summary(cfg)["config"])
        assert {field: shown[field] for field in fields} == fields
    with pytest.raises(UserError, match="no recipe 'diet': give one of baselines, augreg, deit"):
        config.load("vit_imagenet:S/16,recipe=diet")


@pytest.mark.parametrize("kind", ["imagenet", "cifar"])
def test_a_preset_of_another_size_is_refused(kind):
    with pytest.raises(UserError, match="no recipe for 'M/16': give one of Ti/16, S/16, B/16"):
        config.load(f"vit_{kind}:M/16")


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """Gives a function: the quickstart's stages as (set, n of its training, classes), by name."""
    monkeypatch.chdir(tmp_path)

    def stages(*overrides: str, **begun: str) -> dict[str, tuple]:
        before = {}
        for name, data in begun.items():
            before[name.replace("_", "-")] = config.base()
            before[name.replace("_", "-")].data.name = data
        found = {}
        for stage in config.load("quickstart").stages:
            cfg = config.load(f"quickstart:{stage}", overrides, before)
            found[stage] = (cfg.data.name, cfg.data.train, cfg.eval.final, cfg.model.classes)
        return found

    return stages


FRACTALS = ("fractal", "train", "test", 20)
CIFAR = ("cifar10", "train[:10000]", "test[:5000]", 10)
TUNED = ("scratch-32", "finetune-32", "scratch-64", "finetune-64")


@pytest.mark.parametrize("layout", ["bin", "py"])
def test_quickstart_takes_cifar_where_its_data_are(quickstart, tmp_path, layout):
    """It is data.path that says where, from the command line as well."""
    pretraining = ("fractal", "train", "", 512)
    everywhere = {"pretrain": pretraining} | dict.fromkeys(TUNED, FRACTALS)
    assert quickstart() == everywhere
    (tmp_path / "sets" / f"cifar-10-batches-{layout}").mkdir(parents=True)
    assert quickstart() == everywhere, "it is not in .data"
    found = {"pretrain": pretraining} | dict.fromkeys(TUNED, CIFAR)
    assert quickstart("data.path=sets") == found
    assert quickstart(f"data.path={tmp_path}/sets") == found
    (tmp_path / ".data" / f"cifar-10-batches-{layout}").mkdir(parents=True)
    assert quickstart() == found
    assert quickstart("data.path=elsewhere") == everywhere


def test_what_is_given_counts_more_than_what_quickstart_finds(quickstart, tmp_path):
    (tmp_path / ".data" / "cifar-10-batches-bin").mkdir(parents=True)
    fewer = quickstart("data.train=train[:50]", "model.classes=7")
    assert fewer["finetune-32"] == ("cifar10", "train[:50]", "test[:5000]", 7)
    assert quickstart("data.name=fractal")["scratch-64"] == FRACTALS
    assert quickstart("data.name=folder")["scratch-64"] == ("folder", "train", "test", 20)


def test_quickstart_goes_on_as_what_it_was_begun_as(quickstart, tmp_path):
    """Of one comparison all runs are of one set, also those that have not begun."""
    assert quickstart(pretrain="fractal", scratch_32="cifar10")["finetune-64"] == CIFAR
    (tmp_path / ".data" / "cifar-10-batches-bin").mkdir(parents=True)
    assert quickstart(pretrain="fractal")["finetune-32"] == CIFAR, "pretraining decides nothing"
    began = quickstart(pretrain="fractal", scratch_32="fractal")
    assert {began[stage] for stage in TUNED} == {FRACTALS}
    assert quickstart(finetune_64="fractal")["finetune-64"] == FRACTALS


def test_selection_never_sees_the_reported_split():
    """Where a best step is selected, it is on held-out training images."""
    for run in RUNS:
        cfg = config.load(run)
        if cfg.eval.split and cfg.eval.final:
            assert cfg.eval.split != cfg.eval.final, run
            assert cfg.data.train != "train", run


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_fine_tuning_continues_the_pretraining(size):
    """The fine-tuned model differs from the pretrained one in what `adapt` can place, no more."""
    before = config.load(f"vit_{size}_imagenet").model
    after = config.load(f"vit_{size}_cifar").model
    assert {key for key in before if before[key] != after[key]} <= {
        "classes",
        "drop_path",
        "dropout",
    }


def test_the_tutorial_has_its_numbers():
    cfg = config.load("vit_tutorial_cifar")
    params = build(cfg.model, (32, 32)).abstract_params
    assert 3.1e6 < count(params) < 3.3e6
    assert cfg.steps == 200 * 45_000 // 128
    assert config.load("vit_tutorial_cifar:2").steps == 2 * 45_000 // 128

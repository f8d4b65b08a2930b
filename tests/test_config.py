"""config: names and paths, overrides, refusals with the nearest name, the stored form."""

import pathlib

import pytest

from vit_scale import config
from vit_scale.errors import USAGE, UserError


@pytest.fixture
def own(tmp_path) -> pathlib.Path:
    """A user's config file, with an argument and a field that follows from it."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from vit_scale.config import base\n"
        "def get_config(epochs='3'):\n"
        "    cfg = base()\n"
        "    cfg.steps = int(epochs) * 100\n"
        "    cfg.optim.freeze = ('embed',)\n"
        "    return cfg\n"
    )
    return file


def refusal(*arguments, call=config.load) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_are_the_files_in_configs():
    assert {"quickstart", "vit_tiny_cifar", "vit_tutorial_cifar"} <= set(config.names())
    assert "base" not in config.names() and config.names() == sorted(config.names())


def test_find_splits_the_argument_off(own):
    assert config.find("quickstart:pretrain") == (config.FOLDER / "quickstart.py", "pretrain")
    assert config.find(f"{own}:7") == (own, "7")
    assert config.title("quickstart:pretrain") == "quickstart-pretrain"
    assert config.title(str(own)) == "mine"


def test_unknown_names_and_files_are_refused(tmp_path):
    assert "no config is named 'quikstart'; did you mean quickstart?" in refusal("quikstart")
    assert refusal("base").startswith("no config is named 'base'")
    assert f"there is no config file {tmp_path}/none.py" in refusal(f"{tmp_path}/none.py")
    with pytest.raises(UserError) as caught:
        config.load("quikstart")
    assert caught.value.code == USAGE


def test_base_is_fresh_each_time():
    config.base().optim.lr = 5.0
    assert config.base().optim.lr == 1e-3


def test_a_config_that_loads_another_keeps_its_own_constants(tmp_path):
    for name, steps, start in (
        ("inner", 3, "base()"),
        ("outer", 5, f"load({str(tmp_path / 'inner.py')!r})"),
    ):
        text = f"from vit_scale.config import base, load\nSTEPS = {steps}\n\ndef get_config():\n"
        (tmp_path / f"{name}.py").write_text(
            f"{text}    cfg = {start}\n    cfg.update(dict(steps=STEPS))\n    return cfg\n"
        )
    assert config.load(str(tmp_path / "outer.py")).steps == 5
    assert config.load(str(tmp_path / "inner.py")).steps == 3


def test_load_reads_a_file_with_its_argument(own):
    assert config.load(str(own)).steps == 300
    cfg = config.load(f"{own}:7", ["optim.lr=3e-4"])
    assert (cfg.steps, cfg.optim.lr, cfg.optim.freeze) == (700, 3e-4, ("embed",))
    assert config.load(str(own)).optim.lr == 1e-3, "an override stays in its own config"


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("steps=12", "steps", 12),
        ("model.scan=False", "model.scan", False),
        ("model.scan=true", "model.scan", True),
        ("model.width=64", "model.width", 64),
        ("init.source=runs/a=b", "init.source", "runs/a=b"),
        ("eval.split=", "eval.split", ""),
        ("augment.scale=(0.5, 1.0)", "augment.scale", (0.5, 1.0)),
        ("optim.milestones=(0.5,)", "optim.milestones", (0.5,)),
        ("optim.freeze=('embed', 'blocks/0/')", "optim.freeze", ("embed", "blocks/0/")),
        ("data.fractal.classes=7", "data.fractal.classes", 7),
    ],
)
def test_overrides(item, key, value):
    default = config.fields(config.base())[key]
    result = config.fields(config.override(config.base(), [item]))[key]
    assert result == value != default or (key, value) == ("model.scan", True)
    assert type(result) is type(value)


def test_the_last_override_wins():
    assert config.override(config.base(), ["steps=1", "steps=2"]).steps == 2


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("optim.leraning_rate=1", "no config field is named 'optim.leraning_rate'; "),
        ("optim.wamrup=1", "did you mean optim.warmup"),
        ("modell.depth=1", "did you mean model.depth"),
        ("optim=1", "no config field is named 'optim'"),
        ("steps", "--config.steps needs a value: --config.steps=VALUE"),
        ("steps=many", "steps"),
        ("steps=1.5", "steps"),
        ("optim.lr=fast", "optim.lr"),
        ("model.scan=perhaps", "model.scan"),
        ("model.width=wide", "model.width"),
        ("augment.scale=('a', 'b')", "augment.scale=('a', 'b') must be a tuple such as"),
        ("optim.freeze=(1, 2)", "optim.freeze=(1, 2) must be a tuple such as ('a', 'b')"),
    ],
)
def test_wrong_overrides_are_refused(item, message):
    assert message in refusal(config.base(), [item], call=config.override)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cfg.optim.leraning_rate = 1", "no config field is named 'optim.leraning_rate'"),
        ("cfg.optim.lr = 'fast'", "field 'lr'"),
        ("cfg.optim.freeze = (1,)", "optim.freeze=(1,) must be a tuple"),
        ("del cfg.optim.lr", "has no optim.lr: start it from vit_scale.config.base()"),
        ("cfg = 3", "get_config must return a ConfigDict"),
        ("1 / 0", "division by zero"),
        ("cfg.steps = (", "was never closed"),
    ],
)
def test_wrong_files_are_refused(tmp_path, line, message):
    file = tmp_path / "wrong.py"
    file.write_text(
        "from vit_scale.config import base\n"
        f"def get_config():\n    cfg = base()\n    cfg.unlock()\n    {line}\n    return cfg\n"
    )
    assert message in refusal(str(file))


def test_stored_configs_come_back_equal():
    cfg = config.override(
        config.base(), ["optim.freeze=('embed',)", "data.width=64", "augment.ratio=(0.5, 2.0)"]
    )
    stored = config.to_json(cfg)
    assert stored["optim"]["freeze"] == ["embed"] and stored["data"]["load"] is None
    restored = config.from_json(stored)
    assert config.fields(restored) == config.fields(cfg)
    assert config.to_json(restored) == stored


def test_stored_configs_of_another_version():
    before = [f"{name}={value}" for name, value in config.OLD_DEFAULTS.items()]
    assert config.fields(config.from_json({"steps": 7})) == config.fields(
        config.override(config.base(), ["steps=7", *before])
    ), "a newer field has its default, or what was computed before it"
    message = refusal({"optim": {"novel": 1}}, call=config.from_json)
    assert "the run's config: no config field is named 'optim.novel'" in message
    message = refusal({"steps": "many"}, call=config.from_json)
    assert message == "the run's config: steps='many' has the wrong type"


@pytest.fixture
def removed(monkeypatch) -> str:
    """A field that a former version had."""
    monkeypatch.setitem(config.REMOVED, "model.fused", "all kernels are apart")
    return "model.fused"


def test_what_became_of_a_removed_field_is_one_line(removed):
    for key, text in config.REMOVED.items():
        assert key not in config.fields(config.base())
        message = refusal(config.base(), [f"{key}=float32"], call=config.override)
        assert message == f"{key} was removed: {text}; leave it out"
    assert refusal("quickstart", [f"{removed}=1"]).startswith("model.fused was removed")


def test_a_stored_config_with_a_removed_field_is_read_without_it(removed):
    cfg = config.override(config.base(), ["model.depth=3"])
    stored = config.to_json(cfg)
    stored["model"]["fused"] = True
    assert config.fields(config.from_json(stored)) == config.fields(cfg)


def test_differences_name_the_field_and_both_values():
    old = config.to_json(config.base())
    new = config.to_json(config.override(config.base(), ["optim.lr=0.003", "data.width=64"]))
    assert config.differences(old, old) == []
    assert config.differences(old, new) == [
        "data.width: None -> 64",
        "optim.lr: 0.001 -> 0.003",
    ]
    del old["optim"]["lr"]
    assert "optim.lr: absent -> 0.003" in config.differences(old, new)


def test_image_size_is_square_without_a_width():
    assert config.image_size(config.override(config.base(), ["data.resolution=48"])) == (48, 48)
    assert config.image_size(config.override(config.base(), ["data.width=64"])) == (32, 64)


def test_a_run_keeps_what_it_was_before_a_field_existed(monkeypatch):
    """Where a new field's default computes something else, an old run has the old value."""
    monkeypatch.setitem(config.OLD_DEFAULTS, "optim.clip", 7.0)
    stored = config.to_json(config.base())
    del stored["optim"]["clip"]
    assert config.from_json(stored).optim.clip == 7.0
    assert config.with_old_defaults(config.base(), stored).optim.clip == 7.0
    whole = config.to_json(config.base())
    assert config.from_json(whole).optim.clip == config.base().optim.clip
    assert config.with_old_defaults(config.base(), whole).optim.clip == config.base().optim.clip


def test_what_is_asked_for_wins_over_what_was_before_a_field_existed(monkeypatch):
    """And is refused, as any other change of a run's config."""
    monkeypatch.setitem(config.OLD_DEFAULTS, "optim.clip", 7.0)
    stored = config.to_json(config.base())
    del stored["optim"]["clip"]
    asked = config.override(config.base(), ["optim.clip=3"])
    assert config.with_old_defaults(asked, stored).optim.clip == 3.0 and asked.optim.clip == 3.0

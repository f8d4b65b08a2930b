"""The model card: what a run recorded and nothing else; and what is pushed is what was exported."""

import json
import pathlib
import re
import shlex

import pytest
import yaml

from tests.helpers import fake_hub
from tests.helpers.tiny import (
    CLASSES,
    convnet_config,
    random_params,
    tiny_config,
    tiny_model,
    write_run,
)
from vit_scale import cli, config, pretrained
from vit_scale.checkpoint import Checkpoints
from vit_scale.cli.parser import split_overrides
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.build import build
from vit_scale.runs.json_files import write_json

SETS = {
    "train": {"name": "CIFAR-10 (JPEG) train[:98%]", "images": 400, "fingerprint": "f00d"},
    "final": {"name": "30% /disk/ada/cifar test + 70% gs://a/b test", "images": 96},
}
BEST = {"split": "test", "step": 5, "accuracy": 0.75, "n": 96}
REPORT = {
    "eval": {
        "split": "test",
        "step": 10,
        "accuracy": 0.625,
        "loss": 1.0,
        "n": 96,
        "best": {**BEST, "selected_by": {"split": "train[98%:]", "accuracy": 0.5, "n": 8}},
    }
}


def a_run(folder: pathlib.Path, *overrides: str, step=10, report=REPORT, **extra) -> pathlib.Path:
    extra = {"data": {**SETS["train"], "sets": SETS}} | extra
    write_run(folder, tiny_config(*overrides), random_params(tiny_model()), step, **extra)
    if report:
        write_json(folder / "report.json", report)
    return folder


def card_of(run, out: pathlib.Path, *arguments, **named) -> tuple[dict, str]:
    """(metadata, text) of the card of an export."""
    export(run, "safetensors-timm", out, *arguments, **named)
    _, metadata, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def rows(text: str) -> dict[str, list[str]]:
    """{first cell: the others} of every row of the tables."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_a_card_says_what_the_run_recorded(tmp_path):
    devices = {"kind": "TPU v5e", "count": 8, "hosts": 2}
    git = {"commit": "0123456789abcdef", "dirty": True}
    versions = {"vit_scale": "0.1.0", "jax": "0.10.2"}
    run = a_run(tmp_path / "run", devices=devices, git=git, versions=versions)
    metadata, text = card_of(run, tmp_path / "out")
    assert metadata == {
        "license": "unknown",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vision-transformer", "vit_scale", "timm"],
        "model-index": [
            {
                "name": "tiny",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "cifar10 test", "type": "cifar10", "split": "test"},
                        "metrics": [
                            {"type": "accuracy", "value": 0.625, "name": "accuracy (n = 96)"}
                        ],
                    }
                ],
            }
        ],
    }
    table = rows(text)
    assert table["architecture"][0].endswith("Ti/8: width 16, depth 2, 2 heads, MLP 24")
    assert table["parameters"] == [f"{sum_of(run):,}"]
    assert table["input"] == ["16 x 16 px, patches of 8 px, 2 x 2 of them"]
    assert table["classes"] == ["4: " + ", ".join(f"`{name}`" for name in CLASSES)]
    assert table["training"] == ["CIFAR-10 (JPEG) train[:98%]", "400", "f00d"]
    assert table["final evaluation"][:2] == ["30% cifar test + 70% b test", "96"]
    assert table["began from"] == ["random parameters"]
    assert table["steps"] == ["10 of 8 images, 0.2 epochs"]
    assert table["devices"] == ["8 x TPU v5e, hosts: 2"]
    assert table["versions"] == ["vit_scale 0.1.0, commit 0123456789ab, with changes, jax 0.10.2"]
    assert table["10"] == ["test", "62.50 %", "96", "last step"]
    best = "best step by its accuracy, 0.5000 on train[98%:], n = 8"
    assert table["5"] == ["test", "75.00 %", "96", best]
    assert "**Fill it in**" in text and "/disk" not in text


def sum_of(run: pathlib.Path) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(pretrained.load_model(run).params))


def test_the_command_trains_the_same_config(tmp_path):
    """Except for paths of the machine, and for what a run writes."""
    overrides = (
        *("data.path=/disk/ada/cifar", "augment.mean=(0.4, 0.5, 0.6)", "optim.name=muon"),
        *("init.source=gs://ada/runs/begin", "log.project=secret", "augment.policy=randaug(2,10)"),
        "data.mixture=(('folder:/disk/ada/x', 0.5), ('huggingface:org/set@main', 0.5))",
    )
    metadata, text = card_of(a_run(tmp_path / "run", *overrides), tmp_path / "out")
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    words, fields = split_overrides(shlex.split(command.replace("\\\n", "")))
    assert words == ["vit-scale", "train", "--config", "configs/base.py"]
    repeated = config.to_json(config.override(config.base(), fields))
    expected = config.to_json(tiny_config(*overrides))
    assert config.differences(expected, repeated) == [
        "data.mixture: [['folder:/disk/ada/x', 0.5], ['huggingface:org/set@main', 0.5]] -> "
        "[['folder:DATA', 0.5], ['huggingface:org/set@main', 0.5]]",
        "data.path: /disk/ada/cifar -> DATA",
        "init.source: gs://ada/runs/begin -> SOURCE",
        "log.project: secret -> vit_scale",
    ]
    assert "ada" not in text and "DATA, SOURCE: paths of the machine" in text
    assert rows(text)["began from"] == ["`begin`"] and metadata["datasets"] == ["org/set"]


def test_results_are_those_of_the_exported_step(tmp_path):
    """A best step has its own; one that nobody measured has none."""
    run = a_run(tmp_path / "run", step=5)
    with Checkpoints(run) as checkpoints:
        checkpoints.record(5, {"accuracy": 0.5, "loss": 1.0, "n": 8})
    metadata, text = card_of(run, tmp_path / "best")
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.75
    assert "The exported parameters are those of step 5." in text
    run = a_run(tmp_path / "stopped", "eval.split=train[98%:]", step=5, report={})
    metadata, text = card_of(run, tmp_path / "unmeasured")
    assert "model-index" not in metadata
    assert "The accuracy of the exported parameters, step 5, was not measured." in text
    assert rows(text)["steps"][0].endswith("exported after step 5")
    with Checkpoints(run) as checkpoints:
        checkpoints.record(5, {"accuracy": 0.5, "loss": 1.0, "n": 8})
    metadata, text = card_of(run, tmp_path / "measured")
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "accuracy", "value": 0.5, "name": "accuracy (n = 8)"}
    assert rows(text)["5"] == ["train[98%:]", "50.00 %", "8", "while training"]


def test_differences_of_the_library_are_in_the_card(tmp_path):
    _, text = card_of(a_run(tmp_path / "run", "model.norm_epsilon=1e-5"), tmp_path / "out")
    assert re.search(r"Differences:\n\n- this model has norm_epsilon=1e-05", text)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fake_hub.served() as server:
        fake_hub.use(server, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield server


def test_one_file_has_a_card_if_asked(tmp_path):
    run, file = a_run(tmp_path / "run"), tmp_path / "tiny.safetensors"
    lines = export(run, "safetensors", file, licence="mit", dtype="float16", card=True)
    assert lines[-1].startswith(f"{tmp_path}/tiny.md: ")
    _, metadata, text = (tmp_path / "tiny.md").read_text().split("---\n", 2)
    content = yaml.safe_load(metadata)
    assert (content["license"], content["library_name"]) == ("mit", "vit_scale")
    assert len(set(content["tags"])) == len(content["tags"])
    assert content["model-index"][0]["name"] == "tiny"
    assert "in float32, before the parameters were rounded to float16." in text
    assert "vit-scale predict tiny.safetensors image.jpg" in text
    assert 'vit_scale.load("tiny.safetensors")' in text
    assert "timm" not in text

    export(run, "safetensors", tmp_path / "plain.safetensors", card=True)
    assert "rounded" not in (tmp_path / "plain.md").read_text()
    export(run, "safetensors", tmp_path / "bare.safetensors")
    assert not (tmp_path / "bare.md").exists()


def test_a_convolutional_network_has_a_card(tmp_path):
    cfg = convnet_config("resnet20")
    params = random_params(build(cfg.model, config.image_size(cfg)))
    write_run(tmp_path / "run", cfg, params, 10)
    arguments = ["--format", "safetensors", "--out", str(tmp_path / "my net.safetensors"), "--card"]
    assert cli.main(["export", str(tmp_path / "run"), *arguments]) == 0
    text = (tmp_path / "my net.md").read_text()
    assert rows(text)["architecture"] == ["convolutional network, resnet20"]
    assert re.fullmatch(r"\d+ x \d+ px", rows(text)["input"][0])
    assert "ision" not in text and "patches" not in text
    assert "vit-scale predict 'my net.safetensors' image.jpg" in text


def test_the_card_of_a_file_leaves_out_what_the_file_left_out(tmp_path):
    """A file has no paths, so what its model began from is not known."""
    source = a_run(tmp_path / "source")
    run = a_run(tmp_path / "run", f"init.source={source}")
    export(run, "safetensors", tmp_path / "one.safetensors", card=True)
    assert rows((tmp_path / "one.md").read_text())["began from"] == ["`source`"]
    export(tmp_path / "one.safetensors", "safetensors", tmp_path / "two.safetensors", card=True)
    text = (tmp_path / "two.md").read_text()
    assert "random parameters" not in text and "None" not in text
    assert "vit-scale train" not in text and "doesn't say what it began from" in text


def test_the_card_of_a_model_without_a_head(tmp_path):
    cfg = tiny_config("model.classes=0", "objective=mae", "optim.clip=0.")
    params = random_params(build(cfg.model, config.image_size(cfg)))
    data = {**SETS["train"], "sets": SETS}
    run = write_run(tmp_path / "run", cfg, params, 10, classes=[], data=data)
    (line, *_) = export(run, "safetensors", tmp_path / "one.safetensors", card=True)
    assert "predict" not in line
    text = (tmp_path / "one.md").read_text()
    assert 'model.features(model.read("image.jpg")[None])' in text
    assert rows(text)["objective"] == ["mae"]
    assert rows(text)["optimizer"] == ["adamw, weight decay 0, gradients not clipped"]
    assert "predict" not in text and "model.top" not in text
    export(run, "safetensors-hf", tmp_path / "hf")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "AutoModel.from_pretrained" in text and "ForImageClassification" not in text


def test_the_card_of_an_encoder_of_unlabelled_images_that_got_a_head(tmp_path):
    cfg = tiny_config("model.classes=0", "objective=mae", "optim.clip=0.", "data.target=none")
    run = write_run(tmp_path / "run", cfg, random_params(build(cfg.model, (16, 16))))
    pretrained.convert(run, tmp_path / "headed", ["model.classes=3"])
    export(tmp_path / "headed", "safetensors-timm", tmp_path / "timm")
    assert "An image classifier" in (tmp_path / "timm/README.md").read_text()


def test_the_card_of_a_regression(tmp_path):
    run = a_run(
        tmp_path / "run", "data.target=value", "objective=regression", "loss=mse", report=None
    )
    metadata, text = card_of(run, tmp_path / "out")
    assert "pipeline_tag" not in metadata and metadata["tags"][0] == "image-regression"
    assert rows(text)["numbers"][0].startswith("4: ") and "classif" not in text.split("## Use")[0]


def test_the_card_of_an_average_has_no_command(tmp_path):
    source = ["mean of /disk/ada/one, runs/two"]
    _, text = card_of(a_run(tmp_path / "run", source=source, report=None), tmp_path / "out")
    assert "made of other models: mean of one, two." in text
    assert "vit-scale train" not in text and "began from" not in text


def test_the_learning_rate_with_all_that_changes_it(tmp_path):
    fields = ("optim.schedule=cosine", "optim.end=.1", "optim.cooldown=4", "optim.layer_decay=.5")
    text = card_of(a_run(tmp_path / "run", *fields), tmp_path / "out")[1]
    assert rows(text)["learning rate"] == [
        "0.001, cosine, 0 steps of warm-up, down to 0.1 of it, 4 steps of cool-down (linear), "
        "times 0.5 per block below the head"
    ]


def test_a_folders_readme_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my project")
    with pytest.raises(UserError, match="which isn't one: move it away"):
        card_of(a_run(tmp_path / "run"), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["README.md"]


def test_a_card_replaces_nothing_but_a_card(tmp_path):
    run, notes, file = a_run(tmp_path / "run"), tmp_path / "a.md", tmp_path / "a.safetensors"
    notes.write_text("my notes")
    with pytest.raises(
        UserError, match=re.escape(f"the model card would replace {notes}, which isn't")
    ):
        export(run, "safetensors", file, card=True)
    assert notes.read_text() == "my notes" and not file.exists()
    notes.unlink()
    for licence in ("mit", "cc0-1.0"):
        export(run, "safetensors", file, licence=licence, card=True)
        assert f"license: {licence}\n" in notes.read_text()


@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        ("jax", {"card": True}, "--card is for the format safetensors, not jax, which has none"),
        ("safetensors-timm", {"card": True}, "not safetensors-timm, whose folder has one anyway"),
        ("safetensors", {"licence": "mit"}, "--license is for model cards: add --card"),
        ("safetensors", {"card": True, "push": "a/b"}, "--push is for the formats"),
        ("safetensors", {"card": True, "private": True}, "--private is of a repository"),
        (
            "jax",
            {"licence": "mit"},
            "--license is for the formats safetensors-timm, safetensors-hf, not jax",
        ),
    ],
)
def test_cards_that_no_export_has_are_refused(tmp_path, kind, flags, line):
    with pytest.raises(UserError, match=re.escape(line)):
        export(a_run(tmp_path / "run"), kind, tmp_path / "out.safetensors", **flags)


def test_the_model_that_training_began_from(hub, tmp_path):
    """Also through a run in between; its licence, unless another is given."""
    run = a_run(tmp_path / "between")
    card_of(run, tmp_path / "source")
    files = {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    files["README.md"] = b"---\nlicense: other\nlicense_name: cc-by-nc-4.0\n---\n"
    address = f"hf://org/tiny@{hub.add('org/tiny', files)}"
    pretrained.convert("hf://org/tiny", tmp_path / "converted")
    _, text = card_of("hf://org/tiny", tmp_path / "straight")
    assert text.startswith("\n# tiny\n") and f"the weights are those of `{address}`" in text
    metadata, text = card_of(tmp_path / "converted", tmp_path / "a")
    assert (metadata["base_model"], metadata["license"]) == ("org/tiny", "cc-by-nc-4.0")
    assert f"the weights are those of `{address}`" in text and "model-index" not in metadata
    run = a_run(tmp_path / "tuned", f"init.source={tmp_path}/converted")
    metadata, text = card_of(run, tmp_path / "b")
    assert (metadata["base_model"], metadata["license"]) == ("org/tiny", "cc-by-nc-4.0")
    assert rows(text)["began from"] == [f"`converted` from `{address}`"]
    assert "cc-by-nc-4.0, as stated by `org/tiny`" in text
    metadata, text = card_of(run, tmp_path / "c", licence="Apache-2.0")
    assert metadata["license"] == "apache-2.0" and "\n\napache-2.0.\n" in text


@pytest.mark.parametrize("kind", ["safetensors-timm", "safetensors-hf"])
def test_what_is_pushed_is_what_was_exported(hub, tmp_path, kind, capsys):
    run, out = a_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "secret.txt").write_text("of another export")
    flags = ["--license", "mit", "--push", "org/new", "--private"]
    for accuracy in (0.5, 0.625):  # twice: the second is another commit
        write_json(run / "report.json", {"eval": {**REPORT["eval"], "accuracy": accuracy}})
        assert cli.main(["export", str(run), "--format", kind, "--out", str(out), *flags]) == 0
        exported = {file.name: file.read_bytes() for file in out.iterdir()}
        del exported["secret.txt"]
        assert hub.files("org/new") == exported
    commit = list(hub.commits["org/new"])[-1]
    assert capsys.readouterr().out.splitlines()[-1] == f"hf://org/new@{commit}"
    assert hub.private == {"org/new"} and hub.messages[-1] == f"{kind} by vit_scale, step 10"
    assert set(exported) >= {"README.md", "config.json", "model.safetensors"}
    back = pretrained.load_model("hf://org/new")
    assert back.classes == CLASSES and "licence: mit" in back.notes[0]
    path = {"safetensors-timm": 'create_model("hf-hub:org/new"'}.get(kind, 'pretrained("org/new")')
    assert path in exported["README.md"].decode()
    assert 'vit_scale.load("hf://org/new")' in exported["README.md"].decode()


def refusal(run, out, kind="safetensors-timm", **named) -> str:
    with pytest.raises(UserError) as caught:
        export(run, kind, out, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pushes_that_are_refused_before_exporting(hub, tmp_path, monkeypatch):
    run, out = a_run(tmp_path / "run"), tmp_path / "out"
    refuse = lambda **named: refusal(run, out, **named)  # noqa: E731
    assert refuse(push="new") == "--push 'new' is not the name of a repository: ORG/NAME"
    assert refuse(private=True) == "--private is of a repository: give --push ORG/NAME too"
    assert "--push is for the formats safetensors-timm, " in refuse(kind="npz", push="org/new")
    assert "--license is for the formats safetensors-timm, " in refuse(kind="jax", licence="mit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "needs a network, and HF_HUB_OFFLINE is set" in refuse(push="org/new")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert refuse(push="org/new") == (
        "--push org/new needs a token that may write there: run `hf auth login`, or set HF_TOKEN"
    )
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "--push org/new needs the package huggingface_hub" in refuse(push="org/new")
    assert not out.exists() and not hub.requests


def test_pushes_that_fail_leave_the_export(hub, tmp_path, monkeypatch):
    run, out = a_run(tmp_path / "run"), tmp_path / "out"
    hub.add("org/old", {"README.md": b"public"})
    message = refusal(run, out, push="org/old", private=True)
    assert message == (
        f"hf://org/old is public, not private; nothing was uploaded: {out} is complete: rerun the "
        "command to upload it"
    )
    assert hub.files("org/old") == {"README.md": b"public"}
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    message = refusal(run, out, push="org/new")
    assert message.startswith("cannot push to hf://org/new: ") and "may not write there" in message
    assert message.endswith(f"{out} is complete: rerun the command to upload it")
    assert json.loads((out / "config.json").read_text())["num_classes"] == 4

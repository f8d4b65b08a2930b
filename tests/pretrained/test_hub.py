"""Models on the Hugging Face Hub: what is read is what is there, of a commit that is named."""

import json
import pathlib

import numpy as np
import pytest

from tests.helpers import fake_hub
from tests.helpers.tiny import random_images
from vit_scale import config, pretrained
from vit_scale.errors import UserError
from vit_scale.pretrained import hub as hub_module
from vit_scale.pretrained import weight_files
from vit_scale.runs import read_json, resumed_config, write_json
from vit_scale.storage.download import Unreachable
from vit_scale.training import trainer
from vit_scale.training.objectives.teacher import with_checksum

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
MODEL = {file.name: file.read_bytes() for file in (GOLDEN / "huggingface").iterdir()}
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"
NAME = "org/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fake_hub.served() as server:
        fake_hub.use(server, tmp_path / "cache", monkeypatch)
        yield server


def same(loaded: pretrained.Pretrained, file: str = "huggingface") -> None:
    """The same parameters and logits as of the files on disk."""
    import jax

    expected = pretrained.load_model(GOLDEN / file, pretrained.Hints(heads=3))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    size = config.image_size(expected.cfg)
    images = np.float32(random_images(2, size)) / 255
    logits = [one.model.apply(one.params, images) for one in (loaded, expected)]
    np.testing.assert_array_equal(*logits)
    assert loaded.classes == expected.classes


def line(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def downloads(hub: fake_hub.Hub) -> list[str]:
    """The names of the files that were sent, in order of the alphabet."""
    sent = [one for one in hub.requests if one.startswith("GET") and "/resolve/" in one]
    return sorted(one.rpartition("/")[2] for one in sent)


@pytest.mark.parametrize("name", [f"hf://{NAME}", NAME])
def test_a_model_is_read_as_from_the_disk(hub, name):
    others = {"README.md": CARD, "pytorch_model.bin": b"not read", "train.log": b"nor this"}
    commit = hub.add(NAME, MODEL | others)
    loaded = pretrained.load_model(name)
    same(loaded)
    assert loaded.source == f"hf://{NAME}@{commit}"
    assert loaded.notes[0] == f"hf://{NAME}@{commit}, licence: apache-2.0"
    assert downloads(hub) == sorted([*MODEL, "README.md"])


def test_a_revision_and_a_file(hub):
    npz = (GOLDEN / "google.npz").read_bytes()
    first = hub.add(NAME, {"sub/B_16.npz": npz, "sub/config.json": b"{}", "config.json": b"["})
    hub.add(NAME, {"README.md": b"empty now"})
    hints = pretrained.Hints(heads=3)
    loaded = pretrained.load_model(f"hf://{NAME}@{first}/sub/B_16.npz", hints)
    same(loaded, "google.npz")
    assert loaded.source == f"hf://{NAME}@{first}/sub/B_16.npz"
    assert loaded.notes[0].endswith("B_16.npz, licence: not stated")


def test_shards_and_names_by_rank(hub):
    arrays = weight_files.read_arrays(GOLDEN / "huggingface" / "model.safetensors")
    names, files = sorted(arrays), dict(MODEL)
    whole = files.pop("model.safetensors")
    folder = pathlib.Path("shards")
    folder.mkdir()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = folder / f"model-0000{number}-of-00002.safetensors"
        weight_files.write_safetensors(file, {name: arrays[name] for name in part})
        files[file.name] = file.read_bytes()
        weight_map |= dict.fromkeys(part, file.name)
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.add(
        "org/shards",
        files | {"model.safetensors.index.json": index, "open_clip_model.safetensors": b""},
    )
    same(pretrained.load_model("hf://org/shards"))
    files = {name: data for name, data in MODEL.items() if name != "model.safetensors"}
    hub.add("org/clip", files | {"open_clip_model.safetensors": whole})
    same(pretrained.load_model("hf://org/clip"))


def test_an_interrupted_download_resumes(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add(NAME, MODEL)
    hub.cut["model.safetensors"] = 5000
    same(pretrained.load_model(f"hf://{NAME}"))
    assert hub.ranges == ["bytes=5000-"]


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_in_the_cache_needs_no_network(hub, offline, monkeypatch):
    commit = hub.add(NAME, MODEL | {"README.md": CARD})
    pretrained.load_model(f"hf://{NAME}")
    asked = len(hub.requests)
    hub.add(NAME, {"config.json": b"{}"})  # not seen without a network
    away(hub, offline, monkeypatch)
    for source in (NAME, f"hf://{NAME}", f"hf://{NAME}@{commit}"):
        loaded = pretrained.load_model(source)
        same(loaded)
        assert loaded.notes[0] == f"hf://{NAME}@{commit}, licence: apache-2.0"
    assert len(hub.requests) == asked


def away(hub, offline: bool, monkeypatch) -> None:
    """Set HF_HUB_OFFLINE, or have a network on which nobody answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if not offline:
        closed = "http://127.0.0.1:9"
        monkeypatch.setattr(constants, "ENDPOINT", closed)


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_line_says_what_to_fetch(hub, offline, monkeypatch):
    away(hub, offline, monkeypatch)
    why = "HF_HUB_OFFLINE is set" if offline else "the Hub can't be reached"
    assert line(pretrained.load_model, f"hf://{NAME}") == (
        f"hf://{NAME} is not in the cache, and {why}; on a machine with a network run "
        f"`hf download {NAME} --local-dir DIR`, and give DIR"
    )
    with pytest.raises(Unreachable, match=f"{NAME} does not exist here, and hf://{NAME} is not in"):
        pretrained.load_model(NAME)


def test_a_cache_that_lacks_a_file_is_not_enough(hub, monkeypatch):
    """Without preprocessor_config.json the model would be read with other pixels."""
    commit = hub.add(NAME, MODEL)
    pretrained.load_model(f"hf://{NAME}")
    (file,) = pathlib.Path("cache").rglob(f"snapshots/{commit}/preprocessor_config.json")
    file.unlink()
    away(hub, True, monkeypatch)
    assert "is not in the cache" in line(pretrained.load_model, f"hf://{NAME}")


def test_refusals(hub, monkeypatch):
    load = pretrained.load_model
    hub.add(NAME, {"a.npz": b"", "b.pth": b"", "config.json": b"{}"})
    assert line(load, "hf://org/nobody") == (
        "the Hub has no model org/nobody, or it is private: correct the name, or run `hf auth "
        "login`, or set HF_TOKEN"
    )
    assert line(load, "org/nobody").startswith("org/nobody does not exist here, and the Hub has no")
    assert (
        line(load, f"hf://{NAME}@v2") == f"hf://{NAME}@v2: {NAME} has no such revision on the Hub"
    )
    assert "has no such revision" in line(load, f"hf://{NAME}@{'0' * 40}")
    message = line(load, f"hf://{NAME}")
    assert "has no model.safetensors or" in message and "/FILE: a.npz, b.pth" in message
    assert "has no such file; did you mean a.npz?" in line(load, f"hf://{NAME}/aa.npz")
    assert "is a dataset, not a model" in line(load, "hf://datasets/org/tiny")
    assert "Invalid HF URI" in line(load, "hf://tiny")
    hub.gated.add(NAME)
    assert line(load, f"hf://{NAME}").startswith(f"hf://{NAME} is gated: accept its conditions")


def test_a_private_model_needs_the_token(hub, monkeypatch):
    hub.add(NAME, MODEL)
    hub.private.add(NAME)
    assert "or it is private" in line(pretrained.load_model, f"hf://{NAME}")
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    same(pretrained.load_model(f"hf://{NAME}"))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    end = f"needs the package huggingface_hub for the Hugging Face Hub: {hub_module.INSTALL}"
    assert line(pretrained.load_model, f"hf://{NAME}") == f"hf://{NAME} {end}"
    assert line(pretrained.load_model, NAME) == f"{NAME} does not exist here, and {end}"


def test_what_is_no_address(tmp_path, monkeypatch):
    """A mistyped path in a folder that exists is not asked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for text in (
        "runs/vit",
        "weights/vit",
        "absent/B_16.npz",
        "runs",
        "a/b/c",
        "./vit",
        "/a/b",
        "gs://a/b",
    ):
        assert not hub_module.is_address(text)
        assert hub_module.pinned(text) == text
    assert hub_module.is_address("google/vit") and hub_module.is_address("hf://runs/vit")
    commit = "0" * 40  # is resolved already
    assert hub_module.pinned(f"google/vit@{commit}") == f"hf://google/vit@{commit}"


def test_a_run_records_the_commit_and_keeps_it(hub, tmp_path):
    """Also where it was killed before its first checkpoint, and the model changed since."""
    commit = hub.add(NAME, MODEL)
    cfg = config.override(config.base(), [f"init.source={NAME}"])
    began = pretrained.with_commit(cfg)
    assert began.init.source == f"hf://{NAME}@{commit}" and cfg.init.source == NAME
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "run.json", {"config": config.to_json(began)})
    hub.add(NAME, MODEL | {"README.md": CARD})
    for typed in (NAME, f"hf://{NAME}"):
        cfg.init.source = typed
        resumed = pretrained.with_commit(resumed_config(cfg, tmp_path / "run"))
        assert resumed.init.source == f"hf://{NAME}@{commit}"
    cfg.init.source = "hf://org/other"
    assert resumed_config(cfg, tmp_path / "run").init.source == "hf://org/other"


def test_training_begins_with_the_commit(hub, tmp_path, monkeypatch):
    commit = hub.add(NAME, MODEL)

    def make_setup(cfg):
        raise UserError(cfg.init.source)

    monkeypatch.setattr(trainer, "make_setup", make_setup)
    cfg = config.override(config.base(), [f"init.source=hf://{NAME}@main"])
    assert line(trainer.train, cfg, tmp_path / "run", "tiny") == f"hf://{NAME}@{commit}"


def test_a_converted_model_says_where_it_is_from(hub, tmp_path):
    commit = hub.add(NAME, MODEL | {"README.md": CARD})
    pretrained.convert(f"hf://{NAME}", tmp_path / "run")
    stored = read_json(tmp_path / "run" / "run.json")
    assert stored["config"]["init"]["source"] == f"hf://{NAME}@{commit}"
    assert stored["source"][0] == f"hf://{NAME}@{commit}, licence: apache-2.0"


def test_only_weights_are_on_the_hub():
    """Such as where a run is needed that teaches."""
    cfg = config.override(
        config.base(), ["objective=distillation", "distill.teacher=hf://org/tiny"]
    )
    assert line(with_checksum, cfg) == (
        "hf://org/tiny: a run is needed here, and on the Hugging Face Hub are only weights; make "
        "it one: vit-scale convert hf://org/tiny RUN"
    )


def test_the_command_line_reads_from_the_hub(hub, tmp_path, run_cli):
    """With nothing but huggingface_hub's own variables."""
    commit = hub.add(NAME, MODEL)
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = run_cli("convert", f"hf://{NAME}", "run", env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"hf://{NAME}@{commit}, licence: not stated\n")
    same(pretrained.load_model(tmp_path / "run"))

"""Broken and unsupported weight files: each is a one-line error, and no code is executed."""

import hashlib
import http.server
import importlib.util
import json
import pathlib
import pickle
import re
import shutil
import threading
import zipfile

import numpy as np
import pytest

from tests.helpers.tiny import random_params, tiny_config, write_run
from vit_scale import cli, config, pretrained
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.build import build
from vit_scale.pretrained import Hints, weight_files
from vit_scale.storage import download
from vit_scale.storage.download import Unreachable
from vit_scale.training.init_state import check_source, init_state
from vit_scale.training.setup import make_setup

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
HEADS = Hints(heads=3)


def refused(source, *says: str, hints: Hints = HEADS) -> str:
    """The one-line error of loading `source`, which contains `says` in this order."""
    with pytest.raises(UserError) as caught:
        pretrained.load_model(source, hints)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 700
    assert re.search(".*".join(map(re.escape, map(str, says))), line), line
    return line


def changed(case: str, file: pathlib.Path, **changes) -> pathlib.Path:
    """A golden model's file with other arrays; an array of None is left out."""
    arrays = weight_files.read_arrays(weight_files.find_weight_file(GOLDEN / case)) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    write = weight_files.write_npz if file.suffix == ".npz" else weight_files.write_safetensors
    write(file, arrays)
    return file


# The file


@pytest.mark.parametrize("case", ["google.npz", "timm.safetensors"])
def test_a_truncated_file(case, tmp_path):
    whole = (GOLDEN / case).read_bytes()
    file = tmp_path / case
    for length in (len(whole) // 2, len(whole) - 1, 200):
        file.write_bytes(whole[:length])
        refused(file, file, "is damaged or truncated", "get a new copy")
    for length in (0, 3):
        file.write_bytes(whole[:length])
        refused(file, file, "is not a .npz, .safetensors or PyTorch file", "truncated")


def test_a_file_with_a_flipped_bit(tmp_path):
    content = bytearray((GOLDEN / "google.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    refused(tmp_path / "x.npz", "x.npz is damaged or truncated")


def test_an_html_page(tmp_path):
    for name in ("x.npz", "x.safetensors", "x.pth"):
        (tmp_path / name).write_text("\n<!DOCTYPE html><html>Sign in</html>")
        refused(tmp_path / name, name, "is an HTML page, not weights")


def test_other_files(tmp_path):
    (tmp_path / "text.npz").write_text("name,accuracy\nB/16,0.98\n")
    refused(tmp_path / "text.npz", "is not a .npz", "b'name,acc'")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(
        tmp_path / "other.npz", "is a zip archive without weights; its first file is readme.txt"
    )
    np.savez(tmp_path / "empty.npz")
    refused(tmp_path / "empty.npz", "empty.npz")
    refused(tmp_path / "none.npz", "none.npz is not a run folder", "or weights")
    refused(tmp_path, "is not a run folder", "or weights (.npz, .safetensors")


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def test_a_pickle_is_never_executed(tmp_path):
    marker = tmp_path / "ran"
    says = "contains pickled code" if importlib.util.find_spec("torch") else "pip install torch"
    for name in ("x.pth", "x.npz", "x.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Evil(marker)}, protocol=2))
        refused(tmp_path / name, name, says, "safetensors.torch.save_file")
    refused(tmp_path, "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "new.pth", "w") as archive:  # as torch has saved since 1.6
        archive.writestr("new/data.pkl", pickle.dumps({"model": Evil(marker)}, protocol=2))
        archive.writestr("new/version", "3\n")
        archive.writestr("new/byteorder", "little")
    refused(tmp_path / "new.pth", "new.pth", says)
    np.savez(tmp_path / "objects.npz", head=np.array([Evil(marker)], object))
    refused(tmp_path / "objects.npz", "contains pickled Python objects", "not executed")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "it would have been seen"


# The arrays


def test_wrong_shapes_are_reported_by_the_keys_of_the_file(tmp_path):
    file = changed("google.npz", tmp_path / "x.npz", **{"head/kernel": np.zeros((7, 5), "f")})
    refused(
        file, file, "not a complete google ViT", "wrong shape: head/kernel (7, 5), expected (12, 5)"
    )
    mlp = "vit.encoder.layer.1.intermediate.dense.weight"
    file = changed("huggingface", tmp_path / "x.safetensors", **{mlp: np.zeros((3, 12), "f")})
    refused(file, "wrong shape", f"{mlp} (3, 12), expected (20, 12)")
    for shape in ((35, 12), (36,), ()):
        qkv = {"blocks.0.attn.qkv.weight": np.zeros(shape, "f")}
        file = changed("timm.safetensors", tmp_path / "x.safetensors", **qkv)
        refused(file, "blocks.0.attn.qkv.weight has the wrong shape")
    embed = {"embedding/kernel": np.zeros((4, 12), "f")}
    file = changed("google.npz", tmp_path / "x.npz", **embed)
    refused(file, "embedding/kernel has the wrong shape, (4, 12)")


def test_a_missing_array(tmp_path):
    file = changed("timm.safetensors", tmp_path / "x.safetensors", **{"norm.bias": None})
    refused(file, file, "missing: norm.bias")
    gone = {
        name: None
        for name in weight_files.read_arrays(GOLDEN / "google.npz")
        if "encoderblock_1" in name
    }
    gone.popitem()
    file = changed("google.npz", tmp_path / "x.npz", **gone)
    refused(file, "missing: Transformer/encoderblock_1/", "and 9 more")
    file = changed("big_vision-map.npz", tmp_path / "x.npz", pos_embedding=None)
    assert "no position embeddings are stored" in pretrained.load_model(file).notes[1]
    file = changed("timm.safetensors", tmp_path / "x.safetensors", pos_embed=None)
    refused(file, "missing: pos_embed")


def test_an_extra_array(tmp_path):
    extra = {"blocks.0.attn.rel_pos": np.ones(12, "f"), "rope_2d": np.ones((1, 4, 12), "f")}
    file = changed("timm.safetensors", tmp_path / "x.safetensors", **extra)
    says = "unexpected arrays: blocks.0.attn.rel_pos, rope_2d (relative positions, rotary positions"
    refused(file, says)
    # Also if other checks would fail as well.
    extra |= {"pos_embed": np.ones((1, 14, 12), "f"), "norm.bias": None}
    refused(changed("timm.safetensors", tmp_path / "x.safetensors", **extra), says)
    norm = {"fc_norm.weight": np.ones(12, "f"), "fc_norm.bias": np.ones(12, "f")}
    file = changed("timm.safetensors", tmp_path / "x.safetensors", **norm)
    refused(file, "it has norm before pooling and fc_norm after it")
    token = {"dist_token": np.ones((1, 1, 12), "f")}
    file = changed("timm.safetensors", tmp_path / "x.safetensors", **token)
    refused(file, "10 position embeddings are for 8 patches", hints=HEADS)
    file = changed(
        "timm-distilled.safetensors", tmp_path / "x.safetensors", **{"head_dist.bias": None}
    )
    refused(file, "missing: head_dist.bias")


def test_an_unknown_format_and_a_wrong_one(tmp_path):
    np.savez(tmp_path / "x.npz", **{f"conv{i}": np.ones(3) for i in range(9)})
    refused(tmp_path / "x.npz", "unknown weight format", "conv0", "and 3 more")
    wrong = HEADS._replace(format="timm")
    refused(GOLDEN / "google.npz", "patch_embed.proj.weight is missing", "Transf", hints=wrong)


# Metadata


def test_a_config_json_that_contradicts_the_arrays(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "huggingface", folder)

    def says(**fields):
        content = json.loads((GOLDEN / "huggingface" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | fields))

    says(hidden_act="relu")
    refused(folder, "has the activation relu")
    says(num_attention_heads=5)
    refused(folder, "model.safetensors", "12 is not divisible by 5 heads")
    says(id2label={"0": "ant", "1": "bee"})
    refused(folder, "names 2 classes, but the head has 5 outputs")
    says(image_size=20)
    assert pretrained.load_model(folder).model.shape.grid == (3, 3), "the arrays decide"
    says(num_attention_heads="many")
    refused(folder, "is not as Hugging Face transformers writes it")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    refused(folder, "is not as Hugging Face transformers writes it", "num_attention_heads")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: ")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json is not a JSON object")
    (folder / "config.json").write_text("{}")
    refused(folder, "set --config.model.heads", hints=Hints())


def test_attention_pooling_of_timm_over_other_tokens(tmp_path):
    """Of [CLS] and registers VisionTransformer pools neither, Eva both; here [CLS] is pooled."""
    arrays = weight_files.read_arrays(
        weight_files.find_weight_file(GOLDEN / "timm-map.safetensors")
    )
    width = arrays["pos_embed"].shape[-1]
    tokens = {name: np.ones((1, 1, width), np.float32) for name in ("cls_token", "reg_token")}

    def write(architecture: str, *names: str) -> None:
        chosen = {name: tokens[name] for name in names}
        changed("timm-map.safetensors", tmp_path / weight_files.SAFETENSORS, **chosen)
        says = {
            "architecture": architecture,
            "model_args": {"num_heads": 3, "no_embed_class": True},
        }
        (tmp_path / "config.json").write_text(json.dumps(says) if architecture else "{}")

    write("vit_base_patch16_224", "cls_token")
    refused(tmp_path, "VisionTransformer pools by attention without [CLS]")
    write("vit_pe_core_base_patch16_224", "cls_token", "reg_token")
    refused(tmp_path, "Eva pools registers by attention")
    for names in (["cls_token"], ["reg_token"]):
        write("", *names)
        refused(tmp_path, "pool other tokens by attention: set --config.init.architecture")
    write("test_vit3", "reg_token")
    refused(tmp_path, "test_vit3 of timm has attention pooling of [CLS] and registers")
    for architecture, name in (("vit_base_patch16_224", "reg_token"), ("vit_pe_x", "cls_token")):
        write(architecture, name)
        assert pretrained.load_model(tmp_path, HEADS).cfg.model.pool == "map"


def test_a_timm_model_that_is_not_a_plain_vit(tmp_path):
    shutil.copy(GOLDEN / "timm.safetensors", tmp_path / weight_files.SAFETENSORS)

    def says(**arguments):
        content = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
        (tmp_path / "config.json").write_text(json.dumps(content))

    says(num_heads=3, global_pool="map")
    refused(tmp_path, "the metadata says pool=map", "those of pool=cls")
    says(num_heads=3, global_pool="avgmax")
    refused(tmp_path, "global_pool=avgmax, which is not supported; supported: token, avg, map")
    says(num_heads=3, attn_layer="differential")
    refused(tmp_path, "attn_layer=differential, not a plain ViT")
    says(num_heads=3, norm_layer="batchnorm")
    refused(tmp_path, "norm_layer=batchnorm, which is not supported")
    says(num_heads=3, norm_layer="rmsnorm")  # which has no biases
    refused(tmp_path, "unexpected: blocks.0.norm1.bias")
    says(num_heads=3, act_layer="silu")
    refused(tmp_path, "has the activation silu")
    says(num_heads=3)
    assert pretrained.load_model(tmp_path).model.shape.size.heads == 3


# The command line


def test_commands_report_errors_in_one_line(tmp_path, capsys):
    (tmp_path / "x.npz").write_text("<html>")

    def line(*arguments) -> str:
        assert cli.main([*map(str, arguments)]) in (1, 2)
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("vit-scale: ")
        return err

    assert "an HTML page" in line("convert", tmp_path / "x.npz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "is not a run folder" in line("convert", tmp_path / "y", tmp_path / "out")
    assert "init.dialect" in line(
        "convert", GOLDEN / "google.npz", tmp_path / "out", "--config.init.dialect=goggle"
    )
    assert "init.head='kep'" in line(
        "convert", GOLDEN / "google.npz", tmp_path / "out", "--config.init.head=kep"
    )
    assert "is not a run folder" in line("export", tmp_path, "--format", "npz", "--out", "x.npz")
    assert "did you mean jax" in line("export", tmp_path, "--format", "jx", "--out", "x")
    assert not (tmp_path / "out").exists()


# From a server


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        if (checksum := self.server.checksum) and self.path.endswith("npz"):
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={checksum}")
        super().end_headers()

    def log_message(self, form, *values):
        self.server.asked.append(self.path)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves the golden files, as if by https://; downloads are cached in `tmp_path`."""
    monkeypatch.setattr(download, "UNENCRYPTED", "none")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def handler(*arguments):
        return Handler(*arguments, directory=str(GOLDEN))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.checksum, server.asked = "", []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def test_weights_from_a_server_are_cached(server, tmp_path):
    url = f"{server.url}/google.npz"
    loaded = pretrained.load_model(url)
    here = tmp_path / "cache/vit_scale/weights" / f"127.0.0.1:{server.server_port}" / "google.npz"
    assert loaded.path == here and here.read_bytes() == (GOLDEN / "google.npz").read_bytes()
    pretrained.load_model(url)
    assert server.asked.count("/google.npz") == 1


def test_metadata_beside_weights_is_downloaded_too(server):
    loaded = pretrained.load_model(f"{server.url}/huggingface/model.safetensors")
    assert loaded.classes == ("ant", "bee", "cat", "dog", "eel")
    assert loaded.cfg.augment.mean == (0.4, 0.5, 0.6)
    loaded = pretrained.load_model(
        f"{server.url}/timm.safetensors", HEADS
    )  # there is no config.json
    assert loaded.cfg.model.classes == 5


def test_checksums_are_verified(server):
    import base64

    content = (GOLDEN / "google.npz").read_bytes()
    server.checksum = base64.b64encode(bytes(16)).decode()
    refused(f"{server.url}/google.npz", "has MD5", f"not {'0' * 32}", "damaged or a different file")
    good = hashlib.sha256(content).hexdigest()
    pretrained.load_model(f"{server.url}/google.npz#sha256={good}")
    server.checksum = base64.b64encode(hashlib.md5(content).digest()).decode()
    refused(f"{server.url}/google-gap.npz", "has MD5")
    refused(f"{server.url}/google.npz#sha256={'0' * 64}", "has SHA256")
    refused(f"{server.url}/google.npz#crc=1", "is neither md5=HEX nor sha256=HEX")


def test_http_needs_a_checksum_and_takes_only_the_file_that_it_covers(server, monkeypatch):
    monkeypatch.setattr(download, "UNENCRYPTED", "http://")
    refused(f"{server.url}/google.npz", "is neither encrypted nor verified", "#sha256=HEX")
    assert server.asked == []
    content = (GOLDEN / "huggingface/model.safetensors").read_bytes()
    checksum = f"#sha256={hashlib.sha256(content).hexdigest()}"
    with pytest.raises(UserError):  # without config.json nothing says how many heads it has
        pretrained.load_model(f"{server.url}/huggingface/model.safetensors{checksum}", Hints())
    assert server.asked == ["/huggingface/model.safetensors"]


@pytest.mark.parametrize(
    "path",
    [
        "../../../google.npz",
        "a/../../../../google.npz",
        "%2e%2e/%2E./../google.npz",
        "a/%2e%2e/google.npz",
        "..%5c..%5cgoogle.npz",
        "..\\..\\google.npz",
        "..%2f..%2fgoogle.npz",
        "./google.npz",
    ],
)
def test_an_address_that_leads_elsewhere_is_refused(server, path, tmp_path):
    refused(f"{server.url}/{path}", "has a . or .. in its path")
    assert server.asked == [] and not list(tmp_path.rglob("*.npz*"))


def test_a_host_that_leads_elsewhere_is_refused(tmp_path, server):
    refused("https://../google.npz", "can't be cached: .. leads to another folder")
    refused("https://user:secret@../google.npz", "can't be cached: .. leads to another folder")


def test_addresses_that_differ_in_their_query_are_different_files(server, tmp_path):
    server.asked.clear()
    one, other = (pretrained.load_model(f"{server.url}/google.npz?id={i}").path for i in "12")
    weights = [path for path in server.asked if ".npz" in path]
    assert one != other and weights == ["/google.npz?id=1", "/google.npz?id=2"]
    cached = tmp_path / "cache/vit_scale/weights"
    assert cached in one.parents and one.name == other.name == "google.npz"
    pretrained.load_model(f"{server.url}/huggingface/model.safetensors?key=a")
    assert "/huggingface/config.json?key=a" in server.asked


def test_the_settings_beside_an_exported_npz_are_downloaded(server, tmp_path, monkeypatch):
    """The .npz alone would be read as Google's, with another GELU."""
    cfg = tiny_config("model.gelu=exact", "augment.mean=(0.1, 0.2, 0.3)")
    run = write_run(tmp_path / "run", cfg, random_params(build(cfg.model, (16, 16))))
    export(run, "npz", tmp_path / "files/x.npz")
    monkeypatch.setattr(f"{__name__}.GOLDEN", tmp_path / "files")  # which is served
    loaded = pretrained.load_model(f"{server.url}/x.npz").cfg
    assert (loaded.model.gelu, loaded.augment.mean) == ("exact", (0.1, 0.2, 0.3))
    server.shutdown()
    server.server_close()
    assert pretrained.load_model(f"{server.url}/x.npz").cfg.model.gelu == "exact"


def test_an_index_names_only_files_beside_it(server, tmp_path):
    for name in ("..", "../model.safetensors", "/etc/hostname", ""):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"cls": name}}))
        with pytest.raises(UserError, match="which is not in its folder"):
            weight_files.shard_names(index)


def test_an_address_without_a_weight_file(server):
    refused(f"{server.url}/huggingface", "is not a weight file", "its model.safetensors")
    refused(f"{server.url}/none.npz", "cannot download", "by other means to")


def test_without_a_network_the_alternatives_are_named(server, tmp_path):
    server.shutdown()
    server.server_close()
    url = f"{server.url}/google.npz"
    with pytest.raises(Unreachable):
        pretrained.load_model(url)
    program = make_setup(tiny_config(f"init.source={url}", "init.instead=vit_small_imagenet"))
    with pytest.raises(UserError) as caught:
        check_source(program, ("cat",) * 4)
    line = str(caught.value)
    assert "\n" not in line
    cache = tmp_path / "cache/vit_scale/weights" / f"127.0.0.1:{server.server_port}"
    assert f"cannot download {url}" in line and f"by other means to {cache}" in line
    assert "vit-scale train --config vit_small_imagenet" in line
    assert "--config.init.source=runs/vit_small_imagenet" in line


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_fine_tuning_starts_from_public_weights(size):
    cfg = config.load(f"vit_{size}_cifar")
    letter = cfg.model.variant.replace("/", "_")
    start = f"https://storage.googleapis.com/vit_models/augreg/{letter}-i21k-300ep-lr_0.001-aug_"
    assert cfg.init.source.startswith(start) and cfg.init.source.endswith("-sd_0.0.npz")
    assert config.load(cfg.init.instead).model.variant == cfg.model.variant


def test_training_starts_from_external_weights(capsys):
    """At another resolution and with another head; the notes are printed."""
    fields = ("width=12", "depth=2", "heads=3", "mlp=20", "variant=Ti/4", "gelu=tanh")
    overrides = [f"model.{field}" for field in fields] + ["data.resolution=20"]
    source = f"init.source={GOLDEN / 'google-pre_logits.npz'}"
    program = make_setup(tiny_config(*overrides, source))
    check_source(program, ("cat", "dog", "eel", "fox"))
    state = init_state(program, ("cat", "dog", "eel", "fox"), quiet=False)
    loaded = pretrained.load_model(GOLDEN / "google-pre_logits.npz")
    np.testing.assert_array_equal(state.params["cls"], loaded.params["cls"])
    assert not np.any(state.params["head"]["kernel"])
    printed = capsys.readouterr().out
    assert "format google-research/vision_transformer (init.dialect=google)" in printed
    assert "resampled 3 x 3 -> 5 x 5, cubic" in printed
    assert "dropped: part of the old head" in printed
    assert "was trained with" not in printed
    program.cfg.init.dialect = "timm"
    with pytest.raises(UserError, match="its format is not timm"):
        check_source(program, ("cat", "dog", "eel", "fox"))
    program.cfg.init.dialect, program.cfg.model.gelu = "", "exact"
    init_state(program, ("cat", "dog", "eel", "fox"), quiet=False)
    line = "the source was trained with model.gelu=tanh; this config has exact"
    assert line in capsys.readouterr().out

"""model_file: a trained model as one file is used like the run that it comes from."""

import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

from tests.helpers.tiny import (
    CLASSES,
    random_images,
    random_params,
    tiny_config,
    tiny_model,
    write_images,
    write_run,
)
from vit_scale import api, cli, load
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.parameters import named
from vit_scale.pretrained import load_model
from vit_scale.pretrained.hints import Hints

PRIVATE = "/disk/of/somebody/data"  # a path that must not be published


@pytest.fixture
def run(tmp_path):
    cfg = tiny_config(f"data.path={PRIVATE}", f"init.source={PRIVATE}", "data.name=cifar10")
    cfg.data.mixture = ((f"folder:{PRIVATE}", 1.0),)
    data = {"name": f"{PRIVATE} train", "images": 9}
    return write_run(tmp_path / "run", cfg, random_params(tiny_model()), data=data)


@pytest.fixture
def file(run, tmp_path):
    export(run, "safetensors", tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_file_predicts_what_its_run_predicts(run, file):
    images = random_images(3)
    one, other = load(run), load(file)
    np.testing.assert_array_equal(one(images), other(images))
    assert other.classes == CLASSES and other.step == 5
    assert other.decode_size == one.decode_size and other.decode_view == one.decode_view
    loaded = load_model(file)
    assert loaded.data == {"name": "data train", "images": 9}
    assert loaded.cfg.data.mixture == (("folder", 1.0),)
    assert (loaded.cfg.data.path, loaded.cfg.init.source) == (".data", "")
    assert PRIVATE.encode() not in file.read_bytes()


def test_others_may_read_a_file_as_the_umask_says(file, tmp_path):
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_the_size_in_half_precision(run, file, tmp_path, dtype, error):
    half = tmp_path / "half.safetensors"
    export(run, "safetensors", half, dtype=dtype)
    arrays = named(load_model(run).params)
    saved = 2 * sum(array.size for array in arrays.values())
    assert file.stat().st_size - half.stat().st_size == pytest.approx(saved, rel=0.01)
    for name, array in named(load_model(half).params).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, arrays[name], rtol=error, atol=1e-6)
    assert not np.array_equal(load(half)(random_images(3)), load(run)(random_images(3)))


def test_a_file_is_taken_where_a_run_is(run, file, tmp_path, capsys):
    Image.fromarray(random_images(1)[0]).save(tmp_path / "cat.png")
    printed = []
    for source in (run, file):
        assert cli.main(["predict", str(source), str(tmp_path / "cat.png"), "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
    export(file, "safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    export(file, "safetensors-timm", tmp_path / "timm")
    export(run, "safetensors-timm", tmp_path / "timm-of-run")
    names = [tmp_path / name / "model.safetensors" for name in ("timm", "timm-of-run")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_public_addresses_are_kept(tmp_path):
    cfg = tiny_config("data.name=huggingface", "data.path=org/set@abc", "init.source=hf://org/vit")
    write_run(tmp_path / "run", cfg, random_params(tiny_model()))
    export(tmp_path / "run", "safetensors", tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").cfg
    assert (loaded.data.path, loaded.init.source) == ("org/set@abc", "hf://org/vit")


def test_class_names_that_look_like_paths_are_kept(tmp_path):
    names = ["/b/bazaar/indoor", "/b/bazaar/outdoor", "/m/01g317", "~/x"]  # as Places365's
    write_run(tmp_path / "run", tiny_config(), random_params(tiny_model()), classes=names)
    export(tmp_path / "run", "safetensors", tmp_path / "model.safetensors")
    assert list(load(tmp_path / "model.safetensors").classes) == names


SECRET = "https://ada:secret@example.org/a/B_16.npz?key=secret#sha256=00"


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        (SECRET, "https://example.org/a/B_16.npz#sha256=00"),
        ("runs/acme/vit", ""),
        ("gs://acme/vit", ""),
        ("B_16.npz", "B_16.npz"),
    ],
)
def test_what_a_file_says_of_its_source(tmp_path, path, kept):
    cfg = tiny_config(f"init.source={path}", "data.name=huggingface", "data.path=acme/local")
    write_run(tmp_path / "run", cfg, random_params(tiny_model()))
    export(tmp_path / "run", "safetensors", tmp_path / "model.safetensors", card=True)
    loaded = load_model(tmp_path / "model.safetensors").cfg
    assert (loaded.init.source, loaded.data.path) == (kept, ".data")
    for file in ("model.safetensors", "model.md"):
        content = (tmp_path / file).read_bytes()
        assert b"secret" not in content and b"acme" not in content


def test_a_folder_that_holds_a_file_is_loaded(file, tmp_path):
    folder = tmp_path / "checkpoints"  # whose name is that of a run's
    folder.mkdir()
    file.rename(folder / "model.safetensors")
    for source in (folder, folder / "model.safetensors"):
        assert load(source).classes == CLASSES
    export(folder, "safetensors", tmp_path / "again.safetensors", card=True)
    assert (tmp_path / "again.safetensors").exists()


def test_a_file_is_evaluated_and_fine_tuned_from(run, file, tmp_path):
    fields = write_images(tmp_path / "photos", "train", "val") | {"data.mixture": ()}
    results = [api.evaluate(one, "val", quiet=True, **fields) for one in (run, file)]
    for result in results:
        del result["run"]
    assert results[0] == results[1] and results[0]["n"] == 12
    fields |= {"steps": 1, "data.batch": 4, "eval.split": "", "eval.final": "", "log.wandb": False}
    fields |= {"optim.lr": 0.0, "init.source": str(file), "log.tensorboard": False}
    api.train(tiny_config(), tmp_path / "tuned", quiet=True, **fields)
    for name, array in named(load_model(tmp_path / "tuned").params).items():
        np.testing.assert_array_equal(array, named(load_model(file).params)[name], name)


def test_what_can_not_be_written_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export(run, "safetensors", tmp_path / "model.bin")
    with pytest.raises(UserError, match="'float8' is unknown; did you mean float"):
        export(run, "safetensors", tmp_path / "m.safetensors", dtype="float8")
    with pytest.raises(UserError, match="--dtype is for the format safetensors, not npz"):
        export(run, "npz", tmp_path / "m.npz", dtype="float16")
    with pytest.raises(UserError, match="--push is for the formats safetensors-"):
        export(run, "safetensors", tmp_path / "m.safetensors", push="a/b")
    large = jax.tree.map(lambda leaf: leaf * 1e6, random_params(tiny_model()))
    write_run(tmp_path / "large", tiny_config(), large)
    with pytest.raises(UserError, match=r"has values up to .*e\+05, too large for float16"):
        export(tmp_path / "large", "safetensors", tmp_path / "m.safetensors", dtype="float16")
    assert not list(tmp_path.glob("m*"))


def test_a_damaged_file_and_one_of_another_model_are_refused(file, tmp_path):
    with pytest.raises(UserError, match=r"init.dialect only applies to external weights"):
        load_model(file, Hints(format="timm"))
    with safetensors.safe_open(file, framework="numpy") as content:
        metadata = content.metadata()
    arrays = safetensors.numpy.load_file(file)
    arrays["spare"] = arrays.pop("head/bias")
    safetensors.numpy.save_file(arrays, file, metadata=metadata)
    with pytest.raises(UserError, match="lacks the array head/bias"):
        load_model(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_model(file)


def test_an_average_that_another_library_lacks_is_said(tmp_path):
    for flip in (True, False):
        run = tmp_path / f"run-{flip}"
        write_run(run, tiny_config(f"eval.flip={flip}"), random_params(tiny_model()))
        lines = export(run, "safetensors-timm", tmp_path / "timm")
        assert (
            any("averages the outputs of an image and its mirror" in line for line in lines) == flip
        )

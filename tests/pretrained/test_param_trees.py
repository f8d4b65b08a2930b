"""trees: the model in a file, whatever wraps it, and of several the one that is meant."""

import json
import pathlib

import numpy as np
import pytest

from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.models.parameters import named
from vit_scale.pretrained import Hints, weight_files
from vit_scale.pretrained.param_trees import choose, prefixes, recognise, select

pytestmark = pytest.mark.usefixtures("quick_compile")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
HEADS = Hints(heads=3, trained_size=(12, 12))
PLAIN = weight_files.read(GOLDEN / "timm.safetensors")


def given(tmp_path, arrays, hints: Hints = HEADS) -> pretrained.Pretrained:
    weight_files.write_safetensors(tmp_path / "x.safetensors", arrays)
    return pretrained.load_model(tmp_path / "x.safetensors", hints)


def under(prefix: str, arrays=PLAIN) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def same(left, right) -> None:
    for name, leaf in named(left.params).items():
        np.testing.assert_array_equal(leaf, named(right.params)[name], err_msg=name)


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "model.", "backbone.", "_orig_mod.", "net.", "encoder.", "ema."),
        *("module._orig_mod.", "_orig_mod.module.", "model.backbone.", "student.module.backbone."),
        *("state_dict.model.", "teacher.backbone.", "anything.at.all.", "0.", "model_state_dict."),
    ],
)
def test_any_prefix(prefix, tmp_path):
    found = given(tmp_path, under(prefix))
    same(found, given(tmp_path, PLAIN))
    assert not any("left aside" in line for line in found.notes)


@pytest.mark.parametrize("case", ["google.npz", "big_vision-map.npz", "huggingface"])
def test_any_prefix_of_other_formats(case, tmp_path):
    arrays = weight_files.read(weight_files.file_in(GOLDEN / case))
    separator = "/" if case.endswith("npz") else "."
    file = tmp_path / ("x.npz" if case.endswith("npz") else "x.safetensors")
    write = weight_files.write_npz if case.endswith("npz") else weight_files.write_safetensors
    for prefix in ("params", "target", f"opt{separator}img"):
        write(file, {f"{prefix}{separator}{name}": x for name, x in arrays.items()})
        same(pretrained.load_model(file, HEADS), pretrained.load_model(GOLDEN / case, HEADS))


def test_what_lies_beside_the_model_is_named(tmp_path):
    optimizer = {f"optimizer.state.{i}.exp_avg": np.ones(3, np.float32) for i in range(9)}
    found = given(tmp_path, {**under("model."), **optimizer, "loss": np.float32([0.3])})
    (line,) = [line for line in found.notes if "left aside" in line]
    assert "left aside, no parameters of it: " in line and "and 4 more" in line
    same(found, given(tmp_path, PLAIN))


def test_what_no_prediction_needs_is_named(tmp_path):
    """DINOv2's and MAE's mask token, MAE's decoder, the projector of MoCo and of DINO."""
    without = {name: x for name, x in PLAIN.items() if not name.startswith("head.")}
    ones = np.ones((1, 1, 12), np.float32)
    more = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "head.0.weight")
    found = given(tmp_path, {**without, **dict.fromkeys(more, ones)})
    assert f"left aside, not used to predict: {', '.join(sorted(more))}" in [
        f"{line.partition(': ')[0]}: {', '.join(sorted(line.partition(': ')[2].split(', ')))}"
        for line in found.notes
    ]
    assert found.classes == ()


OTHER = {name: x + 1 for name, x in PLAIN.items()}


@pytest.mark.parametrize(
    ("taken", "left", "why"),
    [
        ("state_dict_ema", "state_dict", "as timm does"),
        ("model_ema", "model", "as timm and DeiT do"),
        ("ema", "net", "the average"),
        ("model_ema.module", "model", "the average"),
        ("teacher.backbone", "student.module.backbone", "as DINO, iBOT and DINOv2 do"),
        ("module.base_encoder", "module.momentum_encoder", "as MoCo does"),
        ("model", "something", "as timm does"),
        ("a", "student", "the others are only for training"),
    ],
)
def test_of_several_the_one_that_the_files_own_library_takes(taken, left, why, tmp_path):
    both = {**under(f"{left}."), **under(f"{taken}.", OTHER)}
    found = given(tmp_path, both)
    same(found, given(tmp_path, OTHER))
    line = next(line for line in found.notes if "several models" in line)
    assert line.startswith(f"it holds several models: {taken} is taken, ")
    assert line.endswith(f"--config.init.tree takes another: {left}")
    assert taken == "model_ema.module" or why in line
    asked = given(tmp_path, both, HEADS._replace(tree=left))
    same(asked, given(tmp_path, PLAIN))
    part = left.split(".")[-1] if left.count(".") < 2 else left.split(".")[0]
    same(given(tmp_path, both, HEADS._replace(tree=part)), asked)


def test_a_model_within_another(tmp_path):
    arrays = {**PLAIN, **under("ema.", OTHER)}
    same(given(tmp_path, arrays), given(tmp_path, OTHER))
    same(given(tmp_path, arrays, HEADS._replace(tree=".")), given(tmp_path, PLAIN))
    arrays = {**under("model."), **under("model.ema.", OTHER)}
    same(given(tmp_path, arrays, HEADS._replace(tree="model")), given(tmp_path, PLAIN))


def test_what_is_no_float_is_no_weight(tmp_path):
    """Counters are left aside; a quantized parameter is refused, whatever its type."""
    found = given(tmp_path, {**PLAIN, "num_updates": np.int64([7])})
    assert "left aside, no floats: num_updates" in found.notes
    for kind in (np.int8, np.uint8, np.bool_):
        with pytest.raises(UserError, match=r"head\.weight is of .*, not of floats: a quantized"):
            given(tmp_path, {**PLAIN, "head.weight": PLAIN["head.weight"].astype(kind)})
    google = weight_files.read(GOLDEN / "google.npz")
    np.savez(tmp_path / "x.npz", **google, classes=np.array(["a", "b"]))
    assert (
        "left aside, no floats: classes" in pretrained.load_model(tmp_path / "x.npz", HEADS).notes
    )
    google["head/kernel"] = google["head/kernel"] + 1j
    np.savez(tmp_path / "x.npz", **google)
    with pytest.raises(UserError, match="head/kernel is of complex"):
        pretrained.load_model(tmp_path / "x.npz", HEADS)


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(UserError, match="pointer of Git LFS, not weights: get them with `git lfs"):
        pretrained.load_model(tmp_path / "x.safetensors", HEADS)


def test_several_of_which_none_is_known_to_be_meant(tmp_path):
    arrays = {**under("left."), **under("right.", OTHER)}
    with pytest.raises(
        UserError, match=r"holds several models: left, right; give --config\.init\.tr"
    ):
        given(tmp_path, arrays)
    same(given(tmp_path, arrays, HEADS._replace(tree="right")), given(tmp_path, OTHER))
    with pytest.raises(
        UserError, match=r"holds no model named init\.tree=mid; there are left, righ"
    ):
        given(tmp_path, arrays, HEADS._replace(tree="mid"))
    with pytest.raises(UserError, match=r"no model named init\.tree=state_dict; there are \."):
        given(tmp_path, PLAIN, HEADS._replace(tree="state_dict"))


def test_an_average_that_only_looks_like_one():
    """`schema` is no `ema`."""
    assert choose("f", ("schema.", "model."), "")[0] == "model."
    assert choose("f", ("ema_model.", "model."), "")[0] == "ema_model."


def test_names_of_a_vit_in_other_words_are_no_mark():
    dialect, found = recognise("f", ["x.patch_embed.proj.weight", "my_patch_embed.proj.weight"])
    assert dialect.name == "timm" and found == ("x.",)
    assert prefixes(dialect, ["patch_embed.proj.weight.scale"]) == ()


def test_dinov2s_chunks_of_blocks(tmp_path):
    chunked = {
        (f"backbone.blocks.{int(name.split('.')[1]) // 1}.{name.removeprefix('blocks.')}"
         if name.startswith("blocks.") else f"backbone.{name}"): x
        for name, x in PLAIN.items()
    }  # fmt: skip
    assert "backbone.blocks.1.1.norm1.weight" in chunked
    same(given(tmp_path, chunked), given(tmp_path, PLAIN))


def test_nested_dictionaries_become_names():
    """As torch gives them: under any key, in any depth; what is no tensor is nothing here."""
    content = {"epoch": 3, "a": {"b": [1, {"c": 2}], 7: "x"}, "empty": {}}
    assert dict(weight_files._leaves(content)) == {"epoch": 3, "a.b.0": 1, "a.b.1.c": 2, "a.7": "x"}


def test_pytorchs_files(tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(x) for name, x in PLAIN.items()}
    wraps = {
        "tutorial": {
            "epoch": 1,
            "model_state_dict": state,
            "optimizer_state_dict": {},
            "loss": 0.3,
        },
        "lightning": {"state_dict": {f"model.{n}": x for n, x in state.items()}, "hparams": None},
        "nested": {"a": {"b": [{"c": state}]}, "loss": torch.tensor(0.3)},
    }
    for name, content in wraps.items():
        torch.save(content, tmp_path / f"{name}.pth")
        same(pretrained.load_model(tmp_path / f"{name}.pth", HEADS), given(tmp_path, PLAIN))


# Not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_before_anything_else(value, tmp_path):
    """Also where an array is missing, and where the head does not fit."""
    broken = {name: x.copy() for name, x in PLAIN.items() if name != "norm.bias"}
    broken["blocks.1.mlp.fc1.weight"][3, 2] = value
    with pytest.raises(UserError) as caught:
        given(tmp_path, under("model.", broken), Hints())
    line = str(caught.value)
    place = 3 * 12 + 2
    assert f"model.blocks.1.mlp.fc1.weight is not finite: {value} at position {place}" in line
    assert "1 of its 240 values; it overflowed" in line
    broken["cls_token"][:] = value
    with pytest.raises(UserError, match="of its 240 values, and 1 more arrays hold such values"):
        given(tmp_path, broken)


def test_what_is_left_aside_may_be_anything(tmp_path):
    arrays = {**under("model."), "optimizer.exp_avg": np.float32([np.nan])}
    same(given(tmp_path, arrays), given(tmp_path, PLAIN))


def test_half_precision_that_overflowed(tmp_path):
    half = {name: x.astype(np.float16) for name, x in PLAIN.items()}
    half["norm.weight"][0] = np.float16(np.inf)  # 70,000
    with pytest.raises(
        UserError, match=r"norm\.weight is not finite: inf at position 0, 1 of its 12"
    ):
        given(tmp_path, half)


# Shards


def write_shards(folder: pathlib.Path, arrays, ending: str = "safetensors") -> None:
    folder.mkdir()
    names, index = sorted(arrays), {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.{ending}"
        part = names[number::3]
        weight_files.write_safetensors(folder / file, {name: arrays[name] for name in part})
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / f"{weight_files.MODEL}.index.json").write_text(json.dumps(content))


def test_shards_with_an_index(tmp_path):
    write_shards(tmp_path / "s", PLAIN)
    same(pretrained.load_model(tmp_path / "s", HEADS), given(tmp_path, PLAIN))
    same(pretrained.load_model(tmp_path / "s" / "model.safetensors.index.json", HEADS),
         given(tmp_path, PLAIN))  # fmt: skip


def test_shards_that_are_not_whole(tmp_path):
    write_shards(tmp_path / "s", PLAIN)
    one = tmp_path / "s" / "model-00002-of-00003.safetensors"
    with pytest.raises(UserError, match="is one of several shards: give the folder"):
        pretrained.load_model(tmp_path / "s" / "model-00003-of-00003.safetensors", HEADS)
    whole = one.read_bytes()
    one.unlink()
    with pytest.raises(
        UserError, match=r"cannot read .*model-00002-of-00003\.safetensors: No such"
    ):
        pretrained.load_model(tmp_path / "s", HEADS)
    one.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"model-00002-of-00003\.safetensors is damaged or cut short"
    ):
        pretrained.load_model(tmp_path / "s", HEADS)
    index = tmp_path / "s" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(UserError, match=r"lists \.\./x\.safetensors, which is not beside it"):
        pretrained.load_model(tmp_path / "s", HEADS)
    index.write_text("{}")
    with pytest.raises(UserError, match="no index of shards: it has no weight_map"):
        pretrained.load_model(tmp_path / "s", HEADS)


def test_a_name_of_the_hub_says_how_to_get_it():
    with pytest.raises(UserError, match="hf download google/vit-base-patch16-224 --local-dir DIR"):
        pretrained.load_model("google/vit-base-patch16-224")


def test_select_says_what_it_is_of():
    found = select("f", under("model."), "", "")
    assert found.prefix == "model." and found.arrays.keys() == PLAIN.keys() and not found.notes

"""state_dicts: the model in a file is selected, under any prefix and among several."""

import json
import pathlib

import numpy as np
import pytest

from vit_scale import pretrained
from vit_scale.errors import UserError
from vit_scale.models.parameters import named
from vit_scale.pretrained import Hints, weight_files
from vit_scale.pretrained.state_dicts import (
    choose_prefix,
    detect_format,
    find_prefixes,
    select_state_dict,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "weights"
HEADS = Hints(heads=3, trained_size=(12, 12))
PLAIN = weight_files.read_arrays(GOLDEN / "timm.safetensors")


def loaded(tmp_path, arrays, hints: Hints = HEADS) -> pretrained.Pretrained:
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
    result = loaded(tmp_path, under(prefix))
    same(result, loaded(tmp_path, PLAIN))
    assert not any("ignored" in line for line in result.notes)


@pytest.mark.parametrize("case", ["google.npz", "big_vision-map.npz", "huggingface"])
def test_any_prefix_of_other_formats(case, tmp_path):
    arrays = weight_files.read_arrays(weight_files.find_weight_file(GOLDEN / case))
    separator = "/" if case.endswith("npz") else "."
    file = tmp_path / ("x.npz" if case.endswith("npz") else "x.safetensors")
    write = weight_files.write_npz if case.endswith("npz") else weight_files.write_safetensors
    for prefix in ("params", "target", f"opt{separator}img"):
        write(file, {f"{prefix}{separator}{name}": x for name, x in arrays.items()})
        same(pretrained.load_model(file, HEADS), pretrained.load_model(GOLDEN / case, HEADS))


def test_arrays_outside_the_model_are_listed(tmp_path):
    optimizer = {f"optimizer.state.{i}.exp_avg": np.ones(3, np.float32) for i in range(9)}
    result = loaded(tmp_path, {**under("model."), **optimizer, "loss": np.float32([0.3])})
    (line,) = [line for line in result.notes if "ignored" in line]
    assert "ignored, not part of the model: " in line and "and 4 more" in line
    same(result, loaded(tmp_path, PLAIN))


def test_arrays_that_inference_does_not_need_are_listed(tmp_path):
    """DINOv2's and MAE's mask token, MAE's decoder, the projector of MoCo and of DINO."""
    without = {name: x for name, x in PLAIN.items() if not name.startswith("head.")}
    ones = np.ones((1, 1, 12), np.float32)
    more = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "head.0.weight")
    result = loaded(tmp_path, {**without, **dict.fromkeys(more, ones)})
    assert f"ignored, not needed for inference: {', '.join(sorted(more))}" in [
        f"{line.partition(': ')[0]}: {', '.join(sorted(line.partition(': ')[2].split(', ')))}"
        for line in result.notes
    ]
    assert result.classes == ()


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
        ("a", "student", "the others only serve training"),
    ],
)
def test_of_several_models_the_one_that_the_library_would_load(taken, left, why, tmp_path):
    both = {**under(f"{left}."), **under(f"{taken}.", OTHER)}
    result = loaded(tmp_path, both)
    same(result, loaded(tmp_path, OTHER))
    line = next(line for line in result.notes if "several models" in line)
    assert line.startswith(f"the file holds several models; loading {taken} (")
    assert line.endswith(f"--config.init.tree selects another: {left}")
    assert taken == "model_ema.module" or why in line
    asked = loaded(tmp_path, both, HEADS._replace(tree=left))
    same(asked, loaded(tmp_path, PLAIN))
    part = left.split(".")[-1] if left.count(".") < 2 else left.split(".")[0]
    same(loaded(tmp_path, both, HEADS._replace(tree=part)), asked)


def test_a_model_within_another(tmp_path):
    arrays = {**PLAIN, **under("ema.", OTHER)}
    same(loaded(tmp_path, arrays), loaded(tmp_path, OTHER))
    same(loaded(tmp_path, arrays, HEADS._replace(tree=".")), loaded(tmp_path, PLAIN))
    arrays = {**under("model."), **under("model.ema.", OTHER)}
    same(loaded(tmp_path, arrays, HEADS._replace(tree="model")), loaded(tmp_path, PLAIN))


def test_arrays_that_are_not_floating_point(tmp_path):
    """Counters are ignored; quantized parameters are refused, whatever their type."""
    result = loaded(tmp_path, {**PLAIN, "num_updates": np.int64([7])})
    assert "ignored, not floating-point: num_updates" in result.notes
    for kind in (np.int8, np.uint8, np.bool_):
        with pytest.raises(UserError, match=r"head\.weight is .*, not floating-point; quantized"):
            loaded(tmp_path, {**PLAIN, "head.weight": PLAIN["head.weight"].astype(kind)})
    google = weight_files.read_arrays(GOLDEN / "google.npz")
    np.savez(tmp_path / "x.npz", **google, classes=np.array(["a", "b"]))
    assert (
        "ignored, not floating-point: classes"
        in pretrained.load_model(tmp_path / "x.npz", HEADS).notes
    )
    google["head/kernel"] = google["head/kernel"] + 1j
    np.savez(tmp_path / "x.npz", **google)
    with pytest.raises(UserError, match="head/kernel is complex"):
        pretrained.load_model(tmp_path / "x.npz", HEADS)


def test_a_git_lfs_pointer(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(UserError, match="Git LFS pointer, not weights: run `git lfs"):
        pretrained.load_model(tmp_path / "x.safetensors", HEADS)


def test_several_models_of_equal_rank_are_ambiguous(tmp_path):
    arrays = {**under("left."), **under("right.", OTHER)}
    with pytest.raises(
        UserError, match=r"holds several models: left, right; choose one with --config\.init\.tr"
    ):
        loaded(tmp_path, arrays)
    same(loaded(tmp_path, arrays, HEADS._replace(tree="right")), loaded(tmp_path, OTHER))
    with pytest.raises(UserError, match=r"has no model named init\.tree=mid; it has left, righ"):
        loaded(tmp_path, arrays, HEADS._replace(tree="mid"))
    with pytest.raises(UserError, match=r"no model named init\.tree=state_dict; it has \."):
        loaded(tmp_path, PLAIN, HEADS._replace(tree="state_dict"))


def test_only_whole_words_mark_an_average():
    """`schema` is not `ema`."""
    assert choose_prefix("f", ("schema.", "model."), "")[0] == "model."
    assert choose_prefix("f", ("ema_model.", "model."), "")[0] == "ema_model."


def test_a_signature_must_be_a_whole_key():
    fmt, result = detect_format("f", ["x.patch_embed.proj.weight", "my_patch_embed.proj.weight"])
    assert fmt.name == "timm" and result == ("x.",)
    assert find_prefixes(fmt, ["patch_embed.proj.weight.scale"]) == ()


def test_dinov2s_chunks_of_blocks(tmp_path):
    chunked = {
        (f"backbone.blocks.{int(name.split('.')[1]) // 1}.{name.removeprefix('blocks.')}"
         if name.startswith("blocks.") else f"backbone.{name}"): x
        for name, x in PLAIN.items()
    }  # fmt: skip
    assert "backbone.blocks.1.1.norm1.weight" in chunked
    same(loaded(tmp_path, chunked), loaded(tmp_path, PLAIN))


def test_nested_dictionaries_are_flattened():
    """As torch loads them: under any key, at any depth."""
    content = {"epoch": 3, "a": {"b": [1, {"c": 2}], 7: "x"}, "empty": {}}
    assert dict(weight_files._flatten(content)) == {
        "epoch": 3,
        "a.b.0": 1,
        "a.b.1.c": 2,
        "a.7": "x",
    }


def test_pytorch_files(tmp_path):
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
        same(pretrained.load_model(tmp_path / f"{name}.pth", HEADS), loaded(tmp_path, PLAIN))


# Not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_reported_first(value, tmp_path):
    """Even if an array is missing or the head doesn't fit."""
    broken = {name: x.copy() for name, x in PLAIN.items() if name != "norm.bias"}
    broken["blocks.1.mlp.fc1.weight"][3, 2] = value
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, under("model.", broken), Hints())
    line = str(caught.value)
    place = 3 * 12 + 2
    assert f"model.blocks.1.mlp.fc1.weight is not finite: {value} at index {place}" in line
    assert "1 of its 240 values; the model diverged" in line
    broken["cls_token"][:] = value
    with pytest.raises(UserError, match="of its 240 values, and 1 more arrays have such values"):
        loaded(tmp_path, broken)


def test_ignored_arrays_need_not_be_finite(tmp_path):
    arrays = {**under("model."), "optimizer.exp_avg": np.float32([np.nan])}
    same(loaded(tmp_path, arrays), loaded(tmp_path, PLAIN))


def test_half_precision_that_overflowed(tmp_path):
    half = {name: x.astype(np.float16) for name, x in PLAIN.items()}
    half["norm.weight"][0] = np.float16(np.inf)  # 70,000
    with pytest.raises(UserError, match=r"norm\.weight is not finite: inf at index 0, 1 of its 12"):
        loaded(tmp_path, half)


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
    (folder / f"{weight_files.SAFETENSORS}.index.json").write_text(json.dumps(content))


def test_shards_with_an_index(tmp_path):
    write_shards(tmp_path / "s", PLAIN)
    same(pretrained.load_model(tmp_path / "s", HEADS), loaded(tmp_path, PLAIN))
    same(pretrained.load_model(tmp_path / "s" / "model.safetensors.index.json", HEADS),
         loaded(tmp_path, PLAIN))  # fmt: skip


def test_incomplete_shards(tmp_path):
    write_shards(tmp_path / "s", PLAIN)
    one = tmp_path / "s" / "model-00002-of-00003.safetensors"
    with pytest.raises(UserError, match="is one shard of several: give the folder"):
        pretrained.load_model(tmp_path / "s" / "model-00003-of-00003.safetensors", HEADS)
    whole = one.read_bytes()
    one.unlink()
    with pytest.raises(
        UserError, match=r"cannot read .*model-00002-of-00003\.safetensors: No such"
    ):
        pretrained.load_model(tmp_path / "s", HEADS)
    one.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"model-00002-of-00003\.safetensors is damaged or truncated"
    ):
        pretrained.load_model(tmp_path / "s", HEADS)
    index = tmp_path / "s" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(UserError, match=r"lists \.\./x\.safetensors, which is not in its folder"):
        pretrained.load_model(tmp_path / "s", HEADS)
    index.write_text("{}")
    with pytest.raises(UserError, match="not an index of shards: it has no weight_map"):
        pretrained.load_model(tmp_path / "s", HEADS)


def test_select_state_dict_returns_the_prefix():
    result = select_state_dict("f", under("model."), "", "")
    assert result.prefix == "model." and result.arrays.keys() == PLAIN.keys() and not result.notes

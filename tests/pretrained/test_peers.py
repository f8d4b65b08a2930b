"""Against timm and transformers themselves, where they are installed (the extra `peers`).

Random weights of every format give the same logits there and here, imported and exported. Google's
files are also read by timm, which has its own reader for them. The real sizes are slow.
"""

import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import random_params, tiny_config, tiny_model, write_run
from vit_scale import config, pretrained
from vit_scale.augment.view import view
from vit_scale.data.decode import decode
from vit_scale.errors import UserError
from vit_scale.inference.export import export
from vit_scale.models.build import build
from vit_scale.models.parameters import name_of, named, unstack
from vit_scale.models.spec import SIZES
from vit_scale.pretrained import Hints, convert, key_mapping, weight_files
from vit_scale.pretrained.formats import BIG_VISION, GOOGLE

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


TINY = (12, 2, 3, 20)  # width, depth, heads, MLP
CLASSES = 7
PUBLISHED = ("Ti", "S", "B", "L")  # larger ones: test_timm_registry.py
REAL = [pytest.param(size, id=size, marks=pytest.mark.slow) for size in PUBLISHED]
SIZE = pytest.mark.parametrize("size", [pytest.param(None, id="tiny"), *REAL])


def numbers(size: str | None) -> tuple[int, ...]:
    return tuple(vars(SIZES[size]).values())[:4] if size else TINY


def pixels(size: str | None, larger: bool = False) -> tuple[int, int]:
    """(side of the image, of a patch)."""
    return (288 if larger else 224, 16) if size else (40 if larger else 24, 8)


def randomised(model):
    """Every parameter matters, and tokens still attend to others: variances as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.02 if parameter.ndim > 1 else 0.1
            parameter.copy_(float("norm" in name and name.endswith("weight")) + scale * noise)
            if name.endswith(("head.weight", "classifier.weight")):
                parameter.mul_(5)
    return model.eval()


def timm_model(size: str | None, larger=False, architecture="vit_tiny_patch16_224", **options):
    width, depth, heads, mlp = numbers(size)
    side, patch = pixels(size, larger)
    return timm.create_model(
        architecture,
        img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
        mlp_ratio=mlp / width, num_classes=CLASSES, **options,
    )  # fmt: skip


def random_images(side: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(2, side, side, 3).astype(np.float32)


def theirs(model, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    return getattr(result, "logits", result).numpy()


def close(given: pretrained.Pretrained, images: np.ndarray, expected: np.ndarray, what: str):
    result = np.asarray(jax.jit(given.model.apply)(given.params, images))
    difference = np.abs(result - expected).max()
    print(f"{what}: max |difference| {difference:.1e} of logits up to {np.abs(expected).max():.2f}")
    assert difference < 1e-4
    assert np.ptp(expected) > 0.1


def same_bits(left, right) -> None:
    for name, leaf in named(left).items():
        a, b = (np.asarray(x).view(np.int32) for x in (leaf, named(right)[name]))
        np.testing.assert_array_equal(a, b, err_msg=name)


def converted(source: pathlib.Path, folder: pathlib.Path, size: str | None, *overrides: str):
    """The source as a run."""
    heads = f"model.heads={numbers(size)[2]}"
    return convert(source, folder / "run", [heads, *overrides])[0]


@SIZE
@pytest.mark.parametrize("kind", ["cls", "gap", "map", "fc_norm", "distilled", "deit.pth"])
def test_timm(size, kind, tmp_path):
    options = {
        "gap": {"class_token": False, "global_pool": "avg", "fc_norm": False},
        "map": {"class_token": False, "global_pool": "map"},
        "fc_norm": {"global_pool": "avg"},
        "distilled": {"architecture": "deit_tiny_distilled_patch16_224"},
    }.get(kind, {})
    model, side = randomised(timm_model(size, **options)), pixels(size)[0]
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if kind == "deit.pth":
        file = tmp_path / "deit.pth"
        torch.save({"model": state}, file)
    else:
        file = tmp_path / "timm.safetensors"
        weight_files.write_safetensors(file, {name: x.numpy() for name, x in state.items()})
    given = pretrained.load_model(file, Hints(heads=numbers(size)[2]))
    images = random_images(side)
    close(given, images, theirs(model, images), f"timm {kind} {size}")
    if kind == "deit.pth":
        return
    made = converted(file, tmp_path, size)
    export(tmp_path / "run", "safetensors-timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    close(made, images, theirs(loaded, images), f"timm {kind} {size}, exported")
    same_bits(pretrained.load_model(tmp_path / "out").params, made.params)


@SIZE
def test_timm_at_another_resolution(size, tmp_path):
    model, larger = randomised(timm_model(size)), timm_model(size, larger=True).eval()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    file = tmp_path / "timm.safetensors"
    weight_files.write_safetensors(file, {name: x.numpy() for name, x in state.items()})
    side, patch = pixels(size, larger=True)
    grid = [side // patch] * 2
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], new_size=grid)
    larger.load_state_dict(state)
    images = random_images(side)
    made = converted(file, tmp_path, size, f"data.resolution={side}")
    close(made, images, theirs(larger, images), f"timm {size} at {side} px")


@SIZE
def test_huggingface(size, tmp_path):
    width, depth, heads, mlp = numbers(size)
    side, patch = pixels(size)
    cfg = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=mlp, image_size=side, patch_size=patch, num_labels=CLASSES,
    )  # fmt: skip
    model = randomised(transformers.ViTForImageClassification(cfg))
    model.save_pretrained(tmp_path / "saved")
    images = random_images(side)
    made = converted(tmp_path / "saved", tmp_path, size)
    close(made, images, theirs(model, images), f"Hugging Face {size}")
    export(tmp_path / "run", "safetensors-hf", tmp_path / "out")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    close(made, images, theirs(loaded, images), f"Hugging Face {size}, exported")
    same_bits(pretrained.load_model(tmp_path / "out").params, made.params)


@SIZE
@pytest.mark.parametrize("kind", ["google", "big_vision-gap", "big_vision-map"])
def test_google_equals_timm_reading_the_same_file(size, kind, tmp_path):
    """timm's own reader of .npz, of both of Google's layouts."""
    width, depth, heads, mlp = numbers(size)
    side, patch = pixels(size)
    cfg = config.base()
    cfg.model.update(
        {"variant": f"Ti/{patch}", "width": width, "depth": depth, "heads": heads, "mlp": mlp}
    )
    pool = kind.partition("-")[2] or "cls"
    cfg.model.update({"classes": CLASSES, "pool": pool, "gelu": "tanh"})
    model = build(cfg.model, (side, side))
    params = jax.tree.map(np.asarray, unstack(trained_like(random_params(model))))
    fmt, root = (GOOGLE, "") if kind == "google" else (BIG_VISION, "params/")
    arrays = key_mapping.to_arrays(fmt, named(params), depth)
    if kind == "google":  # ours has no position of its own for [CLS]
        stored = "Transformer/posembed_input/pos_embedding"
        arrays[stored][:, :1] = 0.1 * np.random.RandomState(1).randn(1, 1, width)
    weight_files.write_npz(tmp_path / "x.npz", {root + name: x for name, x in arrays.items()})
    options = {"class_token": False, "fc_norm": False} if pool != "cls" else {}
    token = {"cls": "token", "gap": "avg", "map": "map"}[pool]
    loaded = timm_model(size, act_layer="gelu_tanh", global_pool=token, **options)
    loaded.load_pretrained(str(tmp_path / "x.npz"))
    images = random_images(side)
    expected = theirs(loaded.eval(), images)
    close(pretrained.load_model(tmp_path / "x.npz"), images, expected, f"{kind} {size}")


def photo(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (3 + i) + y / (5 - i)) for i in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


VIEWS = {
    "plain": [],
    "crop": ["eval.crop=0.8", "eval.resample=bilinear"],
    "stretch": ["eval.fit=stretch"],
    "both": ["eval.fit=stretch", "eval.crop=0.75", "eval.resample=lanczos"],
}


@pytest.mark.parametrize("overrides", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("shape", [(40, 61), (57, 33), (24, 24)])
def test_other_libraries_preprocess_to_the_same_pixels(overrides, shape, tmp_path):
    """Of photos that are not square: timm each of them, transformers within torch's rounding."""
    photo(*shape).save(tmp_path / "photo.png")

    def seen_here(kind: str, *more: str) -> np.ndarray:
        cfg = tiny_config("data.name=folder", *more, *overrides)
        params = random_params(tiny_model())
        run = write_run(tmp_path / f"{kind}-run", cfg, params, data={"images": 3})
        export(run, f"safetensors-{kind}", tmp_path / kind)
        return decode((tmp_path / "photo.png").read_bytes(), (16, 16), view(cfg.eval))

    ours = seen_here("timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    seen = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    theirs = seen(photo(*shape)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(theirs, (ours / 255 - 0.5) / 0.5, atol=1e-6)
    ours = seen_here("hf", "eval.fit=shortest_edge")
    for processor in (transformers.ViTImageProcessor, transformers.AutoImageProcessor):
        see = processor.from_pretrained(tmp_path / "hf")
        result = see(photo(*shape), return_tensors="pt")["pixel_values"][0]
        difference = np.abs(255 * (result.permute(1, 2, 0).numpy() / 2 + 0.5) - ours)
        assert difference.max() <= 1.01, "grey levels: torch resizes, Pillow does here"


def trained_like(params: dict) -> dict:
    """`random_params`, with matrices as narrow as those of real models."""

    def scaled(path, leaf):
        name = name_of(path)
        return leaf * (0.1 if name.endswith("kernel") and not name.startswith("head") else 1)

    return jax.tree_util.tree_map_with_path(scaled, params)


def test_a_pickle_with_code_is_not_executed(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (marker,)

    for name, protocol in (("new.pth", {}), ("old.pth", {"_use_new_zipfile_serialization": False})):
        torch.save({"model": {"head.bias": Evil()}}, tmp_path / name, **protocol)
        with pytest.raises(UserError, match="contains pickled code") as caught:
            weight_files.read_arrays(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not marker.exists()

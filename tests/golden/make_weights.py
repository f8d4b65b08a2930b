"""Writes weights/: tiny ViTs as others save them, and the logits that they compute of some pixels.

Run in an environment with numpy, torch, timm, transformers and safetensors (the extra `peers`):
    python tests/golden/make_weights.py
timm and transformers compute their own logits. Google's code is no library: here is its published
architecture (arXiv 2010.11929; big_vision's models) once more, in numpy and float64, a head at a
time, over the arrays by Google's names. Nothing here imports vit_scale.
"""

import json
import pathlib
import shutil

import numpy as np
import safetensors.torch
import timm
import torch
import transformers
from timm.layers import resample_abs_pos_embed

FOLDER = pathlib.Path(__file__).with_name("weights")
WIDTH, DEPTH, HEADS, MLP, PATCH, CLASSES, GRID = 12, 2, 3, 20, 4, 5, 3
SIZE, LARGER = GRID * PATCH, 5 * PATCH  # pixels
NAMES = ["ant", "bee", "cat", "dog", "eel"]
RANDOM = np.random.default_rng(0)
EXPECTED: dict[str, np.ndarray] = {}


def draw(*shape: int, around: float = 0.0) -> np.ndarray:
    """Of which no value is zero or one, so that each of them matters."""
    return np.asarray(around + 0.3 * RANDOM.standard_normal(shape), np.float32)


def expect(case: str, images: np.ndarray, logits: np.ndarray) -> None:
    EXPECTED[f"{case}/images"] = images.astype(np.float32)
    EXPECTED[f"{case}/logits"] = logits.astype(np.float32)


# Google

OLD = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
NEW = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


def attention_arrays(prefix: str) -> dict[str, np.ndarray]:
    e = WIDTH // HEADS
    arrays = {}
    for part in ("query", "key", "value"):
        arrays[f"{prefix}/{part}/kernel"] = draw(WIDTH, HEADS, e)
        arrays[f"{prefix}/{part}/bias"] = draw(HEADS, e)
    arrays[f"{prefix}/out/kernel"] = draw(HEADS, e, WIDTH)
    arrays[f"{prefix}/out/bias"] = draw(WIDTH)
    return arrays


def norm_arrays(prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}/scale": draw(WIDTH, around=1), f"{prefix}/bias": draw(WIDTH)}


def dense_arrays(prefix: str, d: int, f: int) -> dict[str, np.ndarray]:
    return {f"{prefix}/kernel": draw(d, f), f"{prefix}/bias": draw(f)}


def mlp_arrays(prefix: str) -> dict[str, np.ndarray]:
    up = dense_arrays(f"{prefix}/Dense_0", WIDTH, MLP)
    return up | dense_arrays(f"{prefix}/Dense_1", MLP, WIDTH)


def google_arrays(parts: tuple[str, ...], pool: str, representation: int) -> dict[str, np.ndarray]:
    """All but the positions."""
    arrays = {"embedding/kernel": draw(PATCH, PATCH, 3, WIDTH), "embedding/bias": draw(WIDTH)}
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        arrays |= norm_arrays(f"{block}/{parts[0]}") | attention_arrays(f"{block}/{parts[1]}")
        arrays |= norm_arrays(f"{block}/{parts[2]}") | mlp_arrays(f"{block}/{parts[3]}")
    arrays |= norm_arrays("Transformer/encoder_norm")
    if pool == "tok":
        arrays["cls"] = draw(1, 1, WIDTH)
    if pool == "map":
        arrays["MAPHead_0/probe"] = draw(1, 1, WIDTH)
        arrays |= attention_arrays("MAPHead_0/MultiHeadDotProductAttention_0")
        arrays |= norm_arrays("MAPHead_0/LayerNorm_0") | mlp_arrays("MAPHead_0/MlpBlock_0")
    if representation:
        arrays |= dense_arrays("pre_logits", WIDTH, representation)
    return arrays | dense_arrays("head", representation or WIDTH, CLASSES)


def layer_norm(arrays, prefix: str, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * arrays[f"{prefix}/scale"] + arrays[f"{prefix}/bias"]


def dense(arrays, prefix: str, x):
    return x @ arrays[f"{prefix}/kernel"] + arrays[f"{prefix}/bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attend(arrays, prefix: str, queries, tokens):
    out = np.zeros((len(queries), WIDTH)) + arrays[f"{prefix}/out/bias"]
    for head in range(HEADS):
        q, k, v = (
            x @ arrays[f"{prefix}/{part}/kernel"][:, head] + arrays[f"{prefix}/{part}/bias"][head]
            for part, x in (("query", queries), ("key", tokens), ("value", tokens))
        )
        scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        weights = scores / scores.sum(-1, keepdims=True)
        out += weights @ v @ arrays[f"{prefix}/out/kernel"][head]
    return out


def mlp(arrays, prefix: str, x):
    return dense(arrays, f"{prefix}/Dense_1", gelu(dense(arrays, f"{prefix}/Dense_0", x)))


def google_logits(arrays, positions, cls_position, parts, pool: str, image) -> np.ndarray:
    patches = [
        image[row : row + PATCH, column : column + PATCH].reshape(-1)
        for row in range(0, image.shape[0], PATCH)
        for column in range(0, image.shape[1], PATCH)
    ]
    kernel = arrays["embedding/kernel"].reshape(-1, WIDTH)
    x = np.stack(patches) @ kernel + arrays["embedding/bias"] + positions
    if pool == "tok":
        x = np.concatenate([arrays["cls"][0] + cls_position, x])
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        y = layer_norm(arrays, f"{block}/{parts[0]}", x)
        x = x + attend(arrays, f"{block}/{parts[1]}", y, y)
        x = x + mlp(arrays, f"{block}/{parts[3]}", layer_norm(arrays, f"{block}/{parts[2]}", x))
    x = layer_norm(arrays, "Transformer/encoder_norm", x)
    if pool == "map":
        prefix = "MAPHead_0"
        probe = arrays[f"{prefix}/probe"][0]
        x = attend(arrays, f"{prefix}/MultiHeadDotProductAttention_0", probe, x)
        x = x + mlp(arrays, f"{prefix}/MlpBlock_0", layer_norm(arrays, f"{prefix}/LayerNorm_0", x))
    x = x.mean(0) if pool == "gap" else x[0]
    if "pre_logits/kernel" in arrays:
        x = np.tanh(dense(arrays, "pre_logits", x))
    return dense(arrays, "head", x)


def sincos(h: int, w: int, width: int) -> np.ndarray:
    """MoCo v3's table as big_vision computes it: the last frequency is 1 / temperature."""
    rows, columns = np.mgrid[:h, :w]
    omega = 1 / 10_000.0 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = rows.reshape(-1, 1) * omega, columns.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)


def write_google(
    case: str, *, parts=NEW, pool="tok", representation=0, stored="pos_embedding", fused=False,
    scanned=False, root="",
) -> None:  # fmt: skip
    arrays = google_arrays(parts, pool, representation)
    rows = draw(1, GRID * GRID + fused, WIDTH)
    positions = rows[0, int(fused) :] if stored else sincos(GRID, GRID, WIDTH)
    if stored:
        arrays[stored] = rows
    images = draw(2, SIZE, SIZE, 3)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    logits = [
        google_logits(exact, positions, rows[0, 0] if fused else 0, parts, pool, image)
        for image in images.astype(np.float64)
    ]
    if scanned:
        first = "Transformer/encoderblock_0/"
        for name in [name for name in arrays if name.startswith(first)]:
            blocks = [arrays.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(DEPTH)]
            arrays[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(blocks)
    arrays = {root + name: array for name, array in arrays.items()}
    if root:
        arrays["opt/state/step"] = np.int64(7)
    np.savez_compressed(FOLDER / f"{case}.npz", **arrays)
    expect(case, images, np.stack(logits))


# timm and transformers


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = float("norm" in name and name.endswith("weight"))
            parameter.copy_(torch.from_numpy(draw(*parameter.shape, around=around)))
    return model.eval()


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


TIMM = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": MLP / WIDTH,
    "num_classes": CLASSES,
}


@torch.no_grad()
def write_timm(case: str, architecture: str = "vit_tiny_patch16_224", **options) -> None:
    model = randomised(timm.create_model(architecture, **TIMM, **options))
    images = draw(2, SIZE, SIZE, 3)
    expect(case, images, model(channels_first(images)).numpy())
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, FOLDER / f"{case}.safetensors")
    larger = timm.create_model(architecture, **{**TIMM, "img_size": LARGER}, **options).eval()
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_size=[5, 5], num_prefix_tokens=prefix
    )
    larger.load_state_dict(state)
    images = draw(2, LARGER, LARGER, 3)
    expect(f"{case}-larger", images, larger(channels_first(images)).numpy())


@torch.no_grad()
def write_huggingface(case: str) -> None:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        image_size=SIZE,
        patch_size=PATCH,
        num_labels=CLASSES,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    model = randomised(transformers.ViTForImageClassification(config))
    model.save_pretrained(FOLDER / case)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    (FOLDER / case / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": mean, "image_std": std})
    )
    images = draw(2, SIZE, SIZE, 3)
    expect(case, images, model(channels_first(images)).logits.numpy())


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    embedded = "Transformer/posembed_input/pos_embedding"
    write_google("google", parts=OLD, stored=embedded, fused=True)
    write_google("google-pre_logits", stored=embedded, fused=True, representation=8)
    write_google("google-gap", parts=OLD, stored=embedded, pool="gap")
    write_google("big_vision-tok", root="opt/target/")
    write_google("big_vision-gap", pool="gap", stored="", representation=WIDTH, root="params/")
    write_google("big_vision-map", pool="map", scanned=True)
    write_timm("timm")
    write_timm("timm-gap", class_token=False, global_pool="avg", fc_norm=False)
    write_timm("timm-map", class_token=False, global_pool="map")
    write_huggingface("huggingface")
    write_timm("timm-deit3", init_values=1.0, no_embed_class=True)
    write_timm("timm-avg", global_pool="avg", fc_norm=False)
    write_timm("timm-fc_norm", global_pool="avg", fc_norm=True)
    write_timm("timm-distilled", architecture="deit_tiny_distilled_patch16_224")
    np.savez_compressed(FOLDER / "expected.npz", **EXPECTED)
    for file in sorted(FOLDER.rglob("*.*")):
        print(f"{file.relative_to(FOLDER)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

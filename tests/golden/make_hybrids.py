"""Writes hybrids.npz: what Google's code and timm compute with small hybrids of random weights.

Run with numpy, torch, timm (the extra `peers`), jax and flax, and the path of a clone of
google-research/vision_transformer, whose models_vit.py computes the logits of Google's files:
    python tests/golden/make_hybrids.py CLONE
The ResNets are those of the published models, the ViTs narrow. Of arrays only names and shapes are
stored; draw_by_name.py has their values. Nothing here imports vit_scale.
"""

import pathlib
import sys
import tempfile

import flax
import jax
import numpy as np
import timm
import torch
from draw_by_name import draw, draw_images
from make_weights import NEW, OLD
from ml_collections import ConfigDict
from timm.layers import resample_abs_pos_embed

WIDTH, DEPTH, HEADS, MLP, CLASSES = 24, 1, 3, 48, 5
CASES = {  # timm's architecture, Google's blocks per stage, patch of the features, image sizes
    "R": ("vit_tiny_r_s16_p8_224", (), 8, ((64, 64), (96, 64))),
    "R26": ("vit_small_r26_s32_224", (2, 2, 2, 2), 1, ((64, 64), (96, 64))),
    "R50-16": ("vit_base_r50_s16_224", (3, 4, 9), 1, ((32, 32), (48, 32))),
    "R50-32": ("vit_large_r50_s32_224", (3, 4, 6, 3), 1, ((64, 64), (96, 64))),
}
FILE = pathlib.Path(__file__).with_name("hybrids.npz")
CONTENT: dict[str, np.ndarray] = {}


def describe(case: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Store names and shapes; return the arrays."""
    CONTENT[f"{case}/arrays"] = np.array(
        [f"{key} {','.join(map(str, shape))}" for key, shape in shapes.items()]
    )
    return {key: draw(key, shape) for key, shape in shapes.items()}


def pixels(case: str, size: tuple[int, int]) -> np.ndarray:
    CONTENT[f"{case}/size"] = np.array(size)
    return draw_images(case, size)


def timm_model(architecture: str, size: tuple[int, int], **options) -> torch.nn.Module:
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": MLP / WIDTH}
    return timm.create_model(
        architecture, img_size=size, num_classes=CLASSES, **sizes, **options
    ).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def google_model(stages: tuple[int, ...], patch: int):
    from vit_jax.models_vit import VisionTransformer

    transformer = {"mlp_dim": MLP, "num_heads": HEADS, "num_layers": DEPTH, "dropout_rate": 0.0}
    return VisionTransformer(
        num_classes=CLASSES,
        patches=ConfigDict({"size": (patch, patch)}),
        hidden_size=WIDTH,
        transformer=transformer | {"attention_dropout_rate": 0.0},
        resnet=ConfigDict({"num_layers": stages, "width_factor": 1}),
    )


def published_key(key: str) -> str:
    """The name that Flax gave when the models were trained: one counter for all types of layers."""
    for new, old in zip(NEW[1:], OLD[1:], strict=True):
        key = key.replace(f"/{new}/", f"/{old}/")
    return key


def write_google(name: str) -> None:
    """Also timm's logits of the file, which it reads itself."""
    architecture, stages, patch, (size, _) = CASES[name]
    case, model = f"google-{name}", google_model(stages, patch)
    images = pixels(case, size)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    published = {published_key(key): leaf.shape for key, leaf in leaves.items()}
    norms = {key: (1, 1, 1, *shape) for key, shape in published.items() if "gn" in key}
    arrays = describe(case, published | norms)
    params = {key: arrays[published_key(key)].reshape(leaf.shape) for key, leaf in leaves.items()}
    params = {"params": flax.traverse_util.unflatten_dict(params, sep="/")}
    CONTENT[f"{case}/logits"] = np.asarray(model.apply(params, images, train=False))
    reader = timm_model(architecture, size, act_layer="gelu_tanh")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.npz"
        np.savez(file, **arrays)
        reader.load_pretrained(str(file))
    CONTENT[f"{case}/timm"] = logits_of(reader, images)
    difference = np.abs(CONTENT[f"{case}/timm"] - CONTENT[f"{case}/logits"]).max()
    print(f"{case}: timm differs by {difference:.1e} of {np.ptp(CONTENT[f'{case}/logits']):.2f}")


def write_timm(name: str) -> None:
    architecture, _, _, (size, larger) = CASES[name]
    case, model = f"timm-{name}", timm_model(architecture, size)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    state = {key: torch.from_numpy(x) for key, x in describe(case, state).items()}
    model.load_state_dict(state)
    CONTENT[f"{case}/logits"] = logits_of(model, pixels(case, size))
    model = timm_model(architecture, larger)
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_size=list(model.patch_embed.grid_size)
    )
    model.load_state_dict(state)
    CONTENT[f"{case}-larger/logits"] = logits_of(model, pixels(f"{case}-larger", larger))


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    for name in CASES:
        write_google(name)
        write_timm(name)
    np.savez_compressed(FILE, **CONTENT)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

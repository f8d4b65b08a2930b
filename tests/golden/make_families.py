"""Writes families/: tiny ViTs of the families that people start from, and what they compute.

Run in an environment with numpy, torch, timm, transformers and safetensors (the extra `peers`):
    python tests/golden/make_families.py
transformers computes DINOv2, DINOv3, SigLIP, SigLIP 2, CLIP and MAE, timm EVA-02, RoPE-ViT, DINOv3,
the Perception Encoder and ViTs with registers. Files as Meta and OpenAI spell them have timm's
values under their keys. Nothing here imports vit_scale.
"""

import json
import pathlib
import re
import shutil

import numpy as np
import safetensors.torch
import timm
import torch
import transformers
from make_weights import (
    CLASSES,
    DEPTH,
    GRID,
    HEADS,
    MLP,
    PATCH,
    SIZE,
    TIMM,
    channels_first,
    draw,
    randomised,
)  # fmt: skip

FOLDER = pathlib.Path(__file__).with_name("families")
EXPECTED: dict[str, np.ndarray] = {}


def expect(case: str, images: np.ndarray, values: np.ndarray) -> None:
    EXPECTED[f"{case}/images"] = images.astype(np.float32)
    EXPECTED[f"{case}/values"] = values.astype(np.float32)


ARCHITECTURES = {
    "timm-eva02": "eva02_base_patch14_224",
    "timm-eva02-clip": "eva02_base_patch16_clip_224",
    "timm-rope": "vit_small_patch16_rope_ape_224",
    "timm-rope-mixed": "vit_small_patch16_rope_mixed_224",
    "timm-dinov3": "vit_small_plus_patch16_dinov3",
    "timm-pe": "vit_pe_core_tiny_patch16_384",
}


EVA = {"depth": 2, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 20 / 24}


@torch.no_grad()
def write_architecture(case: str, architecture: str, **options) -> None:
    """A folder as on the Hub: config.json has the architecture's name, and what differs from it."""
    options |= {"img_size": SIZE, "patch_size": PATCH, "num_classes": CLASSES}
    model = randomised(timm.create_model(architecture, **options))
    images = draw(2, SIZE, SIZE, 3)
    expect(case, images, model(channels_first(images)).numpy())
    (FOLDER / case).mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, FOLDER / case / "model.safetensors")
    config = {
        "architecture": architecture,
        "global_pool": model.global_pool,
        "model_args": {"num_heads": options["num_heads"]},
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "mean": [0.4] * 3, "std": [0.2] * 3},
    }
    (FOLDER / case / "config.json").write_text(json.dumps(config))


# Transformers' own. Without a classifier, the expected values are the pooled features.
WIDE = {  # heads of 8 channels, which rotary positions divide by 4
    "hidden_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "image_size": SIZE,
    "patch_size": PATCH,
}
DINO = {key: value for key, value in WIDE.items() if key != "intermediate_size"}
TEXT = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 8,
    "vocab_size": 9,
    "max_position_embeddings": 4,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@torch.no_grad()
def write_transformers(case: str, model, feature, *, larger: bool = False) -> None:
    """`feature` takes the model's output; `larger`: also of images of 8 x 20 px, interpolated."""
    model = randomised(model)
    model.save_pretrained(FOLDER / case)
    sizes = {case: (SIZE, SIZE)} | ({f"{case}-wide": (8, 20)} if larger else {})
    for name, shape in sizes.items():
        images = draw(2, *shape, 3)
        more = {"interpolate_pos_encoding": True} if "clip" in case and larger else {}
        expect(name, images, feature(model(channels_first(images), **more)).numpy())


def naflex_inputs(images: np.ndarray) -> dict:
    """What SigLIP 2's model for images of any shape reads: patches, row by row."""
    b, h, w = len(images), GRID, GRID
    patches = images.reshape(b, h, PATCH, w, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return {
        "pixel_values": torch.from_numpy(np.ascontiguousarray(patches).reshape(b, h * w, -1)),
        "pixel_attention_mask": torch.ones(b, h * w, dtype=torch.long),
        "spatial_shapes": torch.tensor([[h, w]] * b),
    }


@torch.no_grad()
def write_families() -> None:
    t = transformers
    dino, registers = t.Dinov2Config(**DINO, mlp_ratio=1), {"num_register_tokens": 2}
    write_transformers("dinov2", t.Dinov2Model(dino), lambda out: out.pooler_output, larger=True)
    gated = t.Dinov2Config(**DINO, mlp_ratio=1, use_swiglu_ffn=True, num_labels=CLASSES)
    write_transformers("dinov2-gated", t.Dinov2ForImageClassification(gated), lambda o: o.logits)
    cfg = t.Dinov2WithRegistersConfig(**DINO, **registers, mlp_ratio=1, num_labels=CLASSES)
    model = t.Dinov2WithRegistersForImageClassification(cfg)
    write_transformers("dinov2-registers", model, lambda out: out.logits)
    for case, gate in (("dinov3", False), ("dinov3-gated", True)):
        options = {"use_gated_mlp": gate, "hidden_act": "silu" if gate else "gelu"}
        model = t.DINOv3ViTModel(t.DINOv3ViTConfig(**WIDE, **registers, **options))
        write_transformers(case, model, lambda out: out.pooler_output, larger=not gate)
    vision = dict(WIDE)
    model = t.SiglipVisionModel(t.SiglipVisionConfig(**vision))
    write_transformers("siglip", model, lambda out: out.pooler_output)
    cfg = t.SiglipConfig(vision_config=vision, text_config={**TEXT, **TOKENS})
    pair = randomised(t.SiglipModel(cfg))
    write_pair("siglip-pair", pair, lambda images: pair.vision_model(images).pooler_output)
    flat = {key: value for key, value in vision.items() if key != "image_size"}
    naflex = randomised(t.Siglip2VisionModel(t.Siglip2VisionConfig(**flat, num_patches=GRID**2)))
    naflex.save_pretrained(FOLDER / "siglip2-naflex")
    images = draw(2, SIZE, SIZE, 3)
    expect("siglip2-naflex", images, naflex(**naflex_inputs(images)).pooler_output.numpy())
    projected = t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**vision, projection_dim=6))
    write_transformers("clip", projected, lambda out: out.image_embeds, larger=True)
    cfg = t.CLIPConfig(vision_config=vision, text_config={**TEXT, **TOKENS}, projection_dim=6)
    both = randomised(t.CLIPModel(cfg))
    write_pair(
        "clip-pair",
        both,
        lambda images: both.visual_projection(both.vision_model(images).pooler_output),
    )
    mae = t.ViTMAEConfig(
        **WIDE, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=8, mask_ratio=0.0,
    )  # fmt: skip
    model = t.ViTMAEForPreTraining(mae)
    randomised(model).save_pretrained(FOLDER / "mae")
    images, order = draw(2, SIZE, SIZE, 3), torch.arange(GRID**2).repeat(2, 1).float()
    states = model.vit(channels_first(images), noise=order).last_hidden_state
    expect("mae", images, states[:, 0].numpy())


def write_pair(case: str, model, feature) -> None:
    """A model of images and texts, of which the image tower is read."""
    model.save_pretrained(FOLDER / case)
    images = draw(2, SIZE, SIZE, 3)
    expect(case, images, feature(channels_first(images)).numpy())


@torch.no_grad()
def write_others() -> None:
    """As Meta, OpenAI and EVA's authors spell what timm computes: keys by hand, and no config."""
    options = {**TIMM, "embed_dim": 24, "mlp_ratio": MLP / 24, "num_classes": 0}
    dino = randomised(timm.create_model("vit_small_patch14_reg4_dinov2", **options))
    state, images = dino.state_dict(), draw(2, SIZE, SIZE, 3)
    expect("meta-dinov2", images, dino(channels_first(images)).numpy())
    state["register_tokens"] = state.pop("reg_token")
    position = torch.from_numpy(draw(1, 1, 24))  # of [CLS], which timm adds to the token
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["mask_token"] = torch.zeros(1, 24)
    chunks = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", name): x for name, x in state.items()}
    teacher = {f"teacher.backbone.{name}": x.contiguous() for name, x in chunks.items()}
    teacher["teacher.dino_head.mlp.0.weight"] = torch.zeros(3, 24)
    safetensors.torch.save_file(teacher, FOLDER / "meta-dinov2.safetensors")

    options = {**EVA, "img_size": SIZE, "patch_size": PATCH, "num_classes": 0}
    dino = timm.create_model("vit_small_plus_patch16_dinov3_qkvb", global_pool="token", **options)
    dino = randomised(dino)
    state, images = dino.state_dict(), draw(2, SIZE, SIZE, 3)
    expect("meta-dinov3", images, dino(channels_first(images)).numpy())
    state["storage_tokens"] = state.pop("reg_token")
    state["rope_embed.periods"] = 100.0 ** (torch.arange(2) / 2)
    state["mask_token"] = torch.zeros(1, 24)
    for i in range(DEPTH):
        block = f"blocks.{i}."
        q, v = (state.pop(f"{block}attn.{part}_bias") for part in "qv")
        state[f"{block}attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 7.0), v])
        ones = torch.ones_like(q)
        state[f"{block}attn.qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
        for old, new in (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            state[block + new] = state.pop(block + old)
        for old, new in (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")):
            for leaf in ("weight", "bias"):
                state[f"{block}mlp.{new}.{leaf}"] = state.pop(f"{block}mlp.{old}.{leaf}")
    save(state, "meta-dinov3.safetensors")

    options = {**TIMM, "embed_dim": 24, "mlp_ratio": MLP / 24, "num_classes": 6}
    clip = randomised(timm.create_model("vit_base_patch32_clip_quickgelu_224", **options))
    clip.head.bias.zero_()
    state, images = clip.state_dict(), draw(2, SIZE, SIZE, 3)
    expect("open_clip", images, clip(channels_first(images)).numpy())
    names = {
        r"patch_embed\.proj": "conv1", r"norm_pre": "ln_pre", r"^norm\.": "ln_post.",
        r"^blocks\.": "transformer.resblocks.", r"norm([12])": r"ln_\1",
        r"attn\.qkv\.": "attn.in_proj_", r"attn\.proj": "attn.out_proj",
        r"mlp\.fc1": "mlp.c_fc", r"mlp\.fc2": "mlp.c_proj",
    }  # fmt: skip
    del state["head.bias"]
    state["proj"] = state.pop("head.weight").T
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    for old, new in names.items():
        state = {re.sub(old, new, name): x for name, x in state.items()}
    tower = {f"visual.{name}": x for name, x in state.items()}
    tower |= {
        "text_projection": torch.zeros(3, 3),
        "transformer.resblocks.0.ln_1.bias": torch.zeros(3),
    }
    save(tower, "open_clip/open_clip_model.safetensors")
    vision = {
        "image_size": SIZE,
        "layers": DEPTH,
        "width": 24,
        "head_width": 8,
        "patch_size": PATCH,
    }
    config = {
        "model_cfg": {"embed_dim": 6, "quick_gelu": True, "vision_cfg": vision, "text_cfg": {}},
        "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3},
    }
    (FOLDER / "open_clip" / "open_clip_config.json").write_text(json.dumps(config))


def save(state: dict, name: str) -> None:
    (FOLDER / name).parent.mkdir(exist_ok=True)
    arrays = {key: tensor.contiguous() for key, tensor in state.items()}
    safetensors.torch.save_file(arrays, FOLDER / name)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write_families()
    write_others()
    for case, architecture in ARCHITECTURES.items():
        write_architecture(case, architecture, **EVA)
    registers = {"qk_norm": True, "pre_norm": True, "init_values": 1.0, "reg_tokens": 2}
    options = {"depth": 2, "embed_dim": 24, "num_heads": 3, "mlp_ratio": MLP / 24}
    write_architecture("timm-registers", "vit_small_patch16_224", **options, **registers)
    np.savez_compressed(FOLDER / "expected.npz", **EXPECTED)
    for file in sorted(FOLDER.rglob("*.*")):
        print(f"{file.relative_to(FOLDER)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

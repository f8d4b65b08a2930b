"""Write our models as timm's: the arrays, and the config.json for `timm.create_model`.

timm has two classes: VisionTransformer, also of hybrids, and Eva for rotary positions, a gated MLP
and norms inside a block. An architecture of either is named, and every argument that differs is
stated. What neither can express is refused; parameters that timm has and ours lack are added as
zeros.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_scale.augment.view import View
from vit_scale.config import image_size
from vit_scale.errors import UserError
from vit_scale.models.spec import Shape
from vit_scale.pretrained.formats import TIMM
from vit_scale.pretrained.key_mapping import POSITIONS, Arrays, to_arrays
from vit_scale.pretrained.rotary_channels import reorder
from vit_scale.pretrained.timm_config import POOLS

PLAIN, DISTILLED = "vit_base_patch16_224", "deit_base_distilled_patch16_224"
EVA = {1e-6: "vit_small_patch16_rope_224", 1e-5: "vit_small_patch16_dinov3"}  # by epsilon
HYBRIDS = {  # by the ResNet's blocks per stage
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
ACTIVATIONS = {"exact": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}


def is_eva(cfg: ConfigDict, shape: Shape) -> bool:
    """Return whether timm has the model of this `model` block as Eva, not as VisionTransformer."""
    return bool(
        cfg.rope != "none"
        or shape.size.swiglu
        or cfg.attention_norm
        or cfg.mlp_norm
        or cfg.pool_heads
        or cfg.pool_mlp
        or (shape.pool == "map" and shape.class_token)
    )


def check_timm(cfg: ConfigDict, shape: Shape) -> None:
    """Raise UserError for a `model` block that neither of timm's classes can express."""
    eva = is_eva(cfg, shape)
    problems = {
        "pool=cls_gap": shape.pool == "cls_gap",
        "nearest_grid=True": cfg.nearest_grid,
        f"representation={shape.representation}": bool(shape.representation),
        f"qk_norm={cfg.qk_norm} beside norm={cfg.norm}": cfg.qk_norm not in ("none", cfg.norm),
        "distilled=True": bool(eva or shape.stem or shape.registers) and shape.distilled,
        f"variant={cfg.variant}": shape.stem and (eva or not shape.stem.is_bit),
        f"registers={shape.registers} outside of the pool": eva
        and shape.registers
        and shape.pool == "map",
        f"norm={cfg.norm}": eva and cfg.norm != "layernorm",
        f"gelu={cfg.gelu}": eva
        and cfg.gelu != "exact"
        and (not shape.size.swiglu or shape.pool == "map"),
    }
    if impossible := [field for field, problem in problems.items() if problem]:
        kind = "Eva" if eva else "VisionTransformer"
        raise UserError(f"timm's {kind} has no model.{impossible[0]}: export to jax")


def timm_arrays(params: Arrays, cfg: ConfigDict, shape: Shape) -> Arrays:
    """Return named, unrolled parameters as timm's arrays. Raises UserError."""
    check_timm(cfg, shape)
    params, eva, width = dict(params), is_eva(cfg, shape), shape.size.width
    if POSITIONS not in params and not (eva and cfg.posemb == "none"):
        params[POSITIONS] = np.zeros((*shape.grid, width), np.float32)
    if cfg.pre_norm and "embed/bias" in params:  # timm has none there: the same sum
        if POSITIONS not in params:
            raise UserError("timm has no bias of the patch embedding beside a norm: export to jax")
        params[POSITIONS] = params[POSITIONS] + params.pop("embed/bias")
    if not cfg.pre_norm and not cfg.patch_bias:
        params["embed/bias"] = np.zeros(width, np.float32)
    if eva and not cfg.proj_bias:
        for i in range(shape.size.depth):
            block = f"blocks/{i}/"
            params[block + "attention/out/bias"] = np.zeros(width, np.float32)
            params[block + "mlp/down/bias"] = np.zeros(width, np.float32)
            for layer in ("up", "gate") if shape.size.swiglu else ("up",):
                params[f"{block}mlp/{layer}/bias"] = np.zeros(shape.size.mlp, np.float32)
    if cfg.rope == "mixed":  # which timm only has with neighbouring channels
        params = reorder(params, "pairs", back=True)
    arrays = to_arrays(TIMM, params, shape.size.depth)
    if (eva or shape.registers) and "pos_embed" in arrays:  # no_embed_class
        arrays["pos_embed"] = arrays["pos_embed"][:, shape.class_token + shape.distilled :]
    if shape.fc_norm:
        arrays |= {f"fc_norm.{leaf}": arrays.pop(f"norm.{leaf}") for leaf in _leaves(arrays)}
    if shape.stem and not shape.stem.stages:
        arrays = {key.replace("backbone.stem.", "backbone."): x for key, x in arrays.items()}
    return _as_eva(arrays, shape) if eva else arrays


def _leaves(arrays: Arrays) -> list[str]:
    return [leaf for leaf in ("weight", "bias") if f"norm.{leaf}" in arrays]


def _as_eva(arrays: Arrays, shape: Shape) -> Arrays:
    """Return the arrays under Eva's keys."""
    renamed: Arrays = {}
    for key, array in arrays.items():
        key = key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
        if shape.size.swiglu and key.startswith("blocks."):
            key = key.replace(".mlp.fc1.", ".mlp.fc1_x.")
        renamed[key] = array
    frequencies = [f"blocks.{i}.rope.freqs" for i in range(shape.size.depth)]
    if frequencies[0] in renamed:
        renamed["rope.freqs"] = np.stack([renamed.pop(key) for key in frequencies], axis=1)
    return renamed


def timm_config(
    cfg: ConfigDict, shape: Shape, classes: tuple[str, ...], view: View
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json, for `timm.create_model("local-dir:FOLDER")`, and lines on what differs.

    `cfg` is the whole config.
    """
    eva, epsilon, image = is_eva(cfg.model, shape), cfg.model.norm_epsilon, image_size(cfg)
    arguments = _common(cfg.model, shape) | {"img_size": list(image)}
    arguments |= _eva(cfg.model, shape) if eva else _plain(cfg.model, shape)
    named = 1e-5 if eva and epsilon == 1e-5 else 1e-6
    architecture = EVA[named] if eva else DISTILLED if shape.distilled else PLAIN
    first_conv = "patch_embed.proj"
    if shape.stem:
        architecture = HYBRIDS[shape.stem.stages]
        first_conv = f"patch_embed.backbone.{'stem.' if shape.stem.stages else ''}conv"
    lines = []
    if shape.stem and cfg.model.stem_epsilon != "timm":
        lines.append(
            f"this model has model.stem_epsilon={cfg.model.stem_epsilon}, and timm other epsilons "
            "in the ResNet: logits will differ a little"
        )
    if epsilon != named:
        lines.append(
            f"this model has norm_epsilon={epsilon:g}, which timm's config can't express: set `eps`"
            " of every norm after loading, or logits will differ"
        )
    content = {
        "architecture": architecture,
        "num_classes": cfg.model.classes,
        "num_features": shape.size.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, *image],
            "fixed_input_size": True,
            "interpolation": view.resample,
            "crop_pct": view.crop,
            "crop_mode": "squash" if view.fit == "stretch" else "center",
            "mean": list(cfg.augment.mean),
            "std": list(cfg.augment.std),
            "num_classes": cfg.model.classes,
            "label_names": list(classes),
            "first_conv": first_conv,
            "classifier": ["head", "head_dist"] if shape.distilled else "head",
        },
    }
    return content, lines


def _common(cfg: ConfigDict, shape: Shape) -> dict[str, Any]:
    """The arguments that both classes have."""
    size = shape.size
    ratio = size.mlp / size.width
    if int(size.width * ratio) != size.mlp:  # timm rounds the product down
        ratio = (size.mlp + 0.5) / size.width
    arguments: dict[str, Any] = {
        "patch_size": shape.stem.patch if shape.stem else shape.patch,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": ratio,
        "class_token": shape.class_token,
        "global_pool": next(name for name, pool in POOLS.items() if pool == shape.pool),
    }
    if cfg.layer_scale:
        arguments["init_values"] = cfg.layer_scale
    if not cfg.qkv_bias:
        arguments["qkv_bias"] = False
    if cfg.qk_norm != "none":
        arguments["qk_norm"] = True
    return arguments


def _plain(cfg: ConfigDict, shape: Shape) -> dict[str, Any]:
    """The arguments of VisionTransformer."""
    arguments: dict[str, Any] = {"fc_norm": shape.fc_norm, "act_layer": ACTIVATIONS[cfg.gelu]}
    if shape.registers:
        arguments |= {"reg_tokens": shape.registers, "no_embed_class": True}
    for name, value in (("pre_norm", cfg.pre_norm), ("norm_layer", cfg.norm)):
        if value not in (False, "layernorm"):
            arguments[name] = value
    for name in ("proj_bias", "final_norm"):
        if not cfg[name]:
            arguments[name] = False
    return arguments


def _eva(cfg: ConfigDict, shape: Shape) -> dict[str, Any]:
    """The arguments of Eva."""
    arguments: dict[str, Any] = {
        "attn_type": "rope",
        "qkv_bias": cfg.qkv_bias,
        "qkv_fused": True,
        "init_values": cfg.layer_scale or None,
        "num_reg_tokens": shape.registers,
        "no_embed_class": True,
        "dynamic_img_size": False,
        "use_abs_pos_emb": cfg.posemb != "none",
        "use_rot_pos_emb": cfg.rope != "none",
        "swiglu_mlp": shape.size.swiglu,
        "swiglu_align_to": 1 if shape.size.swiglu else 0,  # two layers, not a packed one
        "scale_mlp": cfg.mlp_norm,
        "scale_attn_inner": cfg.attention_norm,
        "use_pre_transformer_norm": cfg.pre_norm,
        "use_post_transformer_norm": cfg.final_norm and not shape.fc_norm,
        "use_fc_norm": shape.fc_norm,
    }
    if shape.pool == "map":
        mlp = cfg.pool_mlp or shape.size.mlp
        arguments["attn_pool_num_heads"] = cfg.pool_heads or shape.size.heads
        arguments["attn_pool_mlp_ratio"] = mlp / shape.size.width
    if cfg.rope == "none":
        return arguments
    return arguments | {
        "rope_type": {"axial": "cat"}.get(cfg.rope, cfg.rope),
        "rope_temperature": cfg.rope_temperature,
        "rope_rotate_half": cfg.rope != "mixed",
        "rope_grid_indexing": "xy" if cfg.rope == "mixed" else "ij",
        "rope_grid_offset": cfg.rope_offset,
        "ref_feat_shape": [cfg.rope_reference] * 2 if cfg.rope_reference else None,
    }

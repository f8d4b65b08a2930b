"""Infer the config of a model from its external weights.

Sizes, heads and pooling come from the arrays where they determine them, else from the metadata
beside the weights, else from the user's hints or the format's convention. Whatever is assumed is
returned as text, so that it can be printed.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models import bit
from vit_scale.models.layers import Size
from vit_scale.models.spec import SIZES
from vit_scale.pretrained.formats import TIMM
from vit_scale.pretrained.hints import Hints
from vit_scale.pretrained.key_mapping import (
    POSITIONS,
    Arrays,
    Convention,
    WeightFormat,
    abbreviate,
    to_params,
)
from vit_scale.pretrained.metadata import Metadata
from vit_scale.pretrained.position_layout import (
    KnownSizes,
    PositionLayout,
    infer_position_layout,
)

LAYER_SCALE = 1e-5  # initial value of LayerScale, of which trained weights have their own
RESOLUTION = 224  # pixels, if positions are not stored and no size is stated
# Fields that arrays don't determine. Those that the metadata leaves open are reported as assumed.
NOT_IN_ARRAYS = ("model.gelu", "model.norm_epsilon", "augment.mean", "augment.std")
VIEW = ("eval.fit", "eval.crop", "eval.resample")


class InferredConfig(NamedTuple):
    cfg: ConfigDict
    leading_positions: int  # rows of position embeddings before those of the patches
    assumptions: tuple[str, ...]


def infer_config(
    fmt: WeightFormat,
    arrays: Arrays,
    metadata: Metadata,
    hints: Hints,
    keys: frozenset[str],
    usual: Convention,
) -> InferredConfig:
    """Infer the config of the model with these canonical arrays.

    `keys` are those of the state dict, `usual` is the format's convention for such files.
    Raises UserError if the arrays and the metadata contradict each other, or make no model of this
    project.
    """
    first = _first_block(fmt, arrays)
    stored = fmt.stored_params(arrays)
    stated = {**fmt.model, **usual.model, **metadata.model}
    patch, width = first["embed/kernel"].shape[1::2]
    stem, patch = _infer_stem(first, patch)
    size = Size(width, fmt.depth(arrays), 1, first["blocks/0/mlp/up/kernel"].shape[1])
    size = dataclasses.replace(size, swiglu="blocks/0/mlp/gate/kernel" in first)
    _check_dimensions(metadata, width=width, depth=size.depth)
    heads, assumptions = _infer_heads(fmt, first, metadata, hints, size)
    cfg = config.base()
    cfg.model.update(variant_fields(dataclasses.replace(size, heads=heads), patch, stem))
    cfg.model.update({**stated, **_block_fields(first, stored, stated), "heads": cfg.model.heads})
    if POSITIONS not in first and cfg.model.rope != "none":
        cfg.model.posemb = "none"
    assumptions += _infer_pool(cfg, fmt, first, metadata, keys)
    cfg.model.distilled = "dist" in first
    if "representation/bias" in first:
        cfg.model.representation = len(first["representation/bias"])
    cfg.model.classes = len(first["head/bias"]) if "head/bias" in first else 1
    pixels, view = metadata.library_defaults
    cfg.augment.update({**fmt.augment, **pixels, **metadata.augment})
    cfg.eval.update({**fmt.eval, **view, **metadata.eval})
    layout = _infer_positions(fmt, first, metadata, hints, patch, keys)
    cfg.data.resolution = layout.grid[0] * patch
    cfg.data.width = layout.grid[1] * patch if layout.grid[1] != layout.grid[0] else None
    if layout.assumption:
        assumptions = [layout.assumption, *assumptions]
    return InferredConfig(cfg, layout.leading, (*assumptions, *_assumed_fields(fmt, cfg, metadata)))


def convention(fmt: WeightFormat, keys: frozenset[str]) -> Convention:
    """The format's convention for the models of a file with these keys: the first that matches."""
    for candidate in fmt.conventions:
        if any(re.fullmatch(candidate.key or ".*", key) for key in keys):
            return candidate
    return Convention("", {})


def _block_fields(first: Arrays, stored: set[str], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the model block that follow from which parameters there are.

    Absent biases of the patch embedding are those of CLIP, which has a norm before the blocks; any
    other absent parameter is damage, unless the metadata says so.
    """
    attention, pre_norm = "blocks/0/attention/", "pre_norm/scale" in stored
    kind = "layernorm" if attention + "query_norm/bias" in stored else "rmsnorm"
    fields = {
        "registers": len(first.get("registers", ())),
        "pre_norm": pre_norm,
        "qk_norm": kind if attention + "query_norm/scale" in stored else "none",
        "attention_norm": attention + "norm/scale" in stored,
        "mlp_norm": "blocks/0/mlp/norm/scale" in stored,
        "qkv_bias": attention + "query/bias" in stored,
        "layer_scale": LAYER_SCALE if "blocks/0/scale1" in stored else 0.0,
    }
    if pre_norm and "patch_bias" not in stated:
        fields["patch_bias"] = "embed/bias" in first
    if "pool/mlp/up/kernel" in first:
        mlp = first["pool/mlp/up/kernel"].shape[1]
        fields["pool_mlp"] = mlp if mlp != first["blocks/0/mlp/up/kernel"].shape[1] else None
    return fields


def _assumed_fields(fmt: WeightFormat, cfg: ConfigDict, metadata: Metadata) -> list[str]:
    """FIELD=VALUE of each field that neither the arrays nor the metadata determine."""
    stated = {f"model.{name}" for name in metadata.model}
    stated |= {f"augment.{name}" for name in metadata.augment}
    stated |= {f"eval.{name}" for name in metadata.eval}
    values = config.fields(cfg)
    silent = []  # of models whose arrays look like those of others
    if fmt.needs_architecture and not metadata.channels:
        silent += ["model.rope"] if cfg.model.rope == "none" else []
        silent += ["model.pool_heads"] if cfg.model.pool == "map" else []
    return [
        f"{name}={values[name]}".replace(" ", "")
        for name in (*NOT_IN_ARRAYS, *silent, *VIEW)
        if name not in stated
    ]


def _check_dimensions(metadata: Metadata, **dimensions: int) -> None:
    """Check the width and depth in the metadata against the arrays'. Raises UserError."""
    for name, value in dimensions.items():
        stated = metadata.dimensions.get(name)
        if stated not in (None, value):
            raise UserError(
                f"config.json says {name} {stated}, but the arrays have {name} {value}: the two "
                "files belong to different models"
            )


def variant_fields(size: Size, patch: int, stem: str = "") -> dict[str, Any]:
    """Fields of the model block for these sizes: the name of a standard variant, or each number.

    `stem` is that of a hybrid, such as "R26+".
    """
    letter = next((name for name, standard in SIZES.items() if standard == size), None)
    if letter:
        return {"variant": f"{stem}{letter}/{patch}"}
    sizes = {**vars(size), "swiglu": size.swiglu or None}  # None: as Ti
    return {"variant": f"{stem}Ti/{patch}", **sizes}


def _infer_stem(first: Arrays, patch: int) -> tuple[str, int]:
    """Return a hybrid's stem ("R26+"; "" for a ViT) and the pixels of the image per patch.

    `patch` is in pixels of the feature map. Raises UserError for a ResNet of another depth.
    """
    if not any(name.startswith("stem/") for name in first):
        return "", patch
    prefix = "stem/stages/"
    blocks = {tuple(name.split("/")[2:4]) for name in first if name.startswith(prefix)}
    counts = collections.Counter(stage for stage, _ in blocks)
    stages = tuple(counts[stage] for stage in sorted(counts))
    pixels = patch * bit.stride(stages)
    for name in bit.STAGES:
        if bit.stages(name, pixels) == stages:
            return f"{name}+", pixels
    known = ", ".join(map(str, (*bit.STAGES.values(), bit.R50_STRIDE_16)))
    raise UserError(
        f"a ResNet of {stages} blocks per stage, with patches of {pixels} px, is no stem of a "
        f"hybrid: {known} are"
    )


def _infer_pool(
    cfg: ConfigDict, fmt: WeightFormat, first: Arrays, metadata: Metadata, keys: frozenset[str]
) -> list[str]:
    """Set how tokens are pooled; return what was assumed. Raises UserError on a contradiction."""
    stated, has_cls = metadata.model.get("pool"), "cls" in first
    width = first["embed/kernel"].shape[-1]
    cfg.model.fc_norm = bool(fmt.fc_norm) and f"{fmt.fc_norm[0]}.weight" in keys
    pool = "map" if "pool/probe" in first else "gap" if cfg.model.fc_norm or not has_cls else "cls"
    if has_cls and len(first.get("head/kernel", ())) == 2 * width:
        pool = "cls_gap"
    if stated == "gap" and has_cls and pool == "cls":
        pool = "gap"
    if stated not in (None, pool):
        raise UserError(f"the metadata says pool={stated}, but the arrays are those of pool={pool}")
    if fmt is TIMM and pool == "map":
        _check_timm_pool(first, metadata, keys)
    cfg.model.pool, cfg.model.class_token = pool, has_cls and pool in ("gap", "map")
    ambiguous = fmt.ambiguous_pool and pool == "cls" and stated is None
    return ["the head reads [CLS] (model.pool=cls)"] if ambiguous else []


def _check_timm_pool(first: Arrays, metadata: Metadata, keys: frozenset[str]) -> None:
    """Raise UserError if timm pools other tokens by attention than [CLS] and patches, as here.

    Its Eva pools registers too; its VisionTransformer neither them nor [CLS].
    """
    has_cls, registers = "cls" in first, "registers" in first
    if not has_cls and not registers:
        return
    eva = metadata.eva
    if eva is None and "norm_pre.weight" not in keys:  # which Eva's perception encoders have
        raise UserError(
            "timm's VisionTransformer and its Eva pool other tokens by attention: set "
            "--config.init.architecture"
        )
    if registers and eva is not False:
        raise UserError("timm's Eva pools registers by attention, which no model here does")
    if has_cls and eva is False:
        raise UserError("timm's VisionTransformer pools by attention without [CLS]: unsupported")


def _infer_positions(
    fmt: WeightFormat,
    first: Arrays,
    metadata: Metadata,
    hints: Hints,
    patch: int,
    keys: frozenset[str],
) -> PositionLayout:
    """Infer the patch grid and the leading rows. Raises UserError if they are ambiguous."""
    if POSITIONS not in first:
        known = metadata.image_size or hints.trained_size or hints.requested_size
        size = known or hints.target_size or (RESOLUTION, RESOLUTION)
        assumption = "" if known else f"trained at {size[0]} x {size[1]} px"
        return PositionLayout((size[0] // patch, size[1] // patch), 0, assumption)
    leading = _leading_rows(fmt, first, metadata, keys)
    sizes = KnownSizes(
        metadata.image_size, hints.trained_size, hints.requested_size, hints.target_size
    )
    return infer_position_layout(len(first[POSITIONS]), leading, sizes, patch)


def _leading_rows(
    fmt: WeightFormat, first: Arrays, metadata: Metadata, keys: frozenset[str]
) -> tuple[int, ...]:
    """The possible numbers of position rows before those of patches, the likeliest first."""
    tokens = ("cls" in first) + ("dist" in first)
    if not fmt.class_positions or metadata.no_embed_class:
        return (0,)
    if "registers" in first:
        rows = len(first[POSITIONS])
        counts = (tokens, 0, tokens + len(first["registers"]))
        squares = [count for count in counts if math.isqrt(rows - count) ** 2 == rows - count]
        return tuple(dict.fromkeys((*squares, *counts)))
    if tokens and fmt.no_class_positions and metadata.no_embed_class is None:
        # LayerScale: DINOv2 has the rows, DeiT III does not.
        without, either = (
            any(re.search(pattern, key) for key in keys) for pattern in fmt.no_class_positions
        )
        return (0, tokens) if without else (tokens, 0) if either else (tokens,)
    return (tokens,)


def _first_block(fmt: WeightFormat, arrays: Arrays) -> Arrays:
    """Our parameters of block 0 and outside the blocks, with all heads as a single one.

    Raises UserError if one that reveals the model's sizes is missing or has the wrong shape.
    """
    first = to_params(fmt, arrays, depth=1, heads=1)
    key_of = {name: mapping.key for mapping in fmt.expand(1) for name in mapping.params}
    ranks = {"embed/kernel": 4, "blocks/0/mlp/up/kernel": 2, "blocks/0/attention/query/kernel": 3}
    for name, rank in {POSITIONS: 2, **ranks}.items():
        if name not in first and name == POSITIONS:
            continue
        if name not in first:
            raise UserError(
                f"{key_of[name]} is missing: the file is damaged, or its format is not "
                f"{fmt.name}; it has {abbreviate(sorted(arrays))}"
            )
        if first[name].ndim != rank:
            raise UserError(f"{key_of[name]} has the wrong shape, {arrays[key_of[name]].shape}")
    return first


def _infer_heads(
    fmt: WeightFormat,
    first: Arrays,
    metadata: Metadata,
    hints: Hints,
    size: Size,
) -> tuple[int, list[str]]:
    """The number of heads, and what was assumed. Raises UserError if nothing determines it."""
    query = "blocks/0/attention/query/kernel"
    if any(mapping.params == (query,) and mapping.layout == "same" for mapping in fmt.expand(1)):
        return first[query].shape[1], []
    if heads := metadata.model.get("heads"):
        return heads, []
    if "blocks/0/attention/query_norm/scale" in first:
        return size.width // len(first["blocks/0/attention/query_norm/scale"]), []
    if hints.heads:
        return hints.heads, [f"{hints.heads} heads, as configured"]
    for letter, standard in SIZES.items():
        if size == dataclasses.replace(standard, heads=1):
            other = "MoCo v3 has 12: " if letter == "S" else "otherwise "
            hint = f"({other}set --config.model.heads)"
            return standard.heads, [f"{standard.heads} heads, as ViT-{letter} {hint}"]
    raise UserError(
        f"the number of heads is unknown: it is in neither the arrays nor a config.json, and width "
        f"{size.width}, depth {size.depth}, MLP {size.mlp} are no standard size; set "
        "--config.model.heads"
    )

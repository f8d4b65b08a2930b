"""Read timm's config.json: what an architecture's name and arguments say of its function.

A published model's config.json has the name of an architecture, and arguments only where they
differ from those that timm builds it with. `ARCHITECTURES` has what these arguments change of the
function, and arrays don't show; a test builds every such architecture with timm and compares.
"""

import pathlib
import re
from typing import Any

from vit_scale.errors import UserError
from vit_scale.pretrained import preprocessing
from vit_scale.pretrained.metadata import Metadata, gelu_field, labels, pixels_of

POOLS = {"token": "cls", "avg": "gap", "map": "map"}  # timm's global_pool -> model.pool
# Arguments of timm's VisionTransformer and Eva: read here; determined by the arrays; irrelevant
# outside training. Any other argument that is set changes the function of the same arrays.
READ = (
    *("num_heads", "act_layer", "global_pool", "img_size", "no_embed_class", "norm_layer"),
    *("final_norm", "attn_pool_num_heads", "use_rot_pos_emb", "rope_type", "rope_temperature"),
    *("rope_grid_offset", "rope_grid_indexing", "rope_rotate_half", "ref_feat_shape"),
    *("use_post_transformer_norm", "use_fc_norm"),
)
IN_ARRAYS = (
    *("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias"),
    *("init_values", "class_token", "fc_norm", "proj_bias", "pre_norm", "reg_tokens", "qk_norm"),
    *("embed_layer", "mlp_layer", "distilled", "pretrained", "in_features", "representation_size"),
    *("num_reg_tokens", "swiglu_mlp", "swiglu_align_to", "scale_mlp", "scale_attn_inner"),
    *("qkv_fused", "use_abs_pos_emb", "use_pre_transformer_norm", "attn_pool_mlp_ratio"),
    *("attn_type", "scale_attn_norm", "scale_mlp_norm"),
)
TRAINING = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad"),
    *("strict_img_size", "pretrained_cfg", "pretrained_cfg_overlay", "features_only", "checkpoint"),
    *("head_init_scale", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
)
# Architectures: prefixes of plain ViTs; those that compute something else from arrays of the same
# names, which nothing else would tell.
PLAIN_VIT = ("vit_", "deit", "flexivit_", "test_vit", "timm_vit", "eva02_", "eva_", "beit3_")
OTHER_FUNCTION = (
    (r"_dlittle|_dp?wee", "differential attention"),
    (r"_xp_|_pwee", "attention and MLP side by side"),
    (r"_\d+x2_", "two branches side by side"),
    (r"_sapiens2", "fewer heads of keys than of queries"),
    (r"_rpn|enormous", "norms behind attention and MLP"),
    (r"_s?relpos", "relative positions"),
    (r"^test_vit3", "attention pooling of [CLS] and registers"),
)
EVA_CLASS = r"^eva02_|^eva_giant|vit_pe_|_rope_|_dinov3|_lingbot"  # the others: VisionTransformer
EVA = {"rope": "axial", "rope_temperature": 10_000.0, "rope_reference": 16}
ROPE_VIT = {"rope": "axial", "rope_temperature": 100.0}
PE = {"rope": "axial", "rope_temperature": 10_000.0, "rope_offset": 1.0, "norm_epsilon": 1e-5}
NO_NORM = {"final_norm": False}
# (regular expression, fields of the model block): all rows that match, in this order.
ARCHITECTURES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"^vit_.*_clip_|^beit3_", {"norm_epsilon": 1e-5}),
    (r"quickgelu", {"gelu": "quick"}),
    (
        r"giantopt|so400m_patch16_siglip|base_patch32_siglip|large_patch16_siglip(_gap)?_512",
        {"gelu": "tanh"},
    ),
    (r"_radio_|_intern300m_", NO_NORM),
    (r"^eva02_|_rope_reg\d_gap", EVA),
    (r"_rope(_ape)?_224", ROPE_VIT),
    (r"_rope_mixed_", {"rope": "mixed", "rope_temperature": 10.0}),
    (
        r"_dinov3|_lingbot",
        {"rope": "dinov3", "rope_temperature": 100.0, "norm_epsilon": 1e-5},
    ),
    (r"vit_pe_", PE | {"rope_reference": 32}),
    (r"vit_pe_core_(tiny|small|large)", {"rope_reference": 24}),
    (r"vit_pe_core_base", {"rope_reference": 14}),
    (r"vit_pe_(spatial|lang)", NO_NORM),
    (r"vit_pe_\w+_gigantic", {"rope_offset": 0.0}),
    (r"vit_pe_core", {"pool_heads": 8}),
)
# (regular expression, order of a head's channels): the first that matches.
CHANNELS = (
    (r"^eva02_|_rope_reg\d_gap", "pairs"),
    (r"_rope_mixed_", "pairs"),  # frequencies are learned in their order
    (r"_rope_|vit_pe_", "pairs-xy"),
    (r"", "halves"),
)
# (regular expression, attention heads): the first that matches.
HEADS = (
    (r"base_patch16_gap_224|giantopt|gigantic|huge_patch|so400m|large|intern300m", 16),
    (r"giant_patch1[46]_(224|336|560|clip|gap)", 16),
    (r"giant", 24),
    (r"huge_plus", 20),
    (r"_7b_", 32),
    (r"base_patch\d+_plus|so150m_", 14),
    (r"so150m2", 13),
    (r"base", 12),
    (r"betwixt", 10),
    (r"medium", 8),
    (r"xsmall|_wee", 4),
    (r"small", 6),
    (r"little", 5),
    (r"tiny", 3),
)
# timm's norm_layer -> (model.norm, model.norm_epsilon)
NORMS = {
    "layernorm": ("layernorm", 1e-6),
    "layernormfp32": ("layernorm", 1e-6),
    "layernorm2d": ("layernorm", 1e-6),
    "rmsnorm": ("rmsnorm", 1e-6),
}


def check_architecture(file: pathlib.Path, name: str) -> None:
    """Raise UserError for an architecture of timm that isn't a plain ViT."""
    if not name.startswith(PLAIN_VIT):
        raise UserError(f"{file}: the architecture {name} of timm is not a plain ViT")
    for pattern, reason in OTHER_FUNCTION:
        if re.search(pattern, name):
            raise UserError(f"{file}: the architecture {name} of timm has {reason}: unsupported")


def architecture_metadata(file: pathlib.Path, name: str) -> Metadata:
    """Return what timm's name of an architecture says. Raises UserError if it isn't a plain ViT."""
    check_architecture(file, name)
    model: dict[str, Any] = {"gelu": "exact", "norm_epsilon": 1e-6, "rope": "none"}
    for pattern, fields in ARCHITECTURES:
        if re.search(pattern, name):
            model |= fields
    channels = next(order for pattern, order in CHANNELS if re.search(pattern, name))
    heads = next((count for pattern, count in HEADS if re.search(pattern, name)), None)
    if heads:
        model["heads"] = heads
    no_embed_class = True if name.startswith("deit3_") else None
    eva = bool(re.search(EVA_CLASS, name))
    return Metadata(model, {}, {}, (), None, no_embed_class, channels=channels, eva=eva)


def read_timm_config(file: pathlib.Path, content: dict) -> Metadata:
    """Read the config.json beside `file`, as timm writes it. Raises UserError."""
    # Before timm 0.9, config.json was one flat dictionary.
    arguments, trained = content.get("model_args", {}), content.get("pretrained_cfg", content)
    named = architecture_metadata(file, content["architecture"])
    for name, value in arguments.items():
        if value and name not in (*READ, *IN_ARRAYS, *TRAINING):
            raise UserError(f"{file}: config.json has {name}={value}, not a plain ViT")
    pixels, view = preprocessing.from_timm(file, trained)
    candidates = (c.get(key) for key in ("label_names", "labels") for c in (content, trained))
    model = named.model | _arguments(file, arguments, content.get("global_pool"))
    model |= _rope_arguments(file, arguments, named.model)
    return named._replace(
        model=model,
        augment=pixels,
        eval=view,
        classes=labels(file, next(filter(None, candidates), ())),
        image_size=pixels_of(arguments.get("img_size"))
        or pixels_of(trained.get("input_size", (None,))[1:]),
        no_embed_class=arguments.get("no_embed_class", named.no_embed_class),
        dimensions={"width": arguments.get("embed_dim"), "depth": arguments.get("depth")},
        channels=_channels(arguments, named.channels),
        library_defaults=(preprocessing.TIMM_PIXELS, preprocessing.TIMM_VIEW),
    )


def _arguments(file: pathlib.Path, arguments: dict, global_pool: str | None) -> dict[str, Any]:
    """Fields of the model block that the arguments in config.json state."""
    model: dict[str, Any] = {}
    if "num_heads" in arguments:
        model["heads"] = int(arguments["num_heads"])
    if "attn_pool_num_heads" in arguments:
        model["pool_heads"] = int(arguments["attn_pool_num_heads"])
    if arguments.get("act_layer"):
        model |= gelu_field(file, arguments["act_layer"])
    if norm := arguments.get("norm_layer"):
        if norm not in NORMS:
            raise UserError(f"{file}: config.json has norm_layer={norm}, which is not supported")
        model["norm"], model["norm_epsilon"] = NORMS[norm]
    if arguments.get("proj_bias") is False:
        model["proj_bias"] = False
    if "final_norm" in arguments:
        model["final_norm"] = bool(arguments["final_norm"])
    if arguments.get("use_post_transformer_norm") is False and not arguments.get("use_fc_norm"):
        model["final_norm"] = False
    if pool := arguments.get("global_pool", global_pool):
        if pool not in POOLS:
            raise UserError(
                f"{file}: config.json has global_pool={pool}, which is not supported; "
                f"supported: {', '.join(POOLS)}"
            )
        model["pool"] = POOLS[pool]
    return model


def _rope_arguments(file: pathlib.Path, arguments: dict, named: dict[str, Any]) -> dict[str, Any]:
    """Fields of the model block for the rotary positions of timm's Eva.

    `named` are those of the architecture, of which only what an argument states is changed.
    """
    if "use_rot_pos_emb" in arguments and not arguments["use_rot_pos_emb"]:
        return {"rope": "none"}
    model: dict[str, Any] = {}
    if arguments.get("use_rot_pos_emb") and named["rope"] == "none":
        model = {"rope": "axial", "rope_temperature": 10_000.0}  # Eva's defaults
    kinds = {"cat": "axial", "dinov3": "dinov3", "mixed": "mixed"}
    if kind := arguments.get("rope_type"):
        if kind not in kinds:
            raise UserError(f"{file}: config.json has rope_type={kind}, which is not supported")
        if model or named["rope"] != "none":
            model["rope"] = kinds[kind]
    if "rope_temperature" in arguments:
        model["rope_temperature"] = float(arguments["rope_temperature"])
    if "rope_grid_offset" in arguments:
        model["rope_offset"] = float(arguments["rope_grid_offset"])
    if "ref_feat_shape" in arguments:
        height, width = pixels_of(arguments["ref_feat_shape"]) or (0, 0)
        if height != width:
            raise UserError(
                f"{file}: config.json has ref_feat_shape={height} x {width}: not a square"
            )
        model["rope_reference"] = height
    return model


def _channels(arguments: dict, named: str) -> str:
    """The order of a head's channels: the architecture's, but for what an argument states."""
    half = arguments.get("rope_rotate_half", named == "halves")
    order = arguments.get("rope_grid_indexing", "xy" if named == "pairs-xy" else "ij")
    if half:
        return "halves"
    if arguments.get("rope_type") == "mixed":  # frequencies are learned in their order
        return "pairs"
    return "pairs-xy" if order == "xy" else "pairs"

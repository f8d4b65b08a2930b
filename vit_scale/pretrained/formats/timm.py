"""timm's VisionTransformer and Eva, DeiT's and Meta's DINO, DINOv2, DINOv3 and MAE: the same keys.

PyTorch layouts, with fused queries, keys and values. [CLS] has a position embedding, the first row,
except in models with no_embed_class, such as DeiT III. Other spellings of the same contents become
this one: separate queries, keys and values (EVA-02), a packed SwiGLU (DINOv2's g), frequencies of
all blocks in one array (RoPE-ViT), and biases of keys that are always zero (EVA, DINOv3). Hybrids
are those with BiT's ResNets.
"""

import numpy as np

from vit_scale.errors import UserError
from vit_scale.pretrained.formats import bit_stem
from vit_scale.pretrained.formats.steps import split_gated
from vit_scale.pretrained.key_mapping import (
    Arrays,
    Convention,
    KeyMapping,
    WeightFormat,
    dense,
    norm,
)

BLOCK, ATTENTION, MLP = "blocks/{i}/", "blocks/{i}/attention/", "blocks/{i}/mlp/"
QKV = (ATTENTION + "query", ATTENTION + "key", ATTENTION + "value")
STEM = bit_stem.layers(
    {"conv": "patch_embed.backbone.stem.conv", "norm": "patch_embed.backbone.stem.norm"},
    lambda stage, block: f"patch_embed.backbone.stages.{stage}.blocks.{block}.",
    {
        **{f"{layer}{i}": f"{layer}{i}" for layer in ("conv", "norm") for i in (1, 2, 3)},
        "shortcut_conv": "downsample.conv",
        "shortcut_norm": "downsample.norm",
    },
)
MAPPINGS = (
    *(
        KeyMapping(f"{param}/kernel", f"{key}.weight", "patches")
        for param, key in STEM
        if "conv" in param
    ),
    *(mapping for param, key in STEM if "norm" in param for mapping in norm(param, key)),
    *dense("embed", "patch_embed.proj", "patches"),
    KeyMapping("cls", "cls_token", "token"),
    KeyMapping("dist", "dist_token", "token"),
    KeyMapping("registers", "reg_token", "first"),
    KeyMapping("posemb", "pos_embed", "first"),
    *norm("pre_norm", "norm_pre"),
    *norm(BLOCK + "norm1", "blocks.{i}.norm1"),
    *dense(QKV, "blocks.{i}.attn.qkv", "to_heads"),
    *norm(ATTENTION + "query_norm", "blocks.{i}.attn.q_norm"),
    *norm(ATTENTION + "key_norm", "blocks.{i}.attn.k_norm"),
    *norm(ATTENTION + "norm", "blocks.{i}.attn.norm"),
    KeyMapping(ATTENTION + "frequencies", "blocks.{i}.rope.freqs"),
    *dense(ATTENTION + "out", "blocks.{i}.attn.proj", "from_heads"),
    KeyMapping(BLOCK + "scale1", "blocks.{i}.ls1.gamma"),
    *norm(BLOCK + "norm2", "blocks.{i}.norm2"),
    *dense(MLP + "gate", "blocks.{i}.mlp.fc1_g"),
    *dense(MLP + "up", "blocks.{i}.mlp.fc1"),
    *norm(MLP + "norm", "blocks.{i}.mlp.norm"),
    *dense(MLP + "down", "blocks.{i}.mlp.fc2"),
    KeyMapping(BLOCK + "scale2", "blocks.{i}.ls2.gamma"),
    *norm("norm", "norm"),
    KeyMapping("pool/probe", "attn_pool.latent", "first"),
    *dense("pool/query", "attn_pool.q", "to_heads"),
    *dense(("pool/key", "pool/value"), "attn_pool.kv", "to_heads"),
    *dense("pool/out", "attn_pool.proj", "from_heads"),
    *norm("pool/norm", "attn_pool.norm"),
    *dense("pool/mlp/up", "attn_pool.mlp.fc1"),
    *dense("pool/mlp/down", "attn_pool.mlp.fc2"),
    *dense("representation", "pre_logits.fc"),  # timm before 0.7
    *dense("head", "head"),
    *dense("head_dist", "head_dist"),
)


def fuse_attention(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
    """Fuse separate queries, keys and values; biases of keys that are missing are zero."""
    arrays, completed = dict(arrays), False
    for i in range(depth):
        block = f"blocks.{i}.attn."
        parts = [f"{block}{part}_proj.weight" for part in "qkv"]
        if all(key in arrays for key in parts):
            arrays[block + "qkv.weight"] = np.concatenate([arrays.pop(key) for key in parts])
        for query, key, value in (
            [f"{block}{part}_proj.bias" for part in "qkv"],
            [f"{block}{part}_bias" for part in "qkv"],
        ):
            if query in arrays and value in arrays:
                completed |= key not in arrays
                zeros = np.zeros_like(arrays[query])
                biases = (arrays.pop(query), arrays.pop(key, zeros), arrays.pop(value))
                arrays[block + "qkv.bias"] = np.concatenate(biases)
        mask = arrays.pop(block + "qkv.bias_mask", None)  # DINOv3: zero for keys
        if mask is not None and block + "qkv.bias" in arrays:
            bias = arrays[block + "qkv.bias"]
            arrays[block + "qkv.bias"] = np.where(mask == 0, 0, bias)
    return arrays, ["the biases of keys are zero"] if completed else []


def split_frequencies(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
    """Split RoPE-ViT's frequencies (2 l k e/2), of columns and rows, by block."""
    arrays = dict(arrays)
    stacked = arrays.pop("rope.freqs", None)
    if stacked is not None:
        if stacked.ndim != 4 or stacked.shape[1] != depth:
            raise UserError(
                f"rope.freqs has the wrong shape, {stacked.shape}: (2, {depth} blocks, heads, "
                "frequencies) was expected"
            )
        arrays |= {f"blocks.{i}.rope.freqs": stacked[:, i] for i in range(depth)}
    return arrays, []


def check_periods(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
    """Check that DINOv3's rotary periods are those of its temperature, 100, which are computed."""
    arrays = dict(arrays)
    periods = arrays.pop("rope_embed.periods", None)
    if periods is not None:
        expected = 100.0 ** (np.arange(len(periods)) / len(periods))
        if not np.allclose(periods, expected, rtol=1e-2):  # some files have them in bfloat16
            raise UserError(
                f"rope_embed.periods are {periods[0]:g} to {periods[-1]:g}, not those of DINOv3's "
                f"temperature of 100 ({expected[0]:g} to {expected[-1]:g}): unsupported"
            )
    return arrays, []


TIMM = WeightFormat(
    name="timm",
    title="timm, DeiT or Meta",
    signature=r"patch_embed\.proj\.weight",
    mappings=MAPPINGS,
    model={"gelu": "exact", "norm_epsilon": 1e-6},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    eval={"fit": "shorter", "crop": 0.9, "resample": "bicubic"},
    no_class_positions=(r"\.gamma_1\b", r"\.ls1\.gamma\b"),
    # Of MAE, DINO and MoCo. A head of several layers is a projection head, not a classifier.
    unused=r"mask_token$|masked_embed$|decoder_|head\.\d|predictor\.|(dino|ibot)_head\.|lm_head\."
    r"|local_cls_norm\.|projectors\.|(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)$",
    fc_norm=("fc_norm", "norm"),
    ambiguous_pool=True,
    aliases=(
        (r"^(patch_embed\.backbone)\.(conv|norm)\.", r"\1.stem.\2."),  # the root block alone
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III's repository, EVA
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2: blocks in chunks
        (r"^(register|storage)_tokens$", "reg_token"),  # DINOv2, DINOv3
        (r"\.mlp\.w12\.", ".mlp.fc1."),  # DINOv2's SwiGLU
        (r"\.mlp\.(w1|fc1_g)\.", ".mlp.fc1_g."),  # DINOv3's, EVA-02's
        (r"\.mlp\.(w2|fc1_x)\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),  # EVA-02's repository
        (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    ),
    conventions=(
        Convention(
            r"rope_embed\.periods",
            {"norm_epsilon": 1e-5, "rope": "dinov3", "rope_temperature": 100.0},
        ),
        Convention(r"rope\.freqs", {"rope": "mixed", "rope_temperature": 10.0}, "pairs"),
        Convention(r"norm_pre\.weight", {"norm_epsilon": 1e-5}),  # CLIP
        Convention(r"patch_embed\.backbone\..*", {"stem_epsilon": "timm"}),
    ),
    # EVA-02; the Perception Encoder. A CLIP has no attention pooling.
    needs_architecture=(
        (r"blocks\.0\.attn\.q_(bias|proj\.weight)",),
        (r"attn_pool\.", r"norm_pre\."),
    ),
    steps=(
        fuse_attention,
        split_gated("blocks.{i}.mlp.", up="fc1", gate="fc1_g", down="fc2"),
        split_frequencies,
        check_periods,
    ),
)

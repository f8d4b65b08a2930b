"""CLIP's vision tower, as Hugging Face and as OpenAI's and open_clip's code store it.

A norm comes before the blocks, the patch embedding has no bias, and [CLS] is projected to the space
that images and texts share: that projection, which has no bias, is the head. Hugging Face's
classifier reads the mean of the patches instead.
"""

from vit_scale.pretrained.key_mapping import (
    Convention,
    KeyMapping,
    WeightFormat,
    attention,
    dense,
    norm,
)

BLOCK = "encoder.layers.{i}."
SELF = BLOCK + "self_attn."
MODEL = {"gelu": "quick", "norm_epsilon": 1e-5}
PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
VIEW = {"fit": "shortest_edge", "crop": 1.0, "resample": "bicubic"}

CLIP = WeightFormat(
    name="huggingface-clip",
    title="Hugging Face transformers (CLIP)",
    signature=r"(vision_model\.)?embeddings\.class_embedding",
    mappings=(
        *dense("embed", "embeddings.patch_embedding", "patches"),
        KeyMapping("cls", "embeddings.class_embedding"),
        KeyMapping("posemb", "embeddings.position_embedding.weight"),
        *norm("pre_norm", "pre_layrnorm"),  # transformers spells it so
        *norm("blocks/{i}/norm1", BLOCK + "layer_norm1"),
        *attention(SELF, "q_proj", "k_proj", "v_proj"),
        *dense("blocks/{i}/attention/out", SELF + "out_proj", "from_heads"),
        *norm("blocks/{i}/norm2", BLOCK + "layer_norm2"),
        *dense("blocks/{i}/mlp/up", BLOCK + "mlp.fc1"),
        *dense("blocks/{i}/mlp/down", BLOCK + "mlp.fc2"),
        *norm("norm", "post_layernorm"),
        *dense("head", "visual_projection"),
    ),
    model=MODEL,
    augment=PIXELS,
    eval=VIEW,
    unused=r"text_model\.|text_projection|logit_scale$|(.*\.)?embeddings\.position_ids$",
    aliases=((r"^vision_model\.", ""),),
    projection=True,
)

RESBLOCK = "transformer.resblocks.{i}."
QKV = tuple(f"blocks/{{i}}/attention/{part}" for part in ("query", "key", "value"))
OPEN_CLIP = WeightFormat(
    name="open_clip",
    title="OpenAI's CLIP and open_clip",
    signature=r"class_embedding",
    mappings=(
        *dense("embed", "conv1", "patches"),
        KeyMapping("cls", "class_embedding"),
        KeyMapping("posemb", "positional_embedding"),
        *norm("pre_norm", "ln_pre"),
        *norm("blocks/{i}/norm1", RESBLOCK + "ln_1"),
        *dense(QKV, RESBLOCK + "attn.in_proj", "to_heads"),
        *dense("blocks/{i}/attention/out", RESBLOCK + "attn.out_proj", "from_heads"),
        KeyMapping("blocks/{i}/scale1", RESBLOCK + "ls_1.gamma"),
        *norm("blocks/{i}/norm2", RESBLOCK + "ln_2"),
        *dense("blocks/{i}/mlp/up", RESBLOCK + "mlp.c_fc"),
        *dense("blocks/{i}/mlp/down", RESBLOCK + "mlp.c_proj"),
        KeyMapping("blocks/{i}/scale2", RESBLOCK + "ls_2.gamma"),
        *norm("norm", "ln_post"),
        KeyMapping("head/kernel", "proj"),
        KeyMapping("head/bias", "proj_bias"),  # no file has it
    ),
    model=MODEL | {"gelu": "exact"},
    augment=PIXELS,
    eval=VIEW | {"fit": "shorter"},
    conventions=(Convention("input_resolution", {"gelu": "quick"}),),  # OpenAI's own files
    aliases=((r"\.in_proj_(weight|bias)$", r".in_proj.\1"),),
    projection=True,
)

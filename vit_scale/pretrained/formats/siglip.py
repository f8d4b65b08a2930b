"""Hugging Face's SigLIP and SigLIP 2 vision towers: attention pooling, and no [CLS].

The pooled vector is the image's embedding: there is no projection. SigLIP 2's model for images of
any shape (NaFlex) stores its patch embedding as a matrix; here it reads one size of images.
"""

from vit_scale.pretrained.formats.steps import unflatten_patches
from vit_scale.pretrained.key_mapping import (
    Arrays,
    KeyMapping,
    WeightFormat,
    attention,
    dense,
    norm,
)

BLOCK, POOL = "encoder.layers.{i}.", "head."
SELF = BLOCK + "self_attn."
POOL_QKV = ("pool/query", "pool/key", "pool/value")
MAPPINGS = (
    *dense("embed", "embeddings.patch_embedding", "patches"),
    KeyMapping("posemb", "embeddings.position_embedding.weight"),
    *norm("blocks/{i}/norm1", BLOCK + "layer_norm1"),
    *attention(SELF, "q_proj", "k_proj", "v_proj"),
    *dense("blocks/{i}/attention/out", SELF + "out_proj", "from_heads"),
    *norm("blocks/{i}/norm2", BLOCK + "layer_norm2"),
    *dense("blocks/{i}/mlp/up", BLOCK + "mlp.fc1"),
    *dense("blocks/{i}/mlp/down", BLOCK + "mlp.fc2"),
    *norm("norm", "post_layernorm"),
    KeyMapping("pool/probe", POOL + "probe", "first"),
    *dense(POOL_QKV, POOL + "attention.in_proj", "to_heads"),
    *dense("pool/out", POOL + "attention.out_proj", "from_heads"),
    *norm("pool/norm", POOL + "layernorm"),
    *dense("pool/mlp/up", POOL + "mlp.fc1"),
    *dense("pool/mlp/down", POOL + "mlp.fc2"),
)


def unflatten_embedding(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
    """Reshape a patch embedding d (p p c), of SigLIP 2 for any shape, to d c p p."""
    key = "embeddings.patch_embedding.weight"
    kernel = arrays.get(key)
    if kernel is None or kernel.ndim != 2:
        return arrays, []
    return arrays | {key: unflatten_patches(kernel.T).transpose(3, 2, 0, 1)}, []


SIGLIP = WeightFormat(
    name="huggingface-siglip",
    title="Hugging Face transformers (SigLIP)",
    signature=r"(vision_model\.)?head\.attention\.in_proj_weight",
    mappings=MAPPINGS,
    model={"gelu": "tanh", "norm_epsilon": 1e-6},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    eval={"fit": "stretch", "crop": 1.0, "resample": "bicubic"},
    class_positions=False,
    unused=r"text_model\.|logit_(scale|bias)$|(.*\.)?embeddings\.position_ids$",
    aliases=(
        (r"^vision_model\.", ""),
        (r"\.in_proj_(weight|bias)$", r".in_proj.\1"),
    ),
    steps=(unflatten_embedding,),
)

"""Hugging Face's ViTForImageClassification and ViTModel: PyTorch layouts, separate q, k and v.

Keys are those of saved files, which are the same for every version of transformers; version 5 uses
others in memory, which `aliases` maps. [CLS] has a position embedding, the first row. ViTModel's
pooler is a tanh layer, as our `representation`; it has no head.
"""

from vit_scale.pretrained.key_mapping import KeyMapping, WeightFormat, attention, dense, norm

BLOCK = "vit.encoder.layer.{i}."
SELF = BLOCK + "attention.attention."
MAPPINGS = (
    *dense("embed", "vit.embeddings.patch_embeddings.projection", "patches"),
    KeyMapping("cls", "vit.embeddings.cls_token", "token"),
    KeyMapping("dist", "vit.embeddings.distillation_token", "token"),
    KeyMapping("posemb", "vit.embeddings.position_embeddings", "first"),
    *norm("blocks/{i}/norm1", BLOCK + "layernorm_before"),
    *attention(SELF, "query", "key", "value"),
    *dense("blocks/{i}/attention/out", BLOCK + "attention.output.dense", "from_heads"),
    *norm("blocks/{i}/norm2", BLOCK + "layernorm_after"),
    *dense("blocks/{i}/mlp/up", BLOCK + "intermediate.dense"),
    *dense("blocks/{i}/mlp/down", BLOCK + "output.dense"),
    *norm("norm", "vit.layernorm"),
    *dense("representation", "vit.pooler.dense"),
    *dense("head", "classifier"),
    *dense("head_dist", "distillation_classifier"),
)

HUGGINGFACE = WeightFormat(
    name="huggingface",
    title="Hugging Face transformers",
    signature=r"((vit|deit)\.)?embeddings\.patch_embeddings\.projection\.weight",
    mappings=MAPPINGS,
    model={"gelu": "exact", "norm_epsilon": 1e-12},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    eval={"fit": "stretch", "crop": 1.0, "resample": "bilinear"},
    unused=r"((vit|deit)\.)?embeddings\.mask_token|decoder\.",
    aliases=(
        (r"^deit\.", "vit."),
        (r"^cls_classifier\.", "classifier."),
        (r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit."),  # ViTModel
        (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),  # transformers 5, in memory
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)

"""Hugging Face's ViTForImageClassification and ViTModel: PyTorch layouts, separate q, k and v.

Keys are those of saved files, which are the same for every version of transformers; version 5 uses
others in memory, which `aliases` maps. [CLS] has a position embedding, the first row. ViTModel's
pooler is a tanh layer, as our `representation`; it has no head.
"""

from vit_scale.pretrained.key_mapping import KeyMapping, WeightFormat

BLOCK = "vit.encoder.layer.{i}."
SELF, OUT = BLOCK + "attention.attention.", BLOCK + "attention.output.dense."
MAPPINGS = (
    KeyMapping("embed/kernel", "vit.embeddings.patch_embeddings.projection.weight", "patches"),
    KeyMapping("embed/bias", "vit.embeddings.patch_embeddings.projection.bias"),
    KeyMapping("cls", "vit.embeddings.cls_token", "token"),
    KeyMapping("dist", "vit.embeddings.distillation_token", "token"),
    KeyMapping("posemb", "vit.embeddings.position_embeddings", "first"),
    KeyMapping("blocks/{i}/norm1/scale", BLOCK + "layernorm_before.weight"),
    KeyMapping("blocks/{i}/norm1/bias", BLOCK + "layernorm_before.bias"),
    KeyMapping("blocks/{i}/attention/query/kernel", SELF + "query.weight", "to_heads"),
    KeyMapping("blocks/{i}/attention/query/bias", SELF + "query.bias", "heads"),
    KeyMapping("blocks/{i}/attention/key/kernel", SELF + "key.weight", "to_heads"),
    KeyMapping("blocks/{i}/attention/key/bias", SELF + "key.bias", "heads"),
    KeyMapping("blocks/{i}/attention/value/kernel", SELF + "value.weight", "to_heads"),
    KeyMapping("blocks/{i}/attention/value/bias", SELF + "value.bias", "heads"),
    KeyMapping(
        "blocks/{i}/attention/out/kernel", BLOCK + "attention.output.dense.weight", "from_heads"
    ),
    KeyMapping("blocks/{i}/attention/out/bias", BLOCK + "attention.output.dense.bias"),
    KeyMapping("blocks/{i}/norm2/scale", BLOCK + "layernorm_after.weight"),
    KeyMapping("blocks/{i}/norm2/bias", BLOCK + "layernorm_after.bias"),
    KeyMapping("blocks/{i}/mlp/up/kernel", BLOCK + "intermediate.dense.weight", "linear"),
    KeyMapping("blocks/{i}/mlp/up/bias", BLOCK + "intermediate.dense.bias"),
    KeyMapping("blocks/{i}/mlp/down/kernel", BLOCK + "output.dense.weight", "linear"),
    KeyMapping("blocks/{i}/mlp/down/bias", BLOCK + "output.dense.bias"),
    KeyMapping("norm/scale", "vit.layernorm.weight"),
    KeyMapping("norm/bias", "vit.layernorm.bias"),
    KeyMapping("representation/kernel", "vit.pooler.dense.weight", "linear"),
    KeyMapping("representation/bias", "vit.pooler.dense.bias"),
    KeyMapping("head/kernel", "classifier.weight", "linear"),
    KeyMapping("head/bias", "classifier.bias"),
    KeyMapping("head_dist/kernel", "distillation_classifier.weight", "linear"),
    KeyMapping("head_dist/bias", "distillation_classifier.bias"),
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

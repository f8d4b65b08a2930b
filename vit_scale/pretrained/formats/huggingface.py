"""Hugging Face's ViTForImageClassification and ViTModel: PyTorch's layouts, q, k and v apart.

The names are those of the files, which transformers keeps through its versions; version 5 has
others in memory. [CLS] has a position of its own, the first. ViTModel's pooler is a tanh layer
before a head that it doesn't have.
"""

from vit_scale.pretrained.key_mapping import Rule, WeightFormat

BLOCK = "vit.encoder.layer.{i}."
SELF = BLOCK + "attention.attention."
RULES = (
    Rule("embed/kernel", "vit.embeddings.patch_embeddings.projection.weight", "patches"),
    Rule("embed/bias", "vit.embeddings.patch_embeddings.projection.bias"),
    Rule("cls", "vit.embeddings.cls_token", "token"),
    Rule("dist", "vit.embeddings.distillation_token", "token"),
    Rule("posemb", "vit.embeddings.position_embeddings", "first"),
    Rule("blocks/{i}/norm1/scale", BLOCK + "layernorm_before.weight"),
    Rule("blocks/{i}/norm1/bias", BLOCK + "layernorm_before.bias"),
    Rule("blocks/{i}/attention/query/kernel", SELF + "query.weight", "to_heads"),
    Rule("blocks/{i}/attention/query/bias", SELF + "query.bias", "heads"),
    Rule("blocks/{i}/attention/key/kernel", SELF + "key.weight", "to_heads"),
    Rule("blocks/{i}/attention/key/bias", SELF + "key.bias", "heads"),
    Rule("blocks/{i}/attention/value/kernel", SELF + "value.weight", "to_heads"),
    Rule("blocks/{i}/attention/value/bias", SELF + "value.bias", "heads"),
    Rule("blocks/{i}/attention/out/kernel", BLOCK + "attention.output.dense.weight", "from_heads"),
    Rule("blocks/{i}/attention/out/bias", BLOCK + "attention.output.dense.bias"),
    Rule("blocks/{i}/norm2/scale", BLOCK + "layernorm_after.weight"),
    Rule("blocks/{i}/norm2/bias", BLOCK + "layernorm_after.bias"),
    Rule("blocks/{i}/mlp/up/kernel", BLOCK + "intermediate.dense.weight", "linear"),
    Rule("blocks/{i}/mlp/up/bias", BLOCK + "intermediate.dense.bias"),
    Rule("blocks/{i}/mlp/down/kernel", BLOCK + "output.dense.weight", "linear"),
    Rule("blocks/{i}/mlp/down/bias", BLOCK + "output.dense.bias"),
    Rule("norm/scale", "vit.layernorm.weight"),
    Rule("norm/bias", "vit.layernorm.bias"),
    Rule("representation/kernel", "vit.pooler.dense.weight", "linear"),
    Rule("representation/bias", "vit.pooler.dense.bias"),
    Rule("head/kernel", "classifier.weight", "linear"),
    Rule("head/bias", "classifier.bias"),
    Rule("head_dist/kernel", "distillation_classifier.weight", "linear"),
    Rule("head_dist/bias", "distillation_classifier.bias"),
)

HUGGINGFACE = WeightFormat(
    name="huggingface",
    text="Hugging Face transformers",
    mark=r"((vit|deit)\.)?embeddings\.patch_embeddings\.projection\.weight",
    rules=RULES,
    model={"gelu": "exact", "norm_epsilon": 1e-12},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    view={"fit": "stretch", "crop": 1.0, "resample": "bilinear"},
    unused=r"((vit|deit)\.)?embeddings\.mask_token|decoder\.",
    aliases=(
        (r"^deit\.", "vit."),
        (r"^cls_classifier\.", "classifier."),
        (r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit."),  # ViTModel
        (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),  # version 5, in memory
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)

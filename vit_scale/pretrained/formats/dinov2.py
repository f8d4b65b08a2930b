"""Hugging Face's Dinov2 and Dinov2WithRegisters: LayerScale, and SwiGLU in the size g.

[CLS] has a position embedding, the first row; registers have none. The classifier reads [CLS]
beside the mean of the patches.
"""

from vit_scale.pretrained.formats.steps import split_gated
from vit_scale.pretrained.key_mapping import KeyMapping, WeightFormat, attention, dense, norm

BLOCK = "encoder.layer.{i}."
SELF = BLOCK + "attention.attention."
MAPPINGS = (
    *dense("embed", "embeddings.patch_embeddings.projection", "patches"),
    KeyMapping("cls", "embeddings.cls_token", "token"),
    KeyMapping("registers", "embeddings.register_tokens", "first"),
    KeyMapping("posemb", "embeddings.position_embeddings", "first"),
    *norm("blocks/{i}/norm1", BLOCK + "norm1"),
    *attention(SELF, "query", "key", "value"),
    *dense("blocks/{i}/attention/out", BLOCK + "attention.output.dense", "from_heads"),
    KeyMapping("blocks/{i}/scale1", BLOCK + "layer_scale1.lambda1"),
    *norm("blocks/{i}/norm2", BLOCK + "norm2"),
    *dense("blocks/{i}/mlp/gate", BLOCK + "mlp.gate"),
    *dense("blocks/{i}/mlp/up", BLOCK + "mlp.fc1"),
    *dense("blocks/{i}/mlp/down", BLOCK + "mlp.fc2"),
    KeyMapping("blocks/{i}/scale2", BLOCK + "layer_scale2.lambda1"),
    *norm("norm", "layernorm"),
    *dense("head", "classifier"),
)

DINOV2 = WeightFormat(
    name="huggingface-dinov2",
    title="Hugging Face transformers (Dinov2)",
    signature=r"(dinov2(_with_registers)?\.)?encoder\.layer\.0\.layer_scale1\.lambda1",
    mappings=MAPPINGS,
    model={"gelu": "exact", "norm_epsilon": 1e-6},
    augment={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    eval={"fit": "shortest_edge", "crop": 0.875, "resample": "bicubic"},
    unused=r"(dinov2(_with_registers)?\.)?embeddings\.mask_token",
    aliases=(
        (r"^dinov2(_with_registers)?\.", ""),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    ),
    steps=(split_gated(BLOCK + "mlp.", up="fc1", gate="gate", down="fc2"),),
)

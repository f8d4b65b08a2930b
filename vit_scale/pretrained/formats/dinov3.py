"""Hugging Face's DINOv3ViT: registers, LayerScale, rotary positions and no others.

Keys have no bias in Meta's models, so theirs are zero here. There is no classifier.
"""

from vit_scale.pretrained.formats.steps import zero_key_bias
from vit_scale.pretrained.key_mapping import (
    Convention,
    KeyMapping,
    WeightFormat,
    attention,
    dense,
    norm,
)

BLOCK = "layer.{i}."
SELF = BLOCK + "attention."
MAPPINGS = (
    *dense("embed", "embeddings.patch_embeddings", "patches"),
    KeyMapping("cls", "embeddings.cls_token", "token"),
    KeyMapping("registers", "embeddings.register_tokens", "first"),
    *norm("blocks/{i}/norm1", BLOCK + "norm1"),
    *attention(SELF, "q_proj", "k_proj", "v_proj"),
    *dense("blocks/{i}/attention/out", SELF + "o_proj", "from_heads"),
    KeyMapping("blocks/{i}/scale1", BLOCK + "layer_scale1.lambda1"),
    *norm("blocks/{i}/norm2", BLOCK + "norm2"),
    *dense("blocks/{i}/mlp/gate", BLOCK + "mlp.gate_proj"),
    *dense("blocks/{i}/mlp/up", BLOCK + "mlp.up_proj"),
    *dense("blocks/{i}/mlp/down", BLOCK + "mlp.down_proj"),
    KeyMapping("blocks/{i}/scale2", BLOCK + "layer_scale2.lambda1"),
    *norm("norm", "norm"),
)

DINOV3 = WeightFormat(
    name="huggingface-dinov3",
    title="Hugging Face transformers (DINOv3)",
    signature=r"(model\.)?layer\.0\.layer_scale1\.lambda1",
    mappings=MAPPINGS,
    model={"gelu": "exact", "norm_epsilon": 1e-5},
    augment={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    eval={"fit": "stretch", "crop": 1.0, "resample": "bilinear"},
    class_positions=False,
    unused=r"(model\.)?embeddings\.mask_token|rope_embeddings\.",
    aliases=((r"^model\.", ""),),
    conventions=(Convention("", {"rope": "dinov3", "rope_temperature": 100.0}),),
    steps=(zero_key_bias(SELF + "q_proj.bias", SELF + "k_proj.bias"),),
)

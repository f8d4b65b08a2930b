"""google-research/vision_transformer: checkpoints of ViT (2020) and AugReg (2021), as `B_16.npz`.

Layouts are Flax's, as ours. [CLS] has a position embedding, the first row. Files name the layers of
a block as Flax did before 2021, with one counter (LayerNorm_0, MultiHeadDotProductAttention_1,
LayerNorm_2, MlpBlock_3); later Flax counts each type from 0, which `aliases` undoes. Hybrids have a
BiT ResNet beside them, whose norms are vectors or (1 1 1 c).
"""

from vit_scale.pretrained.formats import bit_stem
from vit_scale.pretrained.formats.flax_layers import attention, leaves, mlp, norm
from vit_scale.pretrained.formats.steps import flatten
from vit_scale.pretrained.key_mapping import KeyMapping, WeightFormat

STEM = bit_stem.layers(
    {"conv": "conv_root", "norm": "gn_root"},
    lambda stage, block: f"block{stage + 1}/unit{block + 1}/",
    {
        **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
        **{f"norm{i}": f"gn{i}" for i in (1, 2, 3)},
        "shortcut_conv": "conv_proj",
        "shortcut_norm": "gn_proj",
    },
)

BLOCK = "Transformer/encoderblock_{i}/"
MAPPINGS = (
    *(
        row
        for param, key in STEM
        for row in (leaves(param, key, ["kernel"]) if "conv" in param else norm(param, key))
    ),
    *leaves("embed", "embedding"),
    KeyMapping("cls", "cls", "token"),
    KeyMapping("posemb", "Transformer/posembed_input/pos_embedding", "first"),
    *norm("blocks/{i}/norm1", BLOCK + "LayerNorm_0"),
    *attention("blocks/{i}/attention", BLOCK + "MultiHeadDotProductAttention_1"),
    *norm("blocks/{i}/norm2", BLOCK + "LayerNorm_2"),
    *mlp("blocks/{i}/mlp", BLOCK + "MlpBlock_3"),
    *norm("norm", "Transformer/encoder_norm"),
    *leaves("representation", "pre_logits"),
    *leaves("head", "head"),
)

GOOGLE = WeightFormat(
    name="google",
    title="google-research/vision_transformer",
    signature=r"Transformer/posembed_input/pos_embedding",
    mappings=MAPPINGS,
    model={"gelu": "tanh", "norm_epsilon": 1e-6, "stem_epsilon": "google"},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    eval={"fit": "stretch", "crop": 1.0, "resample": "bilinear"},
    aliases=(
        (r"(encoderblock_\d+/)LayerNorm_1/", r"\1LayerNorm_2/"),
        (
            r"(encoderblock_\d+/)MultiHeadDotProductAttention_0/",
            r"\1MultiHeadDotProductAttention_1/",
        ),
        (r"(encoderblock_\d+/)MlpBlock_0/", r"\1MlpBlock_3/"),
    ),
    steps=(flatten(r"(.*/)?gn"),),
)

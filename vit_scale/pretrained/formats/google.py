"""google-research/vision_transformer: ViT (2020) and AugReg (2021), `B_16.npz` and the like.

Flax's layouts are ours. [CLS] has a position of its own, the first. The files number the layers of
a block as Flax did before 2021 (LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2,
MlpBlock_3); what was saved later counts each kind from 0.
"""

from vit_scale.pretrained.key_mapping import Rule, WeightFormat

BLOCK = "Transformer/encoderblock_{i}/"
ATTENTION, MLP = BLOCK + "MultiHeadDotProductAttention_1/", BLOCK + "MlpBlock_3/"
RULES = (
    Rule("embed/kernel", "embedding/kernel"),
    Rule("embed/bias", "embedding/bias"),
    Rule("cls", "cls", "token"),
    Rule("posemb", "Transformer/posembed_input/pos_embedding", "first"),
    Rule("blocks/{i}/norm1/scale", BLOCK + "LayerNorm_0/scale"),
    Rule("blocks/{i}/norm1/bias", BLOCK + "LayerNorm_0/bias"),
    Rule("blocks/{i}/attention/query/kernel", ATTENTION + "query/kernel"),
    Rule("blocks/{i}/attention/query/bias", ATTENTION + "query/bias"),
    Rule("blocks/{i}/attention/key/kernel", ATTENTION + "key/kernel"),
    Rule("blocks/{i}/attention/key/bias", ATTENTION + "key/bias"),
    Rule("blocks/{i}/attention/value/kernel", ATTENTION + "value/kernel"),
    Rule("blocks/{i}/attention/value/bias", ATTENTION + "value/bias"),
    Rule("blocks/{i}/attention/out/kernel", ATTENTION + "out/kernel"),
    Rule("blocks/{i}/attention/out/bias", ATTENTION + "out/bias"),
    Rule("blocks/{i}/norm2/scale", BLOCK + "LayerNorm_2/scale"),
    Rule("blocks/{i}/norm2/bias", BLOCK + "LayerNorm_2/bias"),
    Rule("blocks/{i}/mlp/up/kernel", MLP + "Dense_0/kernel"),
    Rule("blocks/{i}/mlp/up/bias", MLP + "Dense_0/bias"),
    Rule("blocks/{i}/mlp/down/kernel", MLP + "Dense_1/kernel"),
    Rule("blocks/{i}/mlp/down/bias", MLP + "Dense_1/bias"),
    Rule("norm/scale", "Transformer/encoder_norm/scale"),
    Rule("norm/bias", "Transformer/encoder_norm/bias"),
    Rule("representation/kernel", "pre_logits/kernel"),
    Rule("representation/bias", "pre_logits/bias"),
    Rule("head/kernel", "head/kernel"),
    Rule("head/bias", "head/bias"),
)

GOOGLE = WeightFormat(
    name="google",
    text="google-research/vision_transformer",
    mark=r"Transformer/posembed_input/pos_embedding",
    rules=RULES,
    model={"gelu": "tanh", "norm_epsilon": 1e-6},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    view={"fit": "stretch", "crop": 1.0, "resample": "bilinear"},
    aliases=(
        (r"(encoderblock_\d+/)LayerNorm_1/", r"\1LayerNorm_2/"),
        (
            r"(encoderblock_\d+/)MultiHeadDotProductAttention_0/",
            r"\1MultiHeadDotProductAttention_1/",
        ),
        (r"(encoderblock_\d+/)MlpBlock_0/", r"\1MlpBlock_3/"),
    ),
)

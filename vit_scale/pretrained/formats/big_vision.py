"""google-research/big_vision: [CLS] without a position, heads `tok`, `gap` and `map`.

Blocks are apart, or scanned: one array with all of them. Positions are stored, or fixed: then they
are the table of MoCo v3, whose frequencies go down to 1 / temperature where ours stop before it.
"""

from vit_scale.pretrained.key_mapping import Rule, WeightFormat

BLOCK = "Transformer/encoderblock_{i}/"
ATTENTION, MLP = BLOCK + "MultiHeadDotProductAttention_0/", BLOCK + "MlpBlock_0/"
POOL = "MAPHead_0/"
RULES = (
    Rule("embed/kernel", "embedding/kernel"),
    Rule("embed/bias", "embedding/bias"),
    Rule("cls", "cls", "token"),
    Rule("posemb", "pos_embedding", "first"),
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
    Rule("blocks/{i}/norm2/scale", BLOCK + "LayerNorm_1/scale"),
    Rule("blocks/{i}/norm2/bias", BLOCK + "LayerNorm_1/bias"),
    Rule("blocks/{i}/mlp/up/kernel", MLP + "Dense_0/kernel"),
    Rule("blocks/{i}/mlp/up/bias", MLP + "Dense_0/bias"),
    Rule("blocks/{i}/mlp/down/kernel", MLP + "Dense_1/kernel"),
    Rule("blocks/{i}/mlp/down/bias", MLP + "Dense_1/bias"),
    Rule("norm/scale", "Transformer/encoder_norm/scale"),
    Rule("norm/bias", "Transformer/encoder_norm/bias"),
    Rule("pool/probe", POOL + "probe", "first"),
    Rule("pool/query/kernel", POOL + "MultiHeadDotProductAttention_0/query/kernel"),
    Rule("pool/query/bias", POOL + "MultiHeadDotProductAttention_0/query/bias"),
    Rule("pool/key/kernel", POOL + "MultiHeadDotProductAttention_0/key/kernel"),
    Rule("pool/key/bias", POOL + "MultiHeadDotProductAttention_0/key/bias"),
    Rule("pool/value/kernel", POOL + "MultiHeadDotProductAttention_0/value/kernel"),
    Rule("pool/value/bias", POOL + "MultiHeadDotProductAttention_0/value/bias"),
    Rule("pool/out/kernel", POOL + "MultiHeadDotProductAttention_0/out/kernel"),
    Rule("pool/out/bias", POOL + "MultiHeadDotProductAttention_0/out/bias"),
    Rule("pool/norm/scale", POOL + "LayerNorm_0/scale"),
    Rule("pool/norm/bias", POOL + "LayerNorm_0/bias"),
    Rule("pool/mlp/up/kernel", POOL + "MlpBlock_0/Dense_0/kernel"),
    Rule("pool/mlp/up/bias", POOL + "MlpBlock_0/Dense_0/bias"),
    Rule("pool/mlp/down/kernel", POOL + "MlpBlock_0/Dense_1/kernel"),
    Rule("pool/mlp/down/bias", POOL + "MlpBlock_0/Dense_1/bias"),
    Rule("representation/kernel", "pre_logits/kernel"),
    Rule("representation/bias", "pre_logits/bias"),
    Rule("head/kernel", "head/kernel"),
    Rule("head/bias", "head/bias"),
)


def temperature(width: int) -> float:
    """Of our table, whose frequencies are those of big_vision at its temperature, 10,000."""
    frequencies = width // 4
    return 10_000.0 ** (frequencies / (frequencies - 1))


BIG_VISION = WeightFormat(
    name="big_vision",
    text="google-research/big_vision",
    mark=r"embedding/kernel",
    rules=RULES,
    model={"gelu": "tanh", "norm_epsilon": 1e-6},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    fused=False,
    view={"fit": "shorter", "crop": 0.875, "resample": "bilinear"},
    aliases=(
        (r"^(probe|LayerNorm_0/|MlpBlock_0/|MultiHeadDotProductAttention_0/)", r"MAPHead_0/\1"),
    ),
    stacked=("Transformer/encoderblock/", BLOCK),
    table=temperature,
)

"""google-research/big_vision: pooling `tok`, `gap` and `map`; [CLS] has no position embedding.

Blocks are separate, or scanned: one array holds all of them. Positions are learned and stored, or
fixed and not stored. The fixed ones are MoCo v3's sin-cos embeddings, whose lowest frequency is
exactly 1 / temperature; ours ends one frequency earlier. A model of two towers, such as SigLIP 2,
has the image's beside the text's. Its NaFlex variant, for images of any shape, stores the patch
embedding as a matrix and positions as a grid; here it reads one size of images.
"""

import dataclasses

from vit_scale.pretrained.formats.steps import unflatten_patches
from vit_scale.pretrained.key_mapping import Arrays, KeyMapping, WeightFormat

BLOCK = "Transformer/encoderblock_{i}/"
ATTENTION, MLP = BLOCK + "MultiHeadDotProductAttention_0/", BLOCK + "MlpBlock_0/"
POOL = "MAPHead_0/"
MAPPINGS = (
    KeyMapping("embed/kernel", "embedding/kernel"),
    KeyMapping("embed/bias", "embedding/bias"),
    KeyMapping("cls", "cls", "token"),
    KeyMapping("posemb", "pos_embedding", "first"),
    KeyMapping("blocks/{i}/norm1/scale", BLOCK + "LayerNorm_0/scale"),
    KeyMapping("blocks/{i}/norm1/bias", BLOCK + "LayerNorm_0/bias"),
    KeyMapping("blocks/{i}/attention/query/kernel", ATTENTION + "query/kernel"),
    KeyMapping("blocks/{i}/attention/query/bias", ATTENTION + "query/bias"),
    KeyMapping("blocks/{i}/attention/key/kernel", ATTENTION + "key/kernel"),
    KeyMapping("blocks/{i}/attention/key/bias", ATTENTION + "key/bias"),
    KeyMapping("blocks/{i}/attention/value/kernel", ATTENTION + "value/kernel"),
    KeyMapping("blocks/{i}/attention/value/bias", ATTENTION + "value/bias"),
    KeyMapping("blocks/{i}/attention/out/kernel", ATTENTION + "out/kernel"),
    KeyMapping("blocks/{i}/attention/out/bias", ATTENTION + "out/bias"),
    KeyMapping("blocks/{i}/norm2/scale", BLOCK + "LayerNorm_1/scale"),
    KeyMapping("blocks/{i}/norm2/bias", BLOCK + "LayerNorm_1/bias"),
    KeyMapping("blocks/{i}/mlp/up/kernel", MLP + "Dense_0/kernel"),
    KeyMapping("blocks/{i}/mlp/up/bias", MLP + "Dense_0/bias"),
    KeyMapping("blocks/{i}/mlp/down/kernel", MLP + "Dense_1/kernel"),
    KeyMapping("blocks/{i}/mlp/down/bias", MLP + "Dense_1/bias"),
    KeyMapping("norm/scale", "Transformer/encoder_norm/scale"),
    KeyMapping("norm/bias", "Transformer/encoder_norm/bias"),
    KeyMapping("pool/probe", POOL + "probe", "first"),
    KeyMapping("pool/query/kernel", POOL + "MultiHeadDotProductAttention_0/query/kernel"),
    KeyMapping("pool/query/bias", POOL + "MultiHeadDotProductAttention_0/query/bias"),
    KeyMapping("pool/key/kernel", POOL + "MultiHeadDotProductAttention_0/key/kernel"),
    KeyMapping("pool/key/bias", POOL + "MultiHeadDotProductAttention_0/key/bias"),
    KeyMapping("pool/value/kernel", POOL + "MultiHeadDotProductAttention_0/value/kernel"),
    KeyMapping("pool/value/bias", POOL + "MultiHeadDotProductAttention_0/value/bias"),
    KeyMapping("pool/out/kernel", POOL + "MultiHeadDotProductAttention_0/out/kernel"),
    KeyMapping("pool/out/bias", POOL + "MultiHeadDotProductAttention_0/out/bias"),
    KeyMapping("pool/norm/scale", POOL + "LayerNorm_0/scale"),
    KeyMapping("pool/norm/bias", POOL + "LayerNorm_0/bias"),
    KeyMapping("pool/mlp/up/kernel", POOL + "MlpBlock_0/Dense_0/kernel"),
    KeyMapping("pool/mlp/up/bias", POOL + "MlpBlock_0/Dense_0/bias"),
    KeyMapping("pool/mlp/down/kernel", POOL + "MlpBlock_0/Dense_1/kernel"),
    KeyMapping("pool/mlp/down/bias", POOL + "MlpBlock_0/Dense_1/bias"),
    KeyMapping("representation/kernel", "pre_logits/kernel"),
    KeyMapping("representation/bias", "pre_logits/bias"),
    KeyMapping("head/kernel", "head/kernel"),
    KeyMapping("head/bias", "head/bias"),
)


def temperature(width: int) -> float:
    """The temperature at which `sincos2d` gives big_vision's embeddings, whose own is 10,000."""
    frequencies = width // 4
    return 10_000.0 ** (frequencies / (frequencies - 1))


def flatten_naflex(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
    """Reshape the patch embedding (p p c) d to p p c d, and positions h w d to 1 (h w) d."""
    kernel, positions = arrays.get("embedding/kernel"), arrays.get("pos_embedding")
    if kernel is None or kernel.ndim != 2:
        return arrays, []
    changed = {"embedding/kernel": unflatten_patches(kernel)}
    if positions is not None:
        changed["pos_embedding"] = positions.reshape(1, -1, positions.shape[-1])
    return arrays | changed, []


BIG_VISION = WeightFormat(
    name="big_vision",
    title="google-research/big_vision",
    signature=r"embedding/kernel",
    mappings=MAPPINGS,
    model={"gelu": "tanh", "norm_epsilon": 1e-6},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    class_positions=False,
    eval={"fit": "shorter", "crop": 0.875, "resample": "bilinear"},
    aliases=(
        (r"^(probe|LayerNorm_0/|MlpBlock_0/|MultiHeadDotProductAttention_0/)", r"MAPHead_0/\1"),
    ),
    scanned=("Transformer/encoderblock/", BLOCK),
    sincos_temperature=temperature,
)

TWO_TOWERS = dataclasses.replace(
    BIG_VISION,
    name="big_vision-two_towers",
    title="google-research/big_vision (two towers)",
    signature=r"img/embedding/kernel",
    eval={"fit": "stretch", "crop": 1.0, "resample": "bilinear"},  # SigLIP's
    unused=r"txt/|[tb]$",
    aliases=((r"^img/", ""), *BIG_VISION.aliases),
    steps=(flatten_naflex,),
    projection=True,
)

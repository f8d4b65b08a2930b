"""google-research/big_vision: pooling `tok`, `gap` and `map`; [CLS] has no position embedding.

Blocks are separate, or scanned: one array holds all of them. Positions are learned and stored, or
fixed and not stored. The fixed ones are MoCo v3's sin-cos embeddings, whose lowest frequency is
exactly 1 / temperature; ours ends one frequency earlier. A model of two towers, such as SigLIP 2,
has the image's beside the text's. Its NaFlex variant, for images of any shape, stores the patch
embedding as a matrix and positions as a grid; here it reads one size of images.
"""

import dataclasses

from vit_scale.pretrained.formats.flax_layers import attention, leaves, mlp, norm
from vit_scale.pretrained.formats.steps import unflatten_patches
from vit_scale.pretrained.key_mapping import Arrays, KeyMapping, WeightFormat

BLOCK = "Transformer/encoderblock_{i}/"
ATTENTION = "MultiHeadDotProductAttention_0"
MAPPINGS = (
    *leaves("embed", "embedding"),
    KeyMapping("cls", "cls", "token"),
    KeyMapping("posemb", "pos_embedding", "first"),
    *norm("blocks/{i}/norm1", BLOCK + "LayerNorm_0"),
    *attention("blocks/{i}/attention", BLOCK + ATTENTION),
    *norm("blocks/{i}/norm2", BLOCK + "LayerNorm_1"),
    *mlp("blocks/{i}/mlp", BLOCK + "MlpBlock_0"),
    *norm("norm", "Transformer/encoder_norm"),
    KeyMapping("pool/probe", "MAPHead_0/probe", "first"),
    *attention("pool", "MAPHead_0/" + ATTENTION),
    *norm("pool/norm", "MAPHead_0/LayerNorm_0"),
    *mlp("pool/mlp", "MAPHead_0/MlpBlock_0"),
    *leaves("representation", "pre_logits"),
    *leaves("head", "head"),
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

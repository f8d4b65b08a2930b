"""The weight formats that can be read and written: a table of key mappings for each library."""

from vit_scale.pretrained.formats.big_vision import BIG_VISION, TWO_TOWERS
from vit_scale.pretrained.formats.clip import CLIP, OPEN_CLIP
from vit_scale.pretrained.formats.dinov2 import DINOV2
from vit_scale.pretrained.formats.dinov3 import DINOV3
from vit_scale.pretrained.formats.google import GOOGLE
from vit_scale.pretrained.formats.huggingface import HUGGINGFACE
from vit_scale.pretrained.formats.siglip import SIGLIP
from vit_scale.pretrained.formats.timm import TIMM

# In this order: the first whose signature occurs is taken. Dinov2 has ViT's as well, two towers
# that of one.
FORMATS = {
    fmt.name: fmt
    for fmt in (
        *(GOOGLE, TWO_TOWERS, BIG_VISION, TIMM, DINOV2, DINOV3, SIGLIP, CLIP, HUGGINGFACE),
        OPEN_CLIP,
    )
}

__all__ = [
    "BIG_VISION",
    "CLIP",
    "DINOV2",
    "DINOV3",
    "FORMATS",
    "GOOGLE",
    "HUGGINGFACE",
    "OPEN_CLIP",
    "SIGLIP",
    "TIMM",
    "TWO_TOWERS",
]

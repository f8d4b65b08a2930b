"""The ways to store a ViT that are understood: one table each."""

from vit_scale.pretrained.formats.big_vision import BIG_VISION
from vit_scale.pretrained.formats.google import GOOGLE
from vit_scale.pretrained.formats.huggingface import HUGGINGFACE
from vit_scale.pretrained.formats.timm import TIMM

FORMATS = {dialect.name: dialect for dialect in (GOOGLE, BIG_VISION, TIMM, HUGGINGFACE)}

__all__ = ["BIG_VISION", "FORMATS", "GOOGLE", "HUGGINGFACE", "TIMM"]

"""The weight formats that can be read and written: a table of key mappings for each library."""

from vit_scale.pretrained.formats.big_vision import BIG_VISION
from vit_scale.pretrained.formats.google import GOOGLE
from vit_scale.pretrained.formats.huggingface import HUGGINGFACE
from vit_scale.pretrained.formats.timm import TIMM

FORMATS = {fmt.name: fmt for fmt in (GOOGLE, BIG_VISION, TIMM, HUGGINGFACE)}

__all__ = ["BIG_VISION", "FORMATS", "GOOGLE", "HUGGINGFACE", "TIMM"]

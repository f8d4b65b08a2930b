"""Fine-tuning is initialisation: other parameters, adapted to this run's model."""

from vit_scale.pretrained.adapt import Placement, adapt, agree, differences, table
from vit_scale.pretrained.convert import convert
from vit_scale.pretrained.infer_config import Hints, hints_of
from vit_scale.pretrained.load import Pretrained, read

__all__ = [
    "Hints",
    "Placement",
    "Pretrained",
    "adapt",
    "agree",
    "convert",
    "differences",
    "hints_of",
    "read",
    "table",
]

"""Fine-tuning is initialisation: other parameters, adapted to this run's model."""

from vit_scale.pretrained.adapt import (
    Adaptation,
    adapt,
    adaptation_table,
    match_head,
    mismatched_settings,
)
from vit_scale.pretrained.convert import convert
from vit_scale.pretrained.infer_config import Hints, hints_from_config
from vit_scale.pretrained.load import Pretrained, load_model

__all__ = [
    "Adaptation",
    "Hints",
    "Pretrained",
    "adapt",
    "adaptation_table",
    "convert",
    "hints_from_config",
    "load_model",
    "match_head",
    "mismatched_settings",
]

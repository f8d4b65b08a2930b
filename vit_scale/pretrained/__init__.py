"""Load, adapt and convert trained models: runs of this project and external weights.

Fine-tuning is initialization: `load_model` reads the source, `adapt` fits its parameters to the new
model (new head, resampled positions, stacked blocks), and training starts as usual. Guarantees:
every array of the source is used, reported as ignored, or refused; settings come from the files
where they state them, and are printed where they must be assumed; no code in a file is executed.
"""

from vit_scale.pretrained.adapt import (
    Adaptation,
    adapt,
    adaptation_table,
    match_head,
    mismatched_settings,
)
from vit_scale.pretrained.convert import convert, convert_hints, new_folder, write_run
from vit_scale.pretrained.hints import Hints, hints_from_config
from vit_scale.pretrained.hub import with_commit
from vit_scale.pretrained.listing import listing
from vit_scale.pretrained.load import Pretrained, load_model
from vit_scale.pretrained.source_model import with_source_model

__all__ = [
    "Adaptation",
    "Hints",
    "Pretrained",
    "adapt",
    "adaptation_table",
    "convert",
    "convert_hints",
    "hints_from_config",
    "listing",
    "load_model",
    "match_head",
    "mismatched_settings",
    "new_folder",
    "with_commit",
    "with_source_model",
    "write_run",
]

"""Image data sets, their splits, and batches that depend on the step alone.

`open_split` opens a set by name (registry.py has the list); `train_batches` and `eval_batches` read
it in Grain pipelines. Guarantees: a batch is byte-identical for any number of hosts and of decoding
workers, an evaluation reads every example once, and a held-out example is held out in every storage
format of a set.
"""

from vit_scale.data.class_mapping import Match, align, match
from vit_scale.data.loader import check_shared_memory, eval_batches, train_batches
from vit_scale.data.mixtures import Mixture
from vit_scale.data.registry import (
    are_files,
    check_crop,
    delivered_size,
    describe,
    open_evaluation,
    open_split,
    open_training,
    pinned,
    share_images,
    views,
)
from vit_scale.data.sources import Batch, InMemory, Source, checksum
from vit_scale.data.splits import Slice, cut
from vit_scale.data.statistics import class_counts, mean_and_std

__all__ = [
    "Batch",
    "InMemory",
    "Match",
    "Mixture",
    "Slice",
    "Source",
    "align",
    "are_files",
    "check_crop",
    "check_shared_memory",
    "checksum",
    "class_counts",
    "cut",
    "delivered_size",
    "describe",
    "eval_batches",
    "match",
    "mean_and_std",
    "open_evaluation",
    "open_split",
    "open_training",
    "pinned",
    "share_images",
    "train_batches",
    "views",
]

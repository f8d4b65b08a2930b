"""Fields of a config that a run takes from its training set, and records, when it begins."""

import copy

from ml_collections import ConfigDict

from vit_scale.data import Source, class_counts, mean_and_std
from vit_scale.training.objectives.class_weights import compute_weights
from vit_scale.training.validation import check_classes


def with_statistics(cfg: ConfigDict, train: Source) -> ConfigDict:
    """Return a config with the weights of its classes, or the mean and deviation of its numbers.

    Fields that have a value keep it, and a config that needs none is returned as it is. A run that
    is resumed has the values that it began with (`resumed_config`). Raises UserError for a class
    without an example, and for another number of classes than the model has.
    """
    weighted = cfg.class_weights.kind != "none" and not cfg.class_weights.weights
    missing = [name for name in ("mean", "std") if not cfg.regression[name]]
    scaled = cfg.objective == "regression" and missing
    if not weighted and not scaled:
        return cfg
    check_classes(train, cfg)
    cfg = copy.deepcopy(cfg)
    if weighted:
        weights = compute_weights(class_counts(train), cfg.class_weights, train.classes)
        cfg.class_weights.weights = tuple(weights.tolist())
    if scaled:
        for name, values in zip(("mean", "std"), mean_and_std(train), strict=True):
            if name in missing:
                cfg.regression[name] = tuple(values.tolist())
    return cfg

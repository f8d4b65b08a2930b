"""Take a model's architecture, and its pixel normalization, from the weights it starts from."""

from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.models.spec import SOURCE, TRAINING_FIELDS
from vit_scale.pretrained.hints import hints_from_config
from vit_scale.pretrained.load import load_model

PIXELS = ("mean", "std")


def with_source_model(cfg: ConfigDict) -> ConfigDict:
    """Return `cfg` with the architecture of `init.source`, where model.variant is "source".

    Fields that the config sets to anything but their default stay, and so do those of training
    alone (dropout, dtype, scanned or unrolled blocks) and the number of classes. The pixels' mean
    and standard deviation become the source's. Raises UserError if the source can't be loaded.
    """
    if cfg.model.variant != SOURCE or not cfg.init.source:
        return cfg
    source = load_model(cfg.init.source, hints_from_config(cfg, cfg.model.heads)).cfg
    cfg, default = cfg.copy_and_resolve_references(), config.base()
    cfg.model.variant = default.model.variant
    for name, value in source.model.items():
        if name not in TRAINING_FIELDS and cfg.model[name] == default.model[name]:
            cfg.model[name] = value
    for name in PIXELS:
        if cfg.augment[name] == default.augment[name]:
            cfg.augment[name] = source.augment[name]
    return cfg

"""Take a model's architecture, and its pixel normalization, from the weights it starts from."""

import sys

from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.models.spec import SOURCE, TRAINING_FIELDS
from vit_scale.pretrained.hints import hints_from_config
from vit_scale.pretrained.load import load_model

PIXELS = ("mean", "std")


def with_source_model(cfg: ConfigDict) -> ConfigDict:
    """Return `cfg` with the architecture of `init.source`, where model.variant is "source".

    Fields of training alone (dropout, dtype, scanned or unrolled blocks) and the number of classes
    stay; all others of the model block, and the pixels' mean and standard deviation, become the
    source's. Those that the config had set are named in a line on standard error. Raises UserError
    if the source can't be loaded.
    """
    if cfg.model.variant != SOURCE or not cfg.init.source:
        return cfg
    source = load_model(cfg.init.source, hints_from_config(cfg, cfg.model.heads)).cfg
    before, default = config.fields(cfg), config.fields(config.base())
    cfg = cfg.copy_and_resolve_references()
    cfg.model.update(
        {name: source.model[name] for name in cfg.model if name not in TRAINING_FIELDS}
    )
    cfg.augment.update({name: source.augment[name] for name in PIXELS})
    replaced = [
        f"{name}={value}"
        for name, value in config.fields(cfg).items()
        if before[name] not in (default[name], value) and name != "model.variant"
    ]
    if replaced:
        line = f"model.variant=source replaces what the config set: {', '.join(replaced)}"
        print(f"vit-scale: {line}", file=sys.stderr)
    return cfg

"""`vit_cifar:S/16` under its former name.

    vit-scale train --config vit_small_cifar
    vit-scale train --config vit_small_cifar --config.init.source=runs/vit_small_imagenet

Result: not measured yet.
"""

from vit_scale.config import load


def get_config():
    cfg = load("vit_cifar:S/16")
    cfg.init.instead = "vit_small_imagenet"
    return cfg

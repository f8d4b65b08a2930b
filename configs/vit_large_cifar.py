"""`vit_cifar:L/16` under its former name.

    vit-scale train --config vit_large_cifar
    vit-scale train --config vit_large_cifar --config.init.source=runs/vit_large_imagenet

Result: not measured yet.
"""

from vit_scale.config import load


def get_config():
    cfg = load("vit_cifar:L/16")
    cfg.init.instead = "vit_large_imagenet"
    return cfg

"""`vit_cifar:B/16` under its former name.

    vit-scale train --config vit_base_cifar
    vit-scale train --config vit_base_cifar --config.init.source=runs/vit_base_imagenet

Result: not measured yet.
"""

from vit_scale.config import load


def get_config():
    cfg = load("vit_cifar:B/16")
    cfg.init.instead = "vit_base_imagenet"
    return cfg

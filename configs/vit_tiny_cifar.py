"""`vit_cifar:Ti/16` under its former name.

    vit-scale train --config vit_tiny_cifar
    vit-scale train --config vit_tiny_cifar --config.init.source=runs/vit_tiny_imagenet

Result: not measured yet.
"""

from vit_scale.config import load


def get_config():
    cfg = load("vit_cifar:Ti/16")
    cfg.init.instead = "vit_tiny_imagenet"
    return cfg

"""A hybrid on CIFAR-10, from scratch: the features of a ResNet-20 as patches of one pixel.

    vit-scale train --config vit_hybrid_cifar
    vit-scale train --config vit_hybrid_cifar --config.model.variant=C+Ti/4     # two convolutions

ViT paper, section 3.1. All else is vit_tutorial_cifar's, its 64 tokens too: the difference is what
a patch is. R20 is a ResNet-20 up to its last feature map, 8 x 8 of 64 channels; C are convolutions
of stride 2 (Xiao et al. 2021). Both have batch normalisation. Result: not measured yet.
"""

from vit_scale.config import load


def get_config(epochs: str = "200"):
    cfg = load(f"vit_tutorial_cifar:{epochs}")
    cfg.model.variant = "R20+Ti/4"
    return cfg

"""A hybrid on CIFAR-10, from scratch: the pixels of ResNet-20 features are the patches.

    vit-scale train --config vit_hybrid_cifar
    vit-scale train --config vit_hybrid_cifar --config.model.variant=C+Ti/4     # two convolutions

ViT paper, section 3.1. Everything else, including the 64 tokens, is as in vit_tutorial_cifar.
R20 is a ResNet-20 up to its last feature map, 8 x 8 with 64 channels; C is convolutions of stride 2
(Xiao et al. 2021). Both use batch normalisation. Result: not measured yet.
"""

from vit_scale.config import load


def get_config(epochs: str = "200"):
    cfg = load(f"vit_tutorial_cifar:{epochs}")
    cfg.model.variant = "R20+Ti/4"
    return cfg

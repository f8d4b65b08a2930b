"""A ResNet-18 with a 3x3 stem on CIFAR-10 at 32 px, from scratch: 11.2M parameters.

    vit-scale train --config resnet_cifar
    vit-scale train --config resnet_cifar --config.model.variant=resnet20       # or resnet56

The baseline of papers on small ViTs (CCT, arXiv 2104.05704, table 3, among many). resnet20 and
resnet56 are those of He et al. for CIFAR-10, with .27M and .85M parameters: 91.25 % and 93.03 %.
SGD and its decay at 50 % and 75 % of the steps are theirs; data, augmentation, epochs, and batch
size are as in vit_tutorial_cifar. Result: not measured yet.
"""

from vit_scale.config import base, load


def get_config(epochs: str = "200"):
    cfg = load(f"vit_tutorial_cifar:{epochs}")

    cfg.model = base().model
    cfg.model.variant = "resnet18"
    cfg.model.classes = 10

    cfg.optim = base().optim
    cfg.optim.name = "sgd"
    cfg.optim.lr = 0.1
    cfg.optim.schedule = "piecewise"
    cfg.optim.milestones = (0.5, 0.75)
    cfg.optim.weight_decay = 1e-3  # times lr, outside of the momentum of .9: their 1e-4 inside it
    cfg.optim.clip = 0.0
    return cfg

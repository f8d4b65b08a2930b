"""DeiT's hard distillation on CIFAR-10: the tutorial's ViT learns from any run as its teacher.

    vit-scale train --config resnet_cifar
    vit-scale train --config distill_cifar --config.distill.teacher=runs/resnet_cifar

Half of the loss is the cross-entropy with the teacher's prediction on the same augmented pixels,
through a distillation token with its own head (Touvron et al. 2021). Soft distillation as in DeiT,
and a plain student as in "patient and consistent" (Beyer et al. 2022; use mixup and many more
epochs):

    ... --config.distill.kind=soft --config.distill.weight=.1 --config.distill.temperature=3
    ... --config.model.distilled=False --config.distill.kind=soft --config.distill.weight=1

Everything else is as in vit_tutorial_cifar. Result: not measured yet.
"""

from vit_scale.config import load


def get_config(epochs: str = "200"):
    cfg = load(f"vit_tutorial_cifar:{epochs}")
    cfg.objective = "distillation"
    cfg.model.distilled = True
    return cfg

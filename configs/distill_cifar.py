"""The tutorial's ViT on CIFAR-10 with a teacher, which may be any run: DeiT's hard distillation.

    vit-scale train --config resnet_cifar
    vit-scale train --config distill_cifar --config.distill.teacher=runs/resnet_cifar

Half of the loss is the cross-entropy with what the teacher says of the same augmented pixels, from
a token and a head of its own (Touvron et al. 2021). DeiT's soft one, and a plain student as in
"patient and consistent" (Beyer et al. 2022), which wants mixup and many more epochs:

    ... --config.distill.kind=soft --config.distill.weight=.1 --config.distill.temperature=3
    ... --config.model.distilled=False --config.distill.kind=soft --config.distill.weight=1

All else is vit_tutorial_cifar's. Result: not measured yet.
"""

from vit_scale.config import load


def get_config(epochs: str = "200"):
    cfg = load(f"vit_tutorial_cifar:{epochs}")
    cfg.objective = "distillation"
    cfg.model.distilled = True
    return cfg

"""The tutorial slides' CNN on CIFAR-10, from scratch: a baseline with a published 89 %.

    vit-scale train --config cnn_cifar
    vit-scale train --config cnn_cifar:2                 # 2 epochs

Convolutions 32-64, 128-128, 256-256, each pair pooled and normalised, then dense 1024-512-10: 5.9M
parameters. Data, augmentation, epochs, and batch size are as in vit_tutorial_cifar; AdamW with a
cosine schedule. Result: not measured yet.
"""

from vit_scale.config import base, load


def get_config(epochs: str = "200"):
    cfg = load(f"vit_tutorial_cifar:{epochs}")

    cfg.model = base().model
    cfg.model.variant = "cnn"
    cfg.model.classes = 10

    cfg.optim = base().optim
    cfg.optim.lr = 1e-3
    cfg.optim.warmup = cfg.steps // 40
    cfg.optim.weight_decay = 0.05
    return cfg

"""The ViT of the UvA deep learning tutorial 15 on CIFAR-10, from scratch: a published 78.4 %.

    vit-scale train --config vit_tutorial_cifar
    vit-scale train --config vit_tutorial_cifar:2        # 2 epochs

200 epochs of 45,000 images; 5,000 held out for selection. 6 layers, width 256, 8 heads, MLP 512,
patch 4, dropout .2, 3.2M parameters; lr 3e-4, x .1 at 60 % and 85 % of the steps, clip 1, batch
128; random resized crops and flips. Result: not measured yet.
"""

from vit_scale.config import base

IMAGES, BATCH = 45_000, 128


def get_config(epochs: str = "200"):
    cfg = base()
    cfg.steps = int(epochs) * IMAGES // BATCH

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:45000]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 32

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.8, 1.0)
    cfg.augment.ratio = (0.9, 1.1)
    cfg.augment.flip = True
    cfg.augment.mean = (0.4914, 0.4822, 0.4465)
    cfg.augment.std = (0.2470, 0.2435, 0.2616)

    cfg.model.variant = "Ti/4"
    cfg.model.width = 256
    cfg.model.depth = 6
    cfg.model.heads = 8
    cfg.model.mlp = 512
    cfg.model.classes = 10
    cfg.model.dropout = 0.2
    cfg.model.scan = False  # so few blocks compile in seconds, and run a sixth faster

    cfg.optim.lr = 3e-4
    cfg.optim.schedule = "piecewise"
    cfg.optim.milestones = (0.6, 0.85)
    cfg.optim.factor = 0.1
    cfg.optim.weight_decay = 1e-2
    cfg.optim.clip = 1.0

    cfg.eval.split = "train[45000:]"
    cfg.eval.every = 5 * IMAGES // BATCH
    cfg.checkpoint.every = 5 * IMAGES // BATCH
    return cfg

"""ViT-Ti/16 on ImageNet-1k at 224 px, 300 epochs from scratch.

    vit-scale train --config vit_tiny_imagenet --config.data.path=IMAGENET

IMAGENET holds train/<wnid>/*.JPEG and val/<wnid>/*.JPEG; `vit-scale data pack` makes it faster to
read. After "How to train your ViT" (Steiner et al. 2021): AdamW, weight decay .1, mixup growing
with the size. Result: not measured yet.
"""

from vit_scale.config import base

IMAGES, EPOCHS, BATCH = 1_281_167, 300, 1024


def get_config():
    cfg = base()
    cfg.steps = EPOCHS * IMAGES // BATCH

    cfg.data.name = "folder"
    cfg.data.train = "train[:99%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 224
    cfg.data.load = 256
    cfg.data.workers = 16

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.05, 1.0)
    cfg.augment.flip = True
    cfg.augment.mixup = 0.0

    cfg.model.variant = "Ti/16"
    cfg.model.classes = 1000
    cfg.model.drop_path = 0.0
    cfg.model.dtype = "bfloat16"
    cfg.model.scan = False  # compiles for minutes once, and every step is shorter
    cfg.model.logits = "bfloat16"  # with three heads a TPU takes half as long again for float32
    cfg.model.gelu = "tanh"  # as Google's ViT

    cfg.optim.lr = 1e-3
    cfg.optim.warmup = 10_000
    cfg.optim.weight_decay = 0.1
    cfg.optim.moment = "bfloat16"

    cfg.eval.split = "train[99%:]"
    cfg.eval.final = "val"
    cfg.eval.every = 5000
    cfg.eval.batch = 1024
    cfg.checkpoint.every = 5000
    cfg.log.every = 50
    return cfg

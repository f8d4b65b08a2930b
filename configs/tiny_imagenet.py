"""ViT/8 on Tiny-ImageNet-200 at 64 px, 100 epochs from scratch: a checkpoint to fine-tune.

    vit-scale train --config tiny_imagenet          # S/8, 22M parameters
    vit-scale train --config tiny_imagenet:Ti       # Ti/8, 5.5M parameters

.data/tiny-imagenet-200 holds the set as distributed (train/<wnid>/images/*, val/images/* with
val_annotations.txt). It is decoded once and kept in memory (1.2 GB). On an accelerator add
--config.model.dtype=bfloat16. Result: not measured yet.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 100, 98_000, 512


def get_config(size: str = "S"):
    cfg = base()
    cfg.steps = EPOCHS * IMAGES // BATCH

    cfg.data.name = "folder"
    cfg.data.path = ".data/tiny-imagenet-200"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 64
    cfg.data.memory = True

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.2, 1.0)
    cfg.augment.flip = True

    cfg.model.variant = f"{size}/8"
    cfg.model.classes = 200
    cfg.model.pool = "gap"

    cfg.optim.lr = 1e-3
    cfg.optim.warmup = 5 * IMAGES // BATCH
    cfg.optim.weight_decay = 0.05

    cfg.eval.split = "train[98%:]"
    cfg.eval.final = "val"
    cfg.eval.every = 5 * IMAGES // BATCH
    cfg.checkpoint.every = 5 * IMAGES // BATCH
    return cfg

"""ViT-Ti/4 on CIFAR-10 at 32 px, from scratch, 300 epochs.

    vit-scale train --config vit_tiny_cifar_scratch

The published parts of small-image recipes put together (references in the fields' comments): AdamW,
10 warm-up epochs, cosine, label smoothing, drop path, random resized crop, flip, mixup and CutMix.
Result: not measured yet.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 300, 49_000, 128


def get_config():
    cfg = base()
    cfg.steps = EPOCHS * IMAGES // BATCH

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 32

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.8, 1.0)
    cfg.augment.flip = True
    cfg.augment.mixup = 0.8
    cfg.augment.cutmix = 1.0
    cfg.augment.smoothing = 0.1

    cfg.model.variant = "Ti/4"
    cfg.model.classes = 10
    cfg.model.pool = "gap"
    cfg.model.drop_path = 0.1
    cfg.model.dtype = "bfloat16"

    cfg.optim.lr = 5.5e-4
    cfg.optim.warmup = 10 * IMAGES // BATCH
    cfg.optim.end = 0.02
    cfg.optim.weight_decay = 0.06

    cfg.eval.split = "train[98%:]"
    cfg.eval.every = 10 * IMAGES // BATCH
    cfg.checkpoint.every = 10 * IMAGES // BATCH
    return cfg

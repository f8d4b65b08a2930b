"""ViT/8 on CIFAR-10 at 96 px, 20 epochs: from the `tiny_imagenet` run of its size, or from scratch.

    vit-scale train --config cifar_from_tiny_imagenet --config.init.source=runs/tiny_imagenet
    vit-scale train --config cifar_from_tiny_imagenet --workdir runs/cifar_from_scratch
    vit-scale train --config cifar_from_tiny_imagenet:Ti --config.data.resolution=128 ...

Both starts are trained alike, so that their difference is the pretraining. CIFAR-10's 32 px are
enlarged on the device. On an accelerator add --config.model.dtype=bfloat16.
Result: docs/results.md.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 20, 49_000, 256


def get_config(size: str = "S"):
    cfg = base()
    cfg.steps = EPOCHS * IMAGES // BATCH

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 96

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.6, 1.0)
    cfg.augment.flip = True

    cfg.model.variant = f"{size}/8"
    cfg.model.classes = 10
    cfg.model.pool = "gap"

    cfg.optim.lr = 5e-4
    cfg.optim.warmup = IMAGES // BATCH
    cfg.optim.weight_decay = 0.05

    cfg.eval.split = "train[98%:]"
    cfg.eval.final = "test"
    cfg.eval.every = 2 * IMAGES // BATCH
    cfg.checkpoint.every = 2 * IMAGES // BATCH
    return cfg

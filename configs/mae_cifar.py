"""A masked autoencoder on CIFAR-10 at 32 px, without labels: 400 epochs of ViT-Ti/4.

    vit-scale train --config mae_cifar             # then probe it, or fine-tune from runs/mae_cifar
    vit-scale train --config mae_cifar:S/4

MAE (He et al. 2022, arXiv 2111.06377) with a decoder of 2 blocks; 16 of 64 patches are visible.
Fine-tune with --config.model.class_token=True where the pool is not cls: MAE's encoder has a [CLS].
Result: not measured yet.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 400, 49_000, 512


def get_config(variant: str = "Ti/4"):
    cfg = base()
    cfg.steps = EPOCHS * IMAGES // BATCH
    cfg.objective = "mae"

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 32

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.2, 1.0)
    cfg.augment.flip = True

    cfg.model.variant = variant
    cfg.model.classes = 0
    cfg.model.posemb = "sincos2d"
    cfg.mae.update({"width": 128, "depth": 2, "heads": 4})

    cfg.optim.lr = 1.5e-4 * BATCH / 256
    cfg.optim.b2 = 0.95
    cfg.optim.warmup = 20 * IMAGES // BATCH
    cfg.optim.weight_decay = 0.05
    cfg.optim.clip = 0.0

    cfg.eval.probe = "knn"
    cfg.eval.split = "train[98%:]"
    cfg.eval.every = 20 * IMAGES // BATCH
    cfg.checkpoint.every = 20 * IMAGES // BATCH
    return cfg

"""DINO on CIFAR-10 at 32 px, without labels: 200 epochs of ViT-Ti/4, 2 + 8 crops of each image.

    vit-scale train --config dino_cifar            # then probe it, or fine-tune from it
    vit-scale train --config dino_cifar --config.dino.ibot=1      # iBOT: hidden patches too
    vit-scale train --config dino_cifar --config.dino.ibot=1 --config.dino.ibot_head=own \\
        --config.dino.centring=sinkhorn --config.dino.koleo=0.1   # DINOv2's losses

Caron et al. 2021 (arXiv 2104.14294) with fewer prototypes, small crops of 16 px, and no blur, as is
usual at 32 px. Clipping is of the gradient's global norm, theirs of each parameter's. The argument
is SIZE/PATCH. Result: not measured yet.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 200, 49_000, 512


def get_config(variant: str = "Ti/4"):
    cfg = base()
    epoch = IMAGES // BATCH
    cfg.steps = EPOCHS * epoch
    cfg.objective = "dino"

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 32

    cfg.augment.update({"crop": "resized", "scale": (0.25, 1.0), "flip": True})
    cfg.augment.update({"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_chance": 0.8, "grey": 0.2})
    cfg.views.update({"locals": 8, "local_resolution": 16, "local_scale": (0.05, 0.25)})
    cfg.views.update({"blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.2, 0.0)})

    cfg.model.variant = variant
    cfg.model.classes = 0
    cfg.model.drop_path = 0.1
    cfg.dino.update({"prototypes": 4096, "hidden": 1024, "bottleneck": 256})
    cfg.dino.update({"teacher_temperature": 0.07, "teacher_warmup": 30 * epoch})
    cfg.dino.freeze_prototypes = epoch

    cfg.optim.lr = 5e-4 * BATCH / 256
    cfg.optim.warmup = 10 * epoch
    cfg.optim.end = 1e-6 / cfg.optim.lr
    cfg.optim.weight_decay = 0.04
    cfg.optim.weight_decay_end = 0.4
    cfg.optim.clip = 3.0

    cfg.eval.probe = "knn"
    cfg.eval.split = "train[98%:]"
    cfg.eval.every = 10 * epoch
    cfg.checkpoint.every = 10 * epoch
    return cfg

"""A masked autoencoder on ImageNet-1k at 224 px, without labels: 800 epochs of ViT-B/16.

    vit-scale train --config mae_imagenet --config.data.path=IMAGENET
    vit-scale train --config mae_imagenet:L/16 --config.data.path=IMAGENET

IMAGENET holds train/ and val/. The recipe of He et al. 2022
(arXiv 2111.06377, table 8): AdamW, batch 4096, random resized crop and flip alone; published after
fine-tuning: B 83.6 and L 85.9 % (1,600 epochs, table 3). Unlike in its
code, tokens are not decayed. Result: not measured yet.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 800, 1_281_167, 4096
SIZES = ("Ti/16", "S/16", "B/16", "L/16", "H/14")


def get_config(variant: str = "B/16"):
    if variant not in SIZES:
        raise ValueError(f"no recipe for {variant!r}: give one of {', '.join(SIZES)}")
    cfg = base()
    epoch = IMAGES // BATCH
    cfg.steps = EPOCHS * epoch
    cfg.objective = "mae"

    cfg.data.name = "folder"
    cfg.data.batch = BATCH
    cfg.data.resolution = 224
    cfg.data.workers = 16

    cfg.augment.update({"crop": "torchvision", "scale": (0.2, 1.0), "flip": True})
    cfg.augment.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})

    cfg.model.update({"variant": variant, "classes": 0, "posemb": "sincos2d"})
    cfg.model.dtype = "bfloat16"

    cfg.optim.update({"lr": 1.5e-4 * BATCH / 256, "b2": 0.95, "warmup": 40 * epoch, "clip": 0.0})
    cfg.optim.weight_decay = 0.05

    cfg.eval.update({"probe": "knn", "bank": "train[:10%]", "split": "", "final": "val"})
    cfg.eval.update({"crop": 0.875, "resample": "bicubic", "batch": 1024})
    cfg.checkpoint.every = 10 * epoch
    cfg.log.every = 50
    return cfg

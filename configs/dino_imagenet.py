"""DINO on ImageNet-1k at 224 px, without labels: 100 epochs of ViT-S/16, 2 + 10 crops of an image.

    vit-scale train --config dino_imagenet --config.data.path=IMAGENET
    vit-scale train --config dino_imagenet:B/16 --config.data.path=IMAGENET

IMAGENET holds train/ and val/. Caron et al. 2021 (arXiv 2104.14294), whose S/16 has kNN 74.5 and
linear 77.0 % after 800 epochs (table 2). Here the prototypes are unit vectors, which theirs are for
B and not for S; unlike in its code, positions and [CLS] are not decayed. iBOT and DINOv2 are
switches of `dino`; docs/self-supervised.md has them. Result: not measured yet.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 100, 1_281_167, 1024
SIZES = ("Ti/16", "S/16", "B/16", "L/16")


def get_config(variant: str = "S/16"):
    if variant not in SIZES:
        raise ValueError(f"no recipe for {variant!r}: give one of {', '.join(SIZES)}")
    cfg = base()
    epoch = IMAGES // BATCH
    cfg.steps = EPOCHS * epoch
    cfg.objective = "dino"

    cfg.data.name = "folder"
    cfg.data.batch = BATCH
    cfg.data.resolution = 224
    cfg.data.workers = 16

    cfg.augment.update({"crop": "torchvision", "scale": (0.25, 1.0), "flip": True})
    cfg.augment.update({"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_chance": 0.8, "grey": 0.2})
    cfg.augment.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    cfg.views.update({"locals": 10, "local_resolution": 96, "local_scale": (0.05, 0.25)})

    cfg.model.update({"variant": variant, "classes": 0, "drop_path": 0.1, "dtype": "bfloat16"})
    cfg.dino.update({"teacher_temperature": 0.07, "teacher_warmup": 30 * epoch})
    cfg.dino.freeze_prototypes = epoch

    cfg.optim.update({"lr": 5e-4 * BATCH / 256, "warmup": 10 * epoch, "clip": 0.0})
    cfg.optim.end = 1e-5 / cfg.optim.lr
    cfg.optim.update({"weight_decay": 0.04, "weight_decay_end": 0.4})

    cfg.eval.update({"probe": "knn", "bank": "train[:10%]", "split": "", "final": "val"})
    cfg.eval.update({"crop": 0.875, "resample": "bicubic", "batch": 1024})
    cfg.checkpoint.every = 5 * epoch
    cfg.log.every = 50
    return cfg

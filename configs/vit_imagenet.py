"""ViT/16 on ImageNet-1k at 224 px, 300 epochs from scratch.

    vit-scale train --config vit_imagenet:S/16 --config.data.path=IMAGENET

The argument is Ti/16, S/16, B/16, or L/16. IMAGENET holds train/<wnid>/*.JPEG and
val/<wnid>/*.JPEG; `vit-scale data pack` makes it faster to read. After "How to train your ViT"
(Steiner et al. 2021, arXiv 2106.10270): AdamW, weight decay .1, more mixup and drop path for larger
models. Result: not measured yet.
"""

from vit_scale.config import base

IMAGES, EPOCHS, BATCH = 1_281_167, 300, 1024
MIXUP = {"Ti/16": 0.0, "S/16": 0.2, "B/16": 0.2, "L/16": 0.5}
DROP_PATH = {"Ti/16": 0.0, "S/16": 0.0, "B/16": 0.1, "L/16": 0.1}


def get_config(variant: str = "S/16"):
    cfg = base()
    if variant not in MIXUP:
        raise ValueError(f"no recipe for {variant!r}: give one of {', '.join(MIXUP)}")
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
    cfg.augment.mixup = MIXUP[variant]

    cfg.model.variant = variant
    cfg.model.classes = 1000
    cfg.model.drop_path = DROP_PATH[variant]
    cfg.model.dtype = "bfloat16"
    cfg.model.scan = False  # compiles for minutes once, and every step is shorter
    cfg.model.gelu = "tanh"  # as Google's ViT
    if variant == "Ti/16":  # with three heads a TPU takes half as long again for float32
        cfg.model.logits = "bfloat16"

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

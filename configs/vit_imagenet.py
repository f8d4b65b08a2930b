"""ViT/16 on ImageNet-1k at 224 px from scratch; published recipes by name.

    vit-scale train --config vit_imagenet:S/16 --config.data.path=IMAGENET
    vit-scale train --config vit_imagenet:S/16,recipe=deit3 --config.data.path=IMAGENET

The argument is Ti/16, S/16, B/16, or L/16. IMAGENET holds train/<wnid>/*.JPEG and
val/<wnid>/*.JPEG; `vit-scale data pack` makes it faster to read. Without a recipe it is 300 epochs
after "How to train your ViT" (Steiner et al. 2021, arXiv 2106.10270): AdamW, weight decay .1, more
mixup and drop path for larger models. The recipes, and top-1 accuracy as published:

    baselines    S 76.5 (90 epochs)            Beyer et al. 2022, arXiv 2205.01580; big_vision
    augreg       not published by size         Steiner et al. 2021; big_vision's vit_i1k
    deit         Ti 72.2, S 79.8, B 81.8       Touvron et al. 2021, arXiv 2012.12877
    deit3        S 81.4 (800 epochs)           Touvron et al. 2022, arXiv 2204.07118
    deit3-224    after deit3: B 83.8, L 84.9   the same; 20 epochs from --config.init.source=RUN

deit3 trains B and L at 192 px. Parameters are initialised as in Google's ViT in all of them; DeiT's
query, key and value share one trust ratio, here they have one each. Result: not measured yet.
"""

import math

from vit_scale.config import base

IMAGES, CLASSES = 1_281_167, 1000
BATCH, EPOCHS = 1024, 300
MIXUP = {"Ti/16": 0.0, "S/16": 0.2, "B/16": 0.2, "L/16": 0.5}
DROP_PATH = {"Ti/16": 0.0, "S/16": 0.0, "B/16": 0.1, "L/16": 0.1}
PATHS = {"S/16": 0.05, "B/16": 0.2, "L/16": 0.45}  # of DeiT III
WIDTH = {"Ti/16": 192, "S/16": 384, "B/16": 768, "L/16": 1024}


def get_config(argument: str = "S/16"):
    variant, _, recipe = argument.partition(",recipe=")
    if variant not in MIXUP:
        raise ValueError(f"no recipe for {variant!r}: give one of {', '.join(MIXUP)}")
    if not recipe:
        return plain(variant)
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}: give one of {', '.join(RECIPES)}")
    function, sizes = RECIPES[recipe]
    if variant not in sizes:
        raise ValueError(f"recipe={recipe} is for {', '.join(sizes)}, not {variant}")
    return function(variant)


def plain(variant: str):
    cfg = imagenet(variant, EPOCHS, BATCH)
    cfg.data.load = 256
    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.05, 1.0)
    cfg.augment.mixup = MIXUP[variant]
    cfg.model.drop_path = DROP_PATH[variant]
    cfg.model.gelu = "tanh"  # as Google's ViT
    cfg.optim.warmup = 10_000
    cfg.optim.weight_decay = 0.1
    return cfg


def imagenet(variant: str, epochs: int, batch: int):
    """What all recipes share."""
    cfg = base()
    cfg.steps = epochs * IMAGES // batch
    cfg.data.name = "folder"
    cfg.data.train = "train[:99%]"
    cfg.data.batch = batch
    cfg.data.resolution = 224
    cfg.data.workers = 16
    cfg.augment.flip = True
    cfg.model.variant = variant
    cfg.model.classes = CLASSES
    cfg.model.dtype = "bfloat16"
    cfg.model.scan = False  # compiles for minutes once, and every step is shorter
    if variant == "Ti/16":  # with three heads a TPU takes half as long again for float32
        cfg.model.logits = "bfloat16"
    cfg.optim.lr = 1e-3
    cfg.optim.moment = "bfloat16"
    cfg.eval.split = "train[99%:]"
    cfg.eval.final = "val"
    cfg.eval.every = 5000
    cfg.eval.batch = 1024
    cfg.checkpoint.every = 5000
    cfg.log.every = 50
    return cfg


def big_vision(variant: str, epochs: int, batch: int, policy: str, mixup: float):
    """What Google's recipes share. Its weight decay of 1e-4 is not times lr, ours is."""
    cfg = imagenet(variant, epochs, batch)
    cfg.augment.update({"crop": "inception", "scale": (0.05, 1.0), "ratio": (0.75, 1.33)})
    cfg.augment.update({"resample": "bilinear", "policy": policy, "mixup": mixup})
    cfg.model.update({"gelu": "tanh", "representation": WIDTH[variant]})
    cfg.optim.update({"warmup": 10_000, "weight_decay": 0.1})
    cfg.eval.update({"crop": 0.875, "resample": "bilinear"})
    return cfg


def baselines(variant: str):
    cfg = big_vision(variant, 90, 1024, "randaug(2,10)", 0.2)
    cfg.model.update({"pool": "gap", "posemb": "sincos2d"})
    return cfg


def augreg(variant: str):
    light = variant == "Ti/16"  # light1, else medium2
    cfg = big_vision(variant, 300, 4096, f"randaug(2,{0 if light else 15})", 0.0 if light else 0.5)
    cfg.loss = "sigmoid"
    cfg.model.head_bias = -math.log(CLASSES)
    return cfg


def facebook(variant: str, epochs: int, batch: int, rate: float, end: float):
    """What DeiT's recipes share: five epochs of warm-up, no clipping, mixup or CutMix a batch."""
    cfg = imagenet(variant, epochs, batch)
    cfg.augment.update({"crop": "torchvision", "resample": "bicubic"})
    cfg.augment.update({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    cfg.augment.update({"mixup": 0.8, "cutmix": 1.0})
    cfg.optim.update({"lr": rate, "end": end / rate, "warmup": 5 * IMAGES // batch, "clip": 0.0})
    cfg.optim.update({"weight_decay": 0.05, "moment": "float32"})
    cfg.eval.update({"crop": 0.875, "resample": "bicubic"})
    return cfg


def deit(variant: str):
    cfg = facebook(variant, 300, 1024, rate=1e-3, end=1e-5)
    cfg.data.repeats = 3
    cfg.augment.update({"policy": "rand-m9-mstd0.5-inc1", "erase": 0.25, "smoothing": 0.1})
    cfg.model.drop_path = 0.1
    return cfg


def deit3(variant: str):
    cfg = facebook(variant, 800, 2048, rate=4e-3 if variant == "S/16" else 3e-3, end=1e-5)
    cfg.loss = "binary"
    cfg.data.repeats = 3
    cfg.data.resolution = 224 if variant == "S/16" else 192
    cfg.augment.update({"policy": "3a", "jitter": (0.3, 0.3, 0.3, 0.0)})
    cfg.model.update({"layer_scale": 1e-4, "drop_path": PATHS[variant], "drop_path_uniform": True})
    cfg.optim.update({"name": "lamb", "clip": 1.0})  # apex's FusedLAMB clips
    cfg.eval.crop = 1.0
    return cfg


def deit3_224(variant: str):
    cfg = facebook(variant, 20, 512, rate=1e-5, end=1e-5)
    cfg.augment.update({"policy": "rand-m9-mstd0.5-inc1", "smoothing": 0.1})
    cfg.model.update({"layer_scale": 1e-4, "drop_path": PATHS[variant], "drop_path_uniform": True})
    cfg.optim.weight_decay = 0.1
    cfg.eval.crop = 1.0
    return cfg


RECIPES = {
    "baselines": (baselines, ("S/16",)),
    "augreg": (augreg, tuple(MIXUP)),
    "deit": (deit, ("Ti/16", "S/16", "B/16")),
    "deit3": (deit3, tuple(PATHS)),
    "deit3-224": (deit3_224, ("B/16", "L/16")),
}

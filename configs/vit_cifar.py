"""ViT/16 on CIFAR-10 at 384 px, from a 224 px checkpoint: the ViT paper's fine-tuning.

    vit-scale train --config vit_cifar:S/16
    vit-scale train --config vit_cifar:S/16 --config.init.source=runs/vit_imagenet-S-16

The argument is Ti/16, S/16, B/16, or L/16. SGD with momentum, no weight decay, clip 1, batch 512,
cosine over 10,000 steps with 500 of warm-up, a fresh zero head, pixels in [-1, 1], 2 % of the
training set held out to choose the learning rate from .001, .003, .01, .03 (Dosovitskiy et al.
2021, arXiv 2010.11929, appendix B.1.1). The first command downloads the AugReg weights of
ImageNet-21k that Steiner et al. 2021 (arXiv 2106.10270) recommend; the second continues your own
pretraining. Result: not measured yet.
"""

from vit_scale.config import base

AUGREG = "https://storage.googleapis.com/vit_models/augreg/"
WEIGHTS = {
    "Ti/16": "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
    "S/16": "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz",
    "B/16": "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz",
    "L/16": "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0.npz",
}
LEARNING_RATE = {"Ti/16": 0.01, "S/16": 0.01, "B/16": 0.03, "L/16": 0.03}


def get_config(variant: str = "S/16"):
    cfg = base()
    if variant not in WEIGHTS:
        raise ValueError(f"no recipe for {variant!r}: give one of {', '.join(WEIGHTS)}")
    cfg.steps = 10_000

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = 512
    cfg.data.resolution = 384

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.3, 1.0)
    cfg.augment.flip = True

    cfg.model.variant = variant
    cfg.model.classes = 10
    cfg.model.dtype = "bfloat16"
    cfg.model.gelu = "tanh"  # as Google's ViT
    cfg.model.scan = False  # as it was pretrained
    if variant == "Ti/16":  # with three heads a TPU takes half as long again for float32
        cfg.model.logits = "bfloat16"

    cfg.init.source = AUGREG + WEIGHTS[variant]
    cfg.init.instead = f"vit_imagenet:{variant}"
    cfg.init.resample = "corners"  # as Google's ViT

    cfg.optim.name = "sgd"
    cfg.optim.lr = LEARNING_RATE[variant]
    cfg.optim.b1 = 0.9
    cfg.optim.warmup = 500
    cfg.optim.weight_decay = 0.0
    cfg.optim.clip = 1.0

    cfg.eval.split = "train[98%:]"
    cfg.eval.final = "test"
    cfg.eval.every = 500
    cfg.eval.batch = 512
    cfg.checkpoint.every = 500
    return cfg

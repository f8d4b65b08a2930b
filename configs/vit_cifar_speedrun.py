"""CIFAR-10 from scratch on two CPU cores: the best model in 150 minutes of both.

    vit-scale train --config vit_cifar_speedrun            # a ViT on a CNN's features
    vit-scale train --config vit_cifar_speedrun:mae        # a ViT on patches of 4 pixels: a third
    vit-scale train --config vit_cifar_speedrun:patch \\
        --config.init.source=runs/vit_cifar_speedrun-mae   # of the time as a masked autoencoder
    vit-scale train --config vit_cifar_speedrun:tutorial   # the ViT of vit_tutorial_cifar

Muon with a rate that falls linearly to 0; AutoAugment's policy for CIFAR-10 and CutMix for three
quarters of the steps, then crops and flips alone. Rotary positions and normalised queries and keys
cost next to nothing. Result: not measured yet.
"""

from vit_scale.config import base

STEPS = {"hybrid": 15000, "mae": 7800, "patch": 8000, "tutorial": 7200}
EVERY = 600


def get_config(model: str = "hybrid"):
    if model not in STEPS:
        raise ValueError(f"no model {model!r}: give one of {', '.join(STEPS)}")
    cfg = base()
    cfg.steps = STEPS[model]
    cfg.data.update({"train": "train[:98%]", "batch": 128, "resolution": 32, "workers": 1})
    cfg.augment.update({"crop": "pad", "flip": True, "smoothing": 0.1})
    cfg.augment.update({"policy": "autoaugment-cifar10", "cutmix": 1.0, "until": 0.75})
    cfg.optim.update({"name": "muon", "lr": 4e-3, "b1": 0.95, "weight_decay": 0.05})
    cfg.optim.update({"schedule": "linear", "warmup": 200})
    cfg.model.update({"classes": 10, "scan": False})
    cfg.eval.update({"split": "train[98%:]", "final": "test", "every": EVERY})
    cfg.checkpoint.every = EVERY
    return {"hybrid": hybrid, "mae": mae, "patch": patch, "tutorial": tutorial}[model](cfg)


def hybrid(cfg):
    cfg.model.update({"variant": "CNN+Ti/4", "width": 128, "depth": 4, "heads": 4, "mlp": 256})
    cfg.model.update({"pool": "gap", "rope": "axial", "qk_norm": "rmsnorm"})
    cfg.optim.muon_convolutions = True
    cfg.augment.policy = ""
    return cfg


def patch(cfg):
    cfg.model.update({"variant": "Ti/4", "width": 160, "depth": 6, "heads": 5, "mlp": 320})
    cfg.model.update({"rope": "axial", "qk_norm": "rmsnorm"})
    cfg.model.update({"pool": "gap", "class_token": True})  # which the masked autoencoder has
    return cfg


def mae(cfg):
    patch(cfg)
    cfg.objective = "mae"
    cfg.mae.update({"width": 64, "depth": 1, "heads": 4})
    cfg.model.update({"pool": "cls", "class_token": False, "classes": 0})
    cfg.data.batch = 256
    cfg.optim.update({"lr": 3e-3, "clip": 0.0})
    cfg.augment = base().augment
    cfg.augment.update({"crop": "resized", "scale": (0.3, 1.0), "flip": True})
    cfg.eval.update({"probe": "knn", "bank": "train[:20%]", "every": 1300, "final": ""})
    return cfg


def tutorial(cfg):
    cfg.model.update({"variant": "Ti/4", "width": 256, "depth": 6, "heads": 8, "mlp": 512})
    cfg.model.drop_path = 0.1
    cfg.optim.lr = 3e-3
    cfg.augment.cutmix = 0.0  # there are not the epochs for it
    return cfg

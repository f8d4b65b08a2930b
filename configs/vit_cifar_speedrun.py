"""CIFAR-10 from scratch in at most 150 minutes on two CPU cores: small ViTs trained by Muon.

    vit-scale train --config vit_cifar_speedrun            # a ViT on a CNN's features
    vit-scale train --config vit_cifar_speedrun:wide       # on wider ones, at half their resolution
    vit-scale train --config vit_cifar_speedrun:long       # the same for longer, with CutMix
    vit-scale train --config vit_cifar_speedrun:tutorial   # the ViT of vit_tutorial_cifar

    # a ViT on patches of 4 pixels, first as a masked autoencoder, then with labels
    vit-scale train --config vit_cifar_speedrun:mae
    vit-scale train --config vit_cifar_speedrun:patch \\
        --config.init.source=runs/vit_cifar_speedrun-mae

The learning rate falls linearly to 0. For three quarters of the steps (long: 85 %) images are mixed
by CutMix (hybrid, long, patch) and changed by AutoAugment's policy for CIFAR-10 (patch, tutorial),
or rectangles of them erased (wide); after that only cropped and flipped. All but the tutorial's
have rotary positions besides learned ones, and normalised queries and keys. Hybrid and mae compute
in float32, the others in bfloat16.
Result: docs/results.md.
"""

from vit_scale.config import base

EVERY = 600  # steps between evaluations


def get_config(model: str = "hybrid"):
    if model not in MODELS:
        raise ValueError(f"no model {model!r}: give one of {', '.join(MODELS)}")
    cfg = base()
    cfg.data.update({"train": "train[:98%]", "batch": 128, "resolution": 32, "workers": 1})
    cfg.augment.update({"crop": "pad", "flip": True, "smoothing": 0.1})
    cfg.augment.update({"policy": "autoaugment-cifar10", "cutmix": 1.0, "until": 0.75})
    cfg.optim.update({"name": "muon", "lr": 4e-3, "b1": 0.95, "weight_decay": 0.05})
    cfg.optim.update({"schedule": "linear", "warmup": 200})
    cfg.model.update({"classes": 10, "scan": False})
    cfg.eval.update({"split": "train[98%:]", "final": "test", "every": EVERY})
    cfg.checkpoint.every = EVERY
    cfg.steps = MODELS[model][0]
    MODELS[model][1](cfg)
    return cfg


def hybrid(cfg):
    cfg.model.update({"variant": "CNN+Ti/4", "width": 128, "depth": 4, "heads": 4, "mlp": 256})
    cfg.model.update({"pool": "gap", "rope": "axial", "qk_norm": "rmsnorm"})
    cfg.optim.muon_convolutions = True
    cfg.augment.policy = ""


def wide(cfg):
    hybrid(cfg)
    cfg.model.update({"variant": "CNN+Ti/8", "width": 256, "depth": 2, "mlp": 512})
    cfg.model.dtype = "bfloat16"
    cfg.data.batch = 256
    cfg.optim.lr = 1e-2
    cfg.augment.update({"cutmix": 0.0, "erase": 0.5, "smoothing": 0.2})


def long(cfg):
    wide(cfg)
    cfg.augment.update({"cutmix": 1.0, "erase": 0.0, "smoothing": 0.1, "until": 0.85})


def patch(cfg):
    cfg.model.update({"variant": "Ti/4", "width": 160, "depth": 6, "heads": 5, "mlp": 320})
    cfg.model.update({"rope": "axial", "qk_norm": "rmsnorm"})
    cfg.model.update({"pool": "gap", "class_token": True})  # which the masked autoencoder has
    cfg.model.dtype = "bfloat16"


def mae(cfg):
    patch(cfg)
    cfg.objective = "mae"
    cfg.mae.update({"width": 64, "depth": 1, "heads": 4})
    cfg.model.update({"pool": "cls", "class_token": False, "classes": 0, "dtype": "float32"})
    cfg.data.batch = 256
    cfg.optim.update({"lr": 3e-3, "clip": 0.0})
    cfg.augment = base().augment
    cfg.augment.update({"crop": "resized", "scale": (0.3, 1.0), "flip": True})
    cfg.eval.update({"probe": "knn", "bank": "train[:20%]", "every": 1300, "final": ""})


def tutorial(cfg):
    cfg.model.update({"variant": "Ti/4", "width": 256, "depth": 6, "heads": 8, "mlp": 512})
    cfg.model.update({"drop_path": 0.1, "dtype": "bfloat16"})
    cfg.optim.lr = 3e-3
    cfg.augment.cutmix = 0.0  # too few epochs for it to help


MODELS = {  # steps, and what differs
    "hybrid": (15000, hybrid),
    "wide": (5700, wide),
    "long": (10000, long),
    "mae": (7800, mae),
    "patch": (9600, patch),
    "tutorial": (7200, tutorial),
}

"""Tiny-ImageNet-200 at 64 px, then CIFAR-10 at 96 px, against CIFAR-10 alone for the same minutes.

    vit-scale train --config compare_transfer:pretrain    # a masked autoencoder, no labels
    vit-scale train --config compare_transfer:finetune \\
        --config.init.source=runs/compare_transfer-pretrain
    vit-scale train --config compare_transfer:scratch

A ViT of width 160 on patches of 8 pixels, on CPU cores, in bfloat16: 40 minutes of CPU time each,
and 80 from scratch. 64 tokens become 144; positions are rotary alone, stretched to a side of 8.
Result: not measured yet.
"""

from vit_scale.config import base

FINETUNE, SCRATCH = 900, 1800  # steps


def get_config(stage: str = "pretrain"):
    if stage not in ("pretrain", "finetune", "scratch"):
        raise ValueError(f"no stage {stage!r}: give pretrain, finetune or scratch")
    cfg = base()
    cfg.data.workers = 1
    cfg.model.update({"variant": "Ti/8", "width": 160, "depth": 6, "heads": 5, "mlp": 320})
    cfg.model.update({"posemb": "none", "rope": "axial", "rope_reference": 8})
    cfg.model.update({"qk_norm": "rmsnorm", "dtype": "bfloat16", "scan": False})
    cfg.optim.update({"name": "muon", "b1": 0.95, "weight_decay": 0.05, "schedule": "linear"})
    cfg.optim.warmup = 100
    pretrain(cfg) if stage == "pretrain" else classify_cifar(cfg)
    if stage != "pretrain":
        cfg.steps = FINETUNE if stage == "finetune" else SCRATCH
    return cfg


def pretrain(cfg):
    cfg.objective = "mae"
    cfg.steps = 3500
    cfg.data.update({"name": "folder", "path": ".data/tiny-imagenet-200", "train": "train"})
    cfg.data.update({"batch": 256, "resolution": 64, "memory": True})
    cfg.augment.update({"crop": "resized", "scale": (0.3, 1.0), "flip": True})
    cfg.model.classes = 0
    cfg.mae.update({"width": 64, "depth": 1, "heads": 4})
    cfg.optim.update({"lr": 3e-3, "clip": 0.0})
    cfg.eval.update({"split": "", "final": ""})
    cfg.checkpoint.every = 500


def classify_cifar(cfg):
    cfg.data.update({"train": "train[:98%]", "batch": 128, "resolution": 96})
    cfg.augment.update({"crop": "pad", "flip": True, "smoothing": 0.1})
    cfg.model.update({"classes": 10, "pool": "gap", "class_token": True})
    cfg.optim.lr = 2e-3
    cfg.eval.update({"split": "train[98%:]", "final": "test", "every": 300})
    cfg.checkpoint.every = 300

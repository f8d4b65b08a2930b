"""Pretraining methods compared on two CPU cores: one small ViT, each for 30 minutes of CPU time.

    vit-scale train --config compare_pretraining:mae
    vit-scale probe runs/compare_pretraining-mae --only knn linear --config.data.name=cifar10 \\
        --config.data.path=.data --train 'train[:98%]' --split test
    vit-scale train --config compare_pretraining:finetune \\
        --config.init.source=runs/compare_pretraining-mae --workdir runs/finetune-mae

The argument is supervised, mae, dino, ibot or lejepa: on Tiny-ImageNet-200 at 24 px, with patches
of 4; or fractals: supervised, on a thousand generated classes of one image; or finetune: CIFAR-10
at 32 px for 20 minutes of CPU time, and without init.source from scratch; or scratch: the same for
50 minutes. Steps of pretraining are for 1.25 ms of CPU time an image with mae, 3.8 with supervised
and fractals, and 14 to 15.5 with the others.
Result: the table in docs/self-supervised.md; MAE helps most.
"""

from vit_scale.config import base

STEPS = {"supervised": 3700, "fractals": 3700, "mae": 5600}
STEPS |= {"dino": 940, "ibot": 900, "lejepa": 1000}
FINETUNE, SCRATCH = 1300, 3250


def get_config(method: str = "mae"):
    cfg = base()
    cfg.model.update({"variant": "Ti/4", "width": 128, "depth": 4, "heads": 4, "mlp": 512})
    cfg.data.update({"batch": 128, "memory": True})
    cfg.optim.update({"lr": 1e-3, "weight_decay": 0.05})
    cfg.eval.update({"split": "", "final": ""})
    cfg.checkpoint.every = 500
    if method in ("finetune", "scratch"):
        return classify_cifar(cfg, FINETUNE if method == "finetune" else SCRATCH)
    if method not in STEPS:
        raise ValueError(f"no method {method!r}: give one of {', '.join(STEPS)}, finetune, scratch")
    cfg.steps = STEPS[method]
    cfg.optim.warmup = cfg.steps // 10
    cfg.data.update({"name": "folder", "path": ".data/tiny-imagenet-200", "resolution": 24})
    cfg.augment.update({"crop": "resized", "scale": (0.3, 1.0), "flip": True})
    if method == "supervised":
        cfg.model.classes = 200
        return cfg
    if method == "fractals":
        cfg.data.update({"name": "fractal", "path": ".data", "memory": False})
        cfg.data.fractal.classes = cfg.model.classes = 1000
        return cfg
    cfg.model.classes = 0
    return mae(cfg) if method == "mae" else compare_crops(cfg, method)


def mae(cfg):
    cfg.objective = "mae"
    cfg.data.batch = 256
    cfg.optim.update({"b2": 0.95, "clip": 0.0})
    cfg.mae.update({"width": 64, "depth": 1, "heads": 4})
    return cfg


def compare_crops(cfg, method: str):
    cfg.objective = "lejepa" if method == "lejepa" else "dino"
    cfg.augment.update({"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_chance": 0.8, "grey": 0.2})
    cfg.views.update({"locals": 4, "local_resolution": 12, "local_scale": (0.05, 0.3)})
    cfg.views.update({"blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.2, 0.0)})
    if method == "lejepa":
        cfg.lejepa.update({"hidden": 512, "width": 64, "slices": 256})
        return cfg
    cfg.dino.update({"prototypes": 1024, "hidden": 512, "bottleneck": 128, "momentum": 0.99})
    cfg.dino.freeze_prototypes = cfg.steps // 20
    cfg.optim.clip = 3.0
    if method == "ibot":
        cfg.dino.ibot = 1.0
    return cfg


def classify_cifar(cfg, steps: int):
    cfg.steps = steps
    cfg.optim.warmup = steps // 10
    cfg.data.update({"name": "cifar10", "train": "train[:98%]", "resolution": 32, "memory": False})
    cfg.augment.update({"crop": "pad", "flip": True, "smoothing": 0.1})
    cfg.model.classes = 10
    cfg.eval.update({"split": "train[98%:]", "final": "test", "every": 500})
    return cfg

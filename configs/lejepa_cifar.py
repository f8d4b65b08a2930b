"""LeJEPA on CIFAR-10 at 32 px, without labels: 200 epochs of ViT-Ti/4, 2 + 6 crops of each image.

    vit-scale train --config lejepa_cifar          # then probe it, or fine-tune from its run
    vit-scale train --config lejepa_cifar:S/4 --config.lejepa.weight=0.02

Balestriero & LeCun 2025 (arXiv 2511.08544): no teacher, and one hyper-parameter, `lejepa.weight`.
The argument is SIZE/PATCH.
Result: not measured yet.
"""

from vit_scale.config import base

EPOCHS, IMAGES, BATCH = 200, 49_000, 256


def get_config(variant: str = "Ti/4"):
    cfg = base()
    epoch = IMAGES // BATCH
    cfg.steps = EPOCHS * epoch
    cfg.objective = "lejepa"

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 32

    cfg.augment.update({"crop": "resized", "scale": (0.3, 1.0), "flip": True})
    cfg.augment.update({"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_chance": 0.8, "grey": 0.2})
    cfg.views.update({"locals": 6, "local_resolution": 16, "local_scale": (0.05, 0.3)})
    cfg.views.update({"blur": (0.0, 0.0, 0.0), "solarize": (0.2, 0.2, 0.2)})

    cfg.model.variant = variant
    cfg.model.classes = 0
    cfg.model.drop_path = 0.1

    cfg.optim.lr = 5e-4
    cfg.optim.warmup = 10 * epoch
    cfg.optim.end = 1e-3
    cfg.optim.weight_decay = 0.05

    cfg.eval.probe = "knn"
    cfg.eval.split = "train[98%:]"
    cfg.eval.every = 10 * epoch
    cfg.checkpoint.every = 10 * epoch
    return cfg

"""The training that soak.py disturbs: seconds long, with everything on that keeps state.

The argument is OPTIMIZER[,OBJECTIVE]. Adam makes a whole step of a gradient that is rounding alone,
so that runs on different numbers of hosts part by more than rounding; with SGD they don't.
"""

from vit_scale.config import base


def get_config(argument="adamw"):
    optimizer, _, objective = argument.partition(",")
    cfg = base()
    cfg.steps = 24

    cfg.data.name = "fractal"
    cfg.data.batch = 16
    cfg.data.resolution = 16
    cfg.data.fractal.classes = 4
    cfg.data.fractal.train_per_class = 16
    cfg.data.fractal.test_per_class = 8
    cfg.data.fractal.resolution = 16
    cfg.data.fractal.points = 500

    cfg.augment.mixup = 0.5
    cfg.augment.flip = True

    cfg.model.variant = "Ti/8"
    cfg.model.width = 16
    cfg.model.depth = 2
    cfg.model.heads = 2
    cfg.model.mlp = 16
    cfg.model.classes = 4
    cfg.model.dropout = 0.1

    cfg.optim.name = optimizer
    cfg.optim.lr = {"adamw": 3e-3, "sgd": 3e-2}[optimizer]
    cfg.optim.warmup = 4
    cfg.optim.ema = 0.9

    cfg.eval.every = 8
    cfg.eval.batch = 16
    cfg.mesh.data, cfg.mesh.fsdp = 1, -1  # each of several hosts holds, and reads, a part
    cfg.checkpoint.every = 4
    cfg.log.every = 1
    cfg.log.images = 0
    cfg.log.wandb = False
    cfg.log.tensorboard = False

    if objective:
        self_supervised(cfg, objective)
    cfg.divergence.patience = 2
    cfg.watchdog.peer = 8.0
    return cfg


def self_supervised(cfg, objective):
    """Learn without labels, measured by nearest neighbours."""
    cfg.objective = objective
    cfg.augment.mixup = 0.0
    cfg.augment.crop = "resized"
    cfg.model.variant = "Ti/4"
    cfg.model.classes = 0
    cfg.optim.ema = 0.0
    cfg.eval.probe = "knn"
    if objective == "mae":
        cfg.mae.update({"width": 8, "depth": 1, "heads": 2})
        return
    cfg.views.update({"locals": 2, "local_resolution": 8})
    cfg.views.update({"blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)})  # of NaN they make 0
    if objective == "lejepa":
        cfg.lejepa.update({"hidden": 16, "width": 8, "slices": 16})
        return
    cfg.dino.update({"prototypes": 24, "hidden": 16, "bottleneck": 8, "ibot": 1.0, "koleo": 0.1})
    cfg.dino.update({"momentum": 0.9, "freeze_prototypes": 4})

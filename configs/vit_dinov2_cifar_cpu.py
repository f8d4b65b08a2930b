"""DINOv2's ViT-S/14 on CIFAR-10 on CPU cores, in bfloat16: first the head, then all of it.

    vit-scale train --config vit_dinov2_cifar_cpu:head      # the head alone: a linear probe
    vit-scale train --config vit_dinov2_cifar_cpu \\
        --config.init.source=runs/vit_dinov2_cifar_cpu-head
    vit-scale train --config vit_dinov2_cifar_cpu:lora \\
        --config.init.source=runs/vit_dinov2_cifar_cpu-head
    vit-scale train --config vit_dinov2_cifar_cpu:random    # from random parameters

As vit_dinov2_cifar: images are enlarged to 112 px on the device, positions go from 37 x 37 to
8 x 8. A head of zeros would change the trained blocks before it has learned anything (Kumar et al.
2022, arXiv 2202.10054): with it, a sixteenth of this training reached 75 % instead of 84 %. Random
parameters have layer scales of 1. Result: docs/results.md.
"""

from vit_scale.config import load

STARTS = ("head", "finetune", "lora", "random")


def get_config(start: str = "finetune"):
    if start not in STARTS:
        raise ValueError(f"no start {start!r}: give one of {', '.join(STARTS)}")
    cfg = load("vit_dinov2_cifar")
    cfg.steps = 2300  # 3 epochs
    cfg.data.update({"batch": 64, "workers": 1})
    cfg.augment.crop = "pad"
    cfg.model.update({"dtype": "bfloat16", "scan": False, "drop_path": 0.0})
    cfg.optim.update({"lr": 4e-5, "warmup": 100, "layer_decay": 0.9})
    cfg.eval.every = cfg.checkpoint.every = 230
    if start == "head":
        cfg.steps = 600
        cfg.optim.update({"train": "head", "lr": 3e-3, "layer_decay": 1.0})
    if start == "lora":
        cfg.lora.update({"rank": 16, "kernels": "kernel$"})
        cfg.optim.update({"lr": 5e-4, "layer_decay": 1.0})
    if start == "random":
        cfg.init.source = ""
        cfg.model.layer_scale = 1.0
        cfg.optim.update({"lr": 1e-3, "layer_decay": 1.0})
    return cfg

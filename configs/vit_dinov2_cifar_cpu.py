"""DINOv2's ViT-S/14 on CIFAR-10 on CPU cores: 6 x 6 tokens of 14 px, in bfloat16.

    vit-scale train --config vit_dinov2_cifar_cpu            # fine-tuned
    vit-scale train --config vit_dinov2_cifar_cpu:lora       # adapters in attention and MLP
    vit-scale train --config vit_dinov2_cifar_cpu:random     # from random parameters

As vit_dinov2_cifar, but 84 px and 3 epochs, 80 minutes of CPU time where the processor has bfloat16
instructions. Random parameters have layer scales of 1, as adapted to trained blocks they are not.
Result: not measured yet.
"""

from vit_scale.config import load


def get_config(start: str = "pretrained"):
    if start not in ("pretrained", "lora", "random"):
        raise ValueError(f"no start {start!r}: give pretrained, lora or random")
    cfg = load("vit_dinov2_cifar")
    cfg.steps = 2300  # 3 epochs
    cfg.data.update({"batch": 64, "resolution": 84, "workers": 1})
    cfg.model.update({"dtype": "bfloat16", "scan": False})
    cfg.optim.update({"lr": 2e-4, "warmup": 200, "layer_decay": 0.75})
    cfg.eval.every = 230
    cfg.checkpoint.every = 230
    if start == "lora":
        cfg.lora.update({"rank": 16, "kernels": "kernel$"})
        cfg.optim.update({"lr": 1e-3, "layer_decay": 1.0})
    if start == "random":
        cfg.init.source = ""
        cfg.optim.update({"lr": 1e-3, "layer_decay": 1.0})
        cfg.model.layer_scale = 1.0
    return cfg

"""CNNs and ViTs on CIFAR-10 compared on two CPU cores: 40 minutes of CPU time each, one recipe.

    vit-scale train --config compare_architectures:cnn       # the slides' CNN
    vit-scale train --config compare_architectures:resnet    # ResNet-20
    vit-scale train --config compare_architectures:hybrid    # a ViT on a CNN's features
    vit-scale train --config compare_architectures:vit       # a ViT on patches of 4 pixels
    vit-scale train --config compare_architectures:distilled \\
        --config.distill.teacher=runs/compare_architectures-cnn

The models are those of vit_cifar_speedrun, cnn_cifar and resnet_cifar; all learn by Muon, from
crops and flips, in bfloat16. The last one is that ViT with
the trained CNN as its teacher, whose 40 minutes come on top.
Result: not measured yet.
"""

from vit_scale.config import base, load

STEPS = {"cnn": 2000, "resnet": 3400, "hybrid": 3000, "vit": 2500, "distilled": 1700}


def get_config(model: str = "vit"):
    if model not in STEPS:
        raise ValueError(f"no model {model!r}: give one of {', '.join(STEPS)}")
    cfg = load("vit_cifar_speedrun:hybrid" if model == "hybrid" else "vit_cifar_speedrun:patch")
    cfg.steps = STEPS[model]
    cfg.augment.update({"policy": "", "cutmix": 0.0, "until": 1.0})
    cfg.model.class_token = False
    if model in ("cnn", "resnet"):
        cfg.model = base().model
        cfg.model.update({"variant": "cnn" if model == "cnn" else "resnet20", "classes": 10})
        cfg.optim.muon_convolutions = True
    cfg.model.dtype = "bfloat16"
    if model == "distilled":
        cfg.objective = "distillation"
        cfg.distill.update({"kind": "soft", "weight": 0.7, "temperature": 2.0})
    cfg.eval.every = cfg.checkpoint.every = 200
    return cfg

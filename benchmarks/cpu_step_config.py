"""A case of the measurement of training steps on a CPU, such as Ti/4@32: its model and its batch.

tutorial   the ViT of vit_tutorial_cifar, with its dropout and its clipping
C+Ti/4     a small hybrid of 632 k parameters at 32 px
"""

from vit_scale.config import base, load

BATCH = {"tutorial": 128, "Ti/4@32": 128, "Ti/16@224": 32, "C+Ti/4": 128}


def get_config(case: str):
    cfg = base()
    cfg.steps = 150

    cfg.data.batch = BATCH[case]
    cfg.data.resolution = int(case.partition("@")[2] or 32)

    cfg.optim.schedule = "constant"
    cfg.optim.weight_decay = 0.05
    cfg.optim.clip = 0.0

    if case == "tutorial":
        tutorial = load("vit_tutorial_cifar")
        cfg.model = tutorial.model
        cfg.optim.clip = tutorial.optim.clip
    else:
        cfg.model.variant = case.partition("@")[0]
    if case == "C+Ti/4":
        cfg.model.width = 128
        cfg.model.depth = 4
        cfg.model.heads = 4
        cfg.model.mlp = 256
    cfg.model.classes = 10
    cfg.model.scan = False

    cfg.eval.split = ""
    cfg.eval.final = ""
    cfg.checkpoint.every = 0
    return cfg

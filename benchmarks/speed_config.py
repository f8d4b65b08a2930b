"""A case of the measurement of speed, such as S/16@224: its model and its batch, without the data.

A batch fills the device, and three programs with it fit on an H200 together.
"""

from vit_scale.config import base

BATCH = {
    "Ti/4@32": 2048,
    "S/4@32": 1024,
    "Ti/16@224": 1024,
    "S/16@224": 512,
    "B/16@224": 256,
    "L/16@224": 128,
}


def get_config(case: str):
    cfg = base()
    cfg.steps = 150

    cfg.data.batch = BATCH[case]
    cfg.data.resolution = int(case.partition("@")[2])

    cfg.model.variant = case.partition("@")[0]
    cfg.model.classes = 10
    cfg.model.dtype = "bfloat16"
    cfg.model.scan = False

    cfg.optim.schedule = "constant"
    cfg.optim.weight_decay = 0.05
    cfg.optim.clip = 0.0

    cfg.eval.split = ""
    cfg.eval.final = ""
    cfg.checkpoint.every = 0
    return cfg

"""The config of the run that tests/golden/make_pinned.py pins: a tiny ViT on 27 photos.

The photos are not square and the training set is cut, so that decoding and slices are pinned too.
"""

from vit_scale.config import base


def get_config():
    cfg = base()
    cfg.steps = 12
    cfg.data.name = "folder"
    cfg.data.path = "data"  # in tests/golden/pinned, from where the run is started
    cfg.data.train = "train[:75%]"
    cfg.data.batch = 4
    cfg.data.resolution = 16
    cfg.data.workers = 0
    cfg.augment.crop = "resized"
    cfg.augment.flip = True
    cfg.augment.mixup = 0.2
    cfg.model.variant = "Ti/8"
    cfg.model.width = 16
    cfg.model.depth = 2
    cfg.model.heads = 2
    cfg.model.mlp = 24
    cfg.model.classes = 3
    cfg.model.dropout = 0.1
    cfg.optim.lr = 3e-3
    cfg.optim.warmup = 2
    cfg.optim.weight_decay = 0.05
    cfg.optim.ema = 0.9
    cfg.eval.split = "train[75%:]"
    cfg.eval.final = "val"
    cfg.eval.every = 3
    cfg.eval.batch = 4
    cfg.checkpoint.every = 3
    cfg.checkpoint.programs = False
    cfg.log.every = 1
    cfg.log.wandb = False
    cfg.log.tensorboard = False
    cfg.log.images = 0
    return cfg

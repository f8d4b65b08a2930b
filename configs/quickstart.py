"""The whole path in minutes on two CPU cores: pretrain on generated images, fine-tune on others.

    launch/local.sh --config quickstart

A small ViT learns to tell fractals apart at 32 px (nothing is downloaded), then CIFAR-10 at 32 px
and at 64 px, each from the pretrained and from random parameters. Without CIFAR-10 in data.path,
.data, it learns the generated set's held-out classes instead; a run resumes with the set that it
began with. Result: docs/results.md.
"""

from vit_scale.config import base
from vit_scale.storage import paths

STAGES = ("pretrain", "scratch-32", "finetune-32", "scratch-64", "finetune-64")


def get_config(stage: str = ""):
    cfg = base()
    cfg.stages = () if stage else STAGES
    cfg.model.variant = "Ti/8"
    cfg.model.width = 128
    cfg.model.depth = 4
    cfg.model.heads = 4
    cfg.model.mlp = 512
    cfg.model.pool = "gap"
    cfg.model.scan = False  # so few blocks compile in seconds, and run a sixth faster
    cfg.optim.name = "muon"  # learns the most in so few steps
    cfg.optim.lr = 2e-3
    cfg.optim.weight_decay = 0.05
    cfg.augment.crop = "resized"
    cfg.augment.flip = True
    cfg.data.batch = 128
    cfg.log.every = 50
    cfg.checkpoint.every = 0
    cfg.eval.every = 0
    cfg.eval.split = ""
    if stage in ("", "pretrain"):
        pretrain(cfg)
    else:
        start, _, resolution = stage.partition("-")
        finetune(cfg, int(resolution))
        cfg.init.source = "pretrain" if start == "finetune" else ""
    return cfg


def pretrain(cfg):
    cfg.steps = 400
    cfg.data.name = "fractal"
    cfg.data.resolution = 32
    cfg.data.fractal.classes = 512
    cfg.data.fractal.resolution = 52
    cfg.augment.scale = (0.1, 1.0)
    cfg.augment.mixup = 0.8
    cfg.model.classes = 512
    cfg.optim.warmup = 50
    cfg.eval.final = ""


def finetune(cfg, resolution):
    cfg.steps = 80 if resolution == 32 else 50
    cfg.data.resolution = resolution
    cfg.augment.scale = (0.6, 1.0)
    cfg.optim.warmup = 10
    cfg.data.name = ""  # `resolve` decides it
    use_fractals(cfg)  # which decide the head's size until then


def resolve(cfg, stage, begun):
    """Fine-tune on what another stage has begun with, else on CIFAR-10 where it is in data.path."""
    if stage not in STAGES[1:]:
        return
    used = [begun[one].data.name for one in STAGES[1:] if one in begun]
    if not cfg.data.name:
        cfg.data.name = used[0] if used else ("cifar10" if has_cifar(cfg.data.path) else "fractal")
    if cfg.data.name == "cifar10":
        cfg.data.train = "train[:10000]"
        cfg.eval.final = "test[:5000]"
        cfg.model.classes = 10


def has_cifar(folder):
    path = paths.parse(folder)
    return any((path / f"cifar-10-batches-{layout}").is_dir() for layout in ("bin", "py"))


def use_fractals(cfg):
    cfg.data.fractal.classes = 20
    cfg.data.fractal.first = 100_000
    cfg.data.fractal.train_per_class = 100
    cfg.data.fractal.test_per_class = 100
    cfg.model.classes = 20

"""A pretrained backbone on CIFAR-10, 8 x 8 tokens of 14 px: DINOv2's ViT-S/14, or any other.

    vit-scale train --config vit_dinov2_cifar --config.init.source=hf://facebook/dinov2-small
    vit-scale train --config vit_dinov2_cifar:10 --config.init.source=DIR   # 10 epochs, local files

The architecture and the pixels' normalization are the source's (model.variant=source), so that
DINOv3, SigLIP 2, CLIP, EVA-02 or a run of one's own fine-tune alike: set data.resolution to a
multiple of their patch. 32 px are enlarged to 112 on the device; positions go from 37 x 37 to 8 x 8
as transformers resamples them. AdamW with layer decay and drop path, as BEiT and DINOv2 are
fine-tuned. On an accelerator add --config.model.dtype=bfloat16. Result: docs/results.md.
"""

from vit_scale.config import base

IMAGES, BATCH = 49_000, 256


def get_config(epochs: str = "10"):
    cfg = base()
    cfg.steps = int(float(epochs) * IMAGES / BATCH)

    cfg.data.name = "cifar10"
    cfg.data.train = "train[:98%]"
    cfg.data.batch = BATCH
    cfg.data.resolution = 112

    cfg.augment.crop = "resized"
    cfg.augment.scale = (0.5, 1.0)
    cfg.augment.flip = True
    cfg.augment.smoothing = 0.1

    cfg.model.variant = "source"
    cfg.model.classes = 10
    cfg.model.drop_path = 0.1

    cfg.init.resample = "bicubic"

    cfg.optim.lr = 2e-4
    cfg.optim.warmup = cfg.steps // 10
    cfg.optim.weight_decay = 0.05
    cfg.optim.layer_decay = 0.7

    cfg.eval.split = "train[98%:]"
    cfg.eval.final = "test"
    cfg.eval.every = IMAGES // BATCH
    cfg.checkpoint.every = IMAGES // BATCH
    return cfg

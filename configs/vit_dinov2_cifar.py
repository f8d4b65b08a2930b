"""DINOv2's ViT-S/14, or any pretrained backbone, on CIFAR-10: 8 x 8 tokens of 14 px.

    vit-scale train --config vit_dinov2_cifar            # from the Hugging Face Hub
    vit-scale train --config vit_dinov2_cifar:3          # 3 epochs instead of 10
    vit-scale train --config vit_dinov2_cifar --config.model.variant=source \\
        --config.init.source=hf://google/siglip2-base-patch16-224   # 7 x 7 tokens of 16 px

With model.variant=source the architecture and the pixels' normalization are the source's, so that
DINOv3, SigLIP 2, CLIP, EVA-02 or a run of one's own fine-tune alike. 32 px are enlarged to 112 on
the device; positions go from 37 x 37 to 8 x 8 as transformers resamples them. AdamW with layer
decay and drop path, as in BEiT (Bao et al. 2021). Training the head first, as vit_dinov2_cifar_cpu
does, helps short trainings. On an accelerator add --config.model.dtype=bfloat16.
Result: not measured yet.
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

    cfg.augment.mean = (0.485, 0.456, 0.406)
    cfg.augment.std = (0.229, 0.224, 0.225)

    cfg.model.variant = "S/14"
    cfg.model.layer_scale = 1e-5  # whose values are the source's
    cfg.model.classes = 10
    cfg.model.drop_path = 0.1

    cfg.init.source = "hf://facebook/dinov2-small"
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

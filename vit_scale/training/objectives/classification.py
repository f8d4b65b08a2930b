"""Classification: cross-entropy with soft targets, of one class an image or of several."""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_scale.augment.pipeline import train_images
from vit_scale.config import image_size
from vit_scale.data.targets import CLASSES
from vit_scale.models.build import Model
from vit_scale.training.objectives.losses import make_loss
from vit_scale.training.objectives.objective import Objective, example_weights, reduce_losses


def classification(model: Model, cfg: ConfigDict, teacher: Callable | None = None) -> Objective:
    """The config's loss (losses.py) with soft targets (mixup, CutMix, smoothing), in float32.

    The mean over the unmasked examples of the global batch. A model with two heads is trained on
    the mean of their logits, which is what it predicts. An example is "correct" where the class of
    the largest logit is that of the largest target; one with several classes (data.target=classes)
    is neither.
    """
    size, label_loss = image_size(cfg), make_loss(cfg)

    def prepare(batch, key):
        images, targets = train_images(batch, key, cfg.augment, size, cfg.model.classes)
        weight = example_weights(batch["mask"])
        return {"image": images, "target": targets, "mask": batch["mask"], "weight": weight}

    def loss(params, examples, key):
        out = model.train(params, examples["image"], key, examples["mask"])
        losses = label_loss(out.prediction, examples["target"])
        total, outputs = reduce_losses(losses, out, examples)
        if cfg.data.target == CLASSES:
            del outputs["correct"]
        return total, outputs

    return Objective(prepare, loss)

"""Augmentation: what the train step does to a batch of images, and evaluation's view of an image.

`draws` makes every random decision, `geometry` crops and resizes, `policies` are RandAugment and
others, made of the `operations` of `colour` and `warp`, `mixing` is mixup and CutMix, `erasing`
random erasing. `pipeline` applies them in order, `view` is evaluation's deterministic crop, and
`random_crop` draws training's, of image files, before they are decoded. Guarantee: every draw is a
pure function of the step's key and the example's position in the global batch, so a batch is
augmented identically on any number of hosts.
"""

from vit_scale.augment.draws import draw
from vit_scale.augment.pipeline import check, eval_images, train_images
from vit_scale.augment.view import View, view

__all__ = ["View", "check", "draw", "eval_images", "train_images", "view"]

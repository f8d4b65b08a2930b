"""Train with an objective of your own: binary cross-entropy, a yes or no for each class.

    python examples/custom_objective.py

DeiT III (Touvron et al. 2022) is trained this way on ImageNet-1k. An objective is two pure
functions: one makes the examples of a batch, one computes their loss. The first is classification's
here, so that augmentation, mixup and label smoothing work as before.
"""

import optax

import vit_scale
from vit_scale import config
from vit_scale.training.objectives import OBJECTIVES
from vit_scale.training.objectives.classification import classification
from vit_scale.training.objectives.objective import reduce_losses


def binary(model, cfg, teacher=None):
    """Return the objective: the sum over classes of the binary cross-entropy."""

    def loss(params, examples, key):
        out = model.train(params, examples["image"], key, examples["mask"])
        losses = optax.sigmoid_binary_cross_entropy(out.prediction, examples["target"]).sum(-1)
        return reduce_losses(losses, out, examples)

    return classification(model, cfg)._replace(loss=loss)


OBJECTIVES["binary"] = binary

cfg = config.base()
cfg.objective = "binary"
cfg.steps = 60
cfg.data.name = "fractal"  # images that are generated: nothing is downloaded
cfg.data.batch = 64
cfg.data.fractal.classes = 5
cfg.data.fractal.train_per_class = 40
cfg.data.fractal.test_per_class = 20
cfg.data.fractal.points = 1000
cfg.data.fractal.resolution = 32
cfg.augment.flip = True
cfg.model.variant = "Ti/8"
cfg.model.width = 48
cfg.model.depth = 2
cfg.model.mlp = 96
cfg.model.scan = False
cfg.model.classes = 5
cfg.optim.name = "muon"
cfg.optim.lr = 2e-3
cfg.log.wandb = False

report = vit_scale.train(cfg, "runs/custom_objective", quiet=True)
accuracy, n = report["eval"]["accuracy"], report["eval"]["n"]
print(f"test accuracy {accuracy:.1%} (n = {n}) after {report['step']} steps")

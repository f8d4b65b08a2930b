"""What all objectives that need no labels have in common, and what they refuse."""

from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.augment.multi_crop import check_views
from vit_scale.config import fields, image_size
from vit_scale.errors import UserError, nearest
from vit_scale.models.spec import Shape, resolve

CENTRINGS = ("mean", "sinkhorn")
IBOT_HEADS = ("shared", "own")
UNUSED = {  # fields that would be ignored
    **dict.fromkeys(("augment.mixup", "augment.cutmix", "augment.smoothing"), "mixes labels"),
    **dict.fromkeys(("model.representation", "model.head_bias"), "is part of a head"),
    "loss": "is a loss of labels",
}
OF_VIEWS = {
    f"augment.{name}": f"is set for each kind of crop by views.{name}"
    for name in ("blur", "solarize")
}
UNUSED_BY = {
    "mae": {
        "model.patch_drop": "hides patches beside mae.mask",
        "model.fc_norm": "normalises what a head reads",
        "model.nearest_grid": "resizes images whose pixels are to be predicted",
    },
    "dino": {"optim.ema": "is an average beside the teacher, which is one already", **OF_VIEWS},
    "lejepa": OF_VIEWS,
}
BLOCKS = {  # and the objectives that read them
    "views": ("dino", "lejepa"),
    **{name: (name,) for name in ("mae", "dino", "lejepa")},
}
COUNTS = {
    "mae": ("width", "depth", "heads"),
    "dino": ("prototypes", "hidden", "bottleneck", "layers"),
    "lejepa": ("slices", "hidden", "width", "layers"),
}


def check_unread_blocks(cfg: ConfigDict) -> None:
    """Raise UserError for a changed field of a block that the objective of `cfg` doesn't read."""
    values, default = fields(cfg), fields(config.base())
    for block, readers in BLOCKS.items():
        names = [name for name in default if name.startswith(f"{block}.")]
        changed = [name for name in names if values[name] != default[name]]
        if changed and cfg.objective not in readers:
            raise UserError(
                f"{changed[0]}={values[changed[0]]} is read by objective={' and '.join(readers)}, "
                f"not {cfg.objective}: remove it"
            )


def check_self_supervised(cfg: ConfigDict) -> None:
    """Raise UserError for a config whose self-supervised objective can't work, or ignores a field.

    `cfg` is the whole config.
    """
    name, values, default = cfg.objective, fields(cfg), fields(config.base())
    for field, why in (UNUSED | UNUSED_BY[name]).items():
        if values[field] != default[field]:
            raise UserError(
                f"{field}={values[field]} {why}: with objective={name} leave it at {default[field]}"
            )
    if cfg.model.classes:
        raise UserError(
            f"objective={name} learns no classes: set model.classes=0, not {cfg.model.classes}"
        )
    shape = resolve(cfg.model, image_size(cfg))
    if not isinstance(shape, Shape) or (shape.stem and shape.stem.batch_norm):
        raise UserError(
            f"objective={name} needs a ViT without batch normalisation, not {cfg.model.variant}"
        )
    for field in COUNTS[name]:
        if cfg[name][field] < 1:
            raise UserError(f"{name}.{field}={cfg[name][field]} must be at least 1")
    if not cfg.eval.probe and (cfg.eval.split or cfg.eval.final):
        raise UserError(
            f"objective={name} predicts no classes, so that eval.split={cfg.eval.split!r} and "
            f"eval.final={cfg.eval.final!r} can't be measured: set eval.probe=knn, or both to ''"
        )
    if name != "mae":
        check_views(cfg, shape.patch)
    {"mae": _check_mae, "dino": _check_dino, "lejepa": _check_lejepa}[name](cfg, shape)


def _check_mae(cfg: ConfigDict, shape: Shape) -> None:
    if shape.stem:
        raise UserError(
            f"objective=mae hides patches of pixels, and {cfg.model.variant} has convolutions "
            "before them, which see all"
        )
    if shape.pool == "map":
        raise UserError(
            "objective=mae trains no attention pooling, which its loss doesn't read: set "
            "model.pool=cls or gap"
        )
    if cfg.mae.mlp is not None and cfg.mae.mlp < 1:
        raise UserError(f"mae.mlp={cfg.mae.mlp} must be at least 1")
    patches = shape.grid[0] * shape.grid[1]
    visible = int(patches * (1 - cfg.mae.mask)) if 0 < cfg.mae.mask < 1 else 0
    if not 0 < visible < patches:
        raise UserError(
            f"mae.mask={cfg.mae.mask} leaves {visible} of {patches} patches visible: it must hide "
            "some, and leave some"
        )
    if cfg.mae.width % cfg.mae.heads or cfg.mae.width % 4:
        raise UserError(
            f"mae.width={cfg.mae.width} must be divisible by mae.heads={cfg.mae.heads} and by 4"
        )


def _check_dino(cfg: ConfigDict, shape: Shape) -> None:
    d = cfg.dino
    for field, valid in (("centring", CENTRINGS), ("ibot_head", IBOT_HEADS)):
        if d[field] not in valid:
            raise UserError(f"dino.{field}={d[field]!r} is unknown; {nearest(d[field], valid)}")
    for field in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
        if not d[field] > 0:
            raise UserError(f"dino.{field}={d[field]} must be above 0")
    for field in ("momentum", "momentum_end", "centre_momentum", "mask_share"):
        if not 0 <= d[field] <= 1:
            raise UserError(f"dino.{field}={d[field]} must be from 0 to 1")
    for field in ("ibot", "koleo"):
        if not d[field] >= 0:
            raise UserError(f"dino.{field}={d[field]} must be at least 0")
    for field in ("teacher_warmup", "freeze_prototypes"):
        if not 0 <= d[field] < cfg.steps:
            raise UserError(
                f"dino.{field}={d[field]} must be at least 0 and fewer than steps={cfg.steps}"
            )
    if not d.ibot:
        return
    if cfg.model.patch_drop:
        raise UserError(
            f"model.patch_drop={cfg.model.patch_drop} leaves out patches that dino.ibot={d.ibot} "
            "compares: set it to 0"
        )
    if shape.fc_norm:
        raise UserError(
            f"dino.ibot={d.ibot} compares patches after the final norm, which model.fc_norm=True "
            "puts behind the pooling: set it to False"
        )
    if not d.mask_share:
        raise UserError(f"dino.ibot={d.ibot} with dino.mask_share=0 hides no patches")
    if len(d.mask) != 2 or not 0 < d.mask[0] <= d.mask[1] < 1:
        raise UserError(f"dino.mask={d.mask} must be two fractions, 0 < low <= high < 1")
    patches = shape.grid[0] * shape.grid[1]
    if int(patches * d.mask[1]) < 1:
        raise UserError(f"dino.mask={d.mask} hides none of {patches} patches")
    if shape.pooled != shape.size.width:
        raise UserError(
            f"dino.ibot={d.ibot} needs pooled vectors as wide as tokens, {shape.size.width}: "
            f"model.pool={shape.pool} gives {shape.pooled}"
        )


def _check_lejepa(cfg: ConfigDict, shape: Shape) -> None:
    if not 0 < cfg.lejepa.weight < 1:
        raise UserError(f"lejepa.weight={cfg.lejepa.weight} must be between 0 and 1")
    if cfg.data.batch < 2:
        raise UserError(f"data.batch={cfg.data.batch}: objective=lejepa needs several examples")

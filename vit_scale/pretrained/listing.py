"""Say what a file of weights is, for `vit-scale convert SOURCE --list`."""

from vit_scale import config
from vit_scale.models.parameters import count
from vit_scale.models.spec import TRAINING_FIELDS
from vit_scale.pretrained.load import Pretrained

SIZES = ("variant", "width", "depth", "heads", "mlp", "swiglu", "posemb", "pool")


def listing(loaded: Pretrained) -> list[str]:
    """Return lines on the model's size, grid, parts, preprocessing and classes, and the notes."""
    cfg, shape = loaded.cfg, loaded.model.shape
    height, width = config.image_size(cfg)
    rows = {"image": f"{height} x {width} px", "classes": _classes(loaded.classes)}
    if hasattr(shape, "grid"):
        size = shape.size
        rows["size"] = (
            f"{cfg.model.variant if not cfg.model.width else 'non-standard'}: width "
            f"{size.width}, {size.depth} blocks, {size.heads} heads, MLP {size.mlp}"
        )
        rows["patch"] = f"{shape.patch} px, a grid of {shape.grid[0]} x {shape.grid[1]}"
        before = f"{shape.before} before the patches" if shape.before else "no other tokens"
        rows["tokens"] = f"{shape.tokens}, {before}; pool={shape.pool}"
    else:
        rows["size"] = cfg.model.variant
    rows["parameters"] = f"{count(loaded.params):,}"
    rows["parts"] = ", ".join(_parts(loaded)) or "as in the ViT paper"
    view = cfg.eval
    rows["preprocessing"] = (
        f"mean {_numbers(cfg.augment.mean)}, std {_numbers(cfg.augment.std)}; "
        f"fit={view.fit}, crop={view.crop:g}, {view.resample}"
    )
    order = ("size", "patch", "tokens", "image", "parameters", "parts", "preprocessing", "classes")
    lines = [f"{name:14} {rows[name]}" for name in order if name in rows]
    return [*lines, *loaded.notes]


def _parts(loaded: Pretrained) -> list[str]:
    """FIELD=VALUE of the model block, where it is not the default's."""
    model, default = loaded.cfg.model, config.base().model
    hidden = (*SIZES, *TRAINING_FIELDS, "class_token")
    parts = [f"{name}={model[name]}" for name in model if model[name] != default[name]]
    return [part for part in parts if part.partition("=")[0] not in hidden]


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _classes(names: tuple[str, ...], shown: int = 3) -> str:
    if not names:
        return "none: a backbone without a head"
    more = ", ..." if len(names) > shown else ""
    return f"{len(names)}: {', '.join(names[:shown])}{more}"

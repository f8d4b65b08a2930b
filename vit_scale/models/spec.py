"""Resolve a config's `model` block for one image size: widths, depth, patch grid, tokens.

Invalid blocks are refused here, before anything is built.
"""

import dataclasses
import math
import re

from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest
from vit_scale.models import bit, convnets, rotary, stems
from vit_scale.models.layers import NORMS, Size

SIZES = {
    "Ti": Size(192, 12, 3, 768),  # DeiT (Touvron et al. 2021)
    "S": Size(384, 12, 6, 1536),  # DeiT
    "B": Size(768, 12, 12, 3072),  # ViT, table 1
    "L": Size(1024, 24, 16, 4096),  # ViT, table 1
    "H": Size(1280, 32, 16, 5120),  # ViT, table 1
    "So400m": Size(1152, 27, 16, 4304),  # SoViT-400m (Alabdulmohsin et al. 2023)
    "g": Size(1536, 40, 24, 4096, swiglu=True),  # DINOv2 (Oquab et al. 2023)
    "G": Size(1664, 48, 16, 8192),  # Zhai et al. 2022
    "S+": Size(384, 12, 6, 1536, swiglu=True),  # DINOv3 (Siméoni et al. 2025)
    "H+": Size(1280, 32, 20, 5120, swiglu=True),  # DINOv3
    "7B": Size(4096, 40, 32, 8192, swiglu=True),  # DINOv3
}
SOURCE = "source"  # model.variant: the architecture of init.source
# Fields of a model block that its trained parameters have no part in.
TRAINING_FIELDS = (
    *("classes", "dropout", "drop_path", "drop_path_uniform", "patch_drop", "head_bias"),
    *("rope_shift", "rope_jitter", "rope_rescale", "dtype", "scan", "remat", "logits", "attention"),
)
CHOICES = {
    "pool": ("cls", "gap", "map", "cls_gap"),
    "posemb": ("learned", "sincos2d", "none"),
    "rope": rotary.KINDS,
    "dtype": ("float32", "bfloat16"),
    "attention": ("xla", "cudnn"),
    "logits": ("float32", "bfloat16"),
    "gelu": ("exact", "tanh", "quick"),
    "norm": tuple(NORMS),
    "qk_norm": ("none", *NORMS),
    "stem_epsilon": tuple(bit.EPSILONS),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A ViT's sizes, resolved from a `model` block and an image size."""

    size: Size
    patch: int
    grid: tuple[int, int]
    pool: str
    stem: stems.Stem | None = None  # of a hybrid
    distilled: bool = False  # has a distillation token
    representation: int = 0  # width of the layer before the head; 0: none
    class_token: bool = False  # has a [CLS], which the head does not read with pool=gap
    fc_norm: bool = False  # the last norm comes after pooling
    registers: int = 0  # register tokens

    @property
    def before(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.distilled + self.registers

    @property
    def read(self) -> int | None:
        """Number of leading tokens of the last block that the heads read; None: all."""
        return 1 + self.distilled if self.pool == "cls" else None

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the images that are cut into patches."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def pooled(self) -> int:
        """Width of the vector that an image is pooled to."""
        return self.size.width * (2 if self.pool == "cls_gap" else 1)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.before


def resolve(cfg: ConfigDict, image: tuple[int, int]) -> Shape | convnets.Shape:
    """Resolve a `model` block for images of (height, width) pixels. Raises UserError."""
    if cfg.variant in convnets.SIZES:
        check_choices(cfg)
        return convnets.shape(cfg, image)
    return shape(cfg, image)


def shape(cfg: ConfigDict, image: tuple[int, int]) -> Shape:
    """Resolve `cfg.variant` of a ViT and its overrides for images of (height, width) pixels.

    Raises UserError for an unknown size, and for numbers that do not fit together.
    """
    check_choices(cfg)
    stem_name, size, patch = parse(cfg)
    if min(size.width, size.depth, size.heads, size.mlp, patch) < 1:
        raise UserError(f"{size}, patch {patch}: each must be at least 1")
    if cfg.classes < 0:
        raise UserError(f"model.classes={cfg.classes} must be at least 0 (0: no head)")
    if size.width % size.heads:
        raise UserError(f"model width {size.width} is not divisible by {size.heads} heads")
    if cfg.posemb == "sincos2d" and size.width % 4:
        raise UserError(f"model.posemb=sincos2d needs a width divisible by 4, not {size.width}")
    pool_heads, pool_mlp = cfg.pool_heads or size.heads, cfg.pool_mlp or size.mlp
    if pool_heads < 1 or pool_mlp < 1 or size.width % pool_heads:
        raise UserError(
            f"model.pool_heads={pool_heads} must divide the width {size.width}, and pool_mlp="
            f"{pool_mlp} be at least 1"
        )
    rotary.check(cfg, size.width // size.heads)
    for axis, pixels in zip(("height", "width"), image, strict=True):
        if pixels % patch and not cfg.nearest_grid:
            raise UserError(
                f"image {axis} {pixels} is not divisible by the patch size {patch}: change "
                "data.resolution, or set model.nearest_grid=True to resize images in the model"
            )
    grid = (round(image[0] / patch), round(image[1] / patch))
    if min(grid) < 2:
        raise UserError(
            f"{image[0]} x {image[1]} pixels with patch size {patch} give a grid of {grid[0]} x "
            f"{grid[1]} patches, not at least 2 x 2: raise data.resolution or use smaller patches"
        )
    stem = stems.stem(stem_name, patch, size.width) if stem_name else None
    return Shape(
        *(size, patch, grid, cfg.pool, stem, cfg.distilled, cfg.representation),
        class_token=cfg.pool in ("cls", "cls_gap") or cfg.class_token,
        fc_norm=cfg.fc_norm,
        registers=cfg.registers,
    )


def parse(cfg: ConfigDict) -> tuple[str, Size, int]:
    """Parse STEM+SIZE/PATCH or SIZE/PATCH and the overrides into (stem or "", size, patch)."""
    if cfg.variant == SOURCE:
        raise UserError("model.variant=source is the architecture of init.source: set init.source")
    match = re.fullmatch(r"(?:(\w+)\+)?(\w+\+?)/(\d+)", cfg.variant)
    if not match or match[2] not in SIZES:
        name = cfg.variant.split("/")[0].rpartition("+")[2]
        hint = nearest(name, [*SIZES, *convnets.SIZES])
        raise UserError(f"model.variant={cfg.variant!r} is not SIZE/PATCH such as S/16; {hint}")
    if match[1] and match[1] not in stems.STEMS:
        hint = nearest(match[1], stems.STEMS)
        raise UserError(f"model.variant={cfg.variant!r}: unknown stem {match[1]!r}; {hint}")
    fields = ("width", "depth", "heads", "mlp", "swiglu")
    overrides = {field: cfg[field] for field in fields if cfg[field] is not None}
    return match[1] or "", dataclasses.replace(SIZES[match[2]], **overrides), int(match[3])


def check_choices(cfg: ConfigDict) -> None:
    """Raise UserError for fields with unknown values, or values that exclude each other."""
    for field, valid in CHOICES.items():
        if cfg[field] not in valid:
            raise UserError(
                f"model.{field}={cfg[field]!r} is unknown; {nearest(cfg[field], valid)}"
            )
    if cfg.distilled and not cfg.classes:
        raise UserError("model.distilled=True is a second head: it needs model.classes above 0")
    if cfg.distilled and cfg.pool != "cls":
        raise UserError(f"model.distilled=True needs pool=cls, not {cfg.pool}")
    if cfg.class_token and cfg.pool not in ("gap", "map"):
        raise UserError(f"model.class_token=True needs pool=gap or map, not {cfg.pool}")
    if cfg.fc_norm and cfg.pool != "gap":
        raise UserError(f"model.fc_norm=True needs pool=gap, not {cfg.pool}")
    if cfg.fc_norm and not cfg.final_norm:
        raise UserError("model.fc_norm=True is the final norm: it needs model.final_norm=True")
    if cfg.logits != "float32" and cfg.attention != "xla":
        raise UserError(f"model.logits={cfg.logits} needs attention=xla, not {cfg.attention}")
    if cfg.representation < 0 or not 0 < cfg.norm_epsilon < math.inf:
        raise UserError(
            f"model.representation={cfg.representation} must be at least 0, and "
            f"model.norm_epsilon={cfg.norm_epsilon} above 0"
        )
    for field in ("layer_scale", "registers"):
        if not 0 <= cfg[field] < math.inf:
            raise UserError(f"model.{field}={cfg[field]} must be at least 0 (0: off)")
    for field in ("dropout", "drop_path", "patch_drop"):
        if not 0 <= cfg[field] < 1:
            raise UserError(f"model.{field}={cfg[field]} must be at least 0 and below 1")

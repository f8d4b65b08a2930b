"""The config that other people's weights come to, and what had to be believed of it.

What the arrays tell (sizes, heads, pooling) is taken from them, what they don't from what stands
beside them, else from the dialect's convention; each thing believed is handed on, to be said.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.spec import SIZES
from vit_scale.pretrained import metadata, position_tables
from vit_scale.pretrained.key_mapping import (
    BLOCK,
    POSITIONS,
    Arrays,
    WeightFormat,
    read,
    rules_of,
    scaled,
)
from vit_scale.pretrained.metadata import About
from vit_scale.pretrained.param_trees import some
from vit_scale.pretrained.position_tables import Positions, Sizes

RESOLUTION = 224  # pixels, where positions are not stored and nobody says
# Fields that a file may leave open: said where the dialect's convention decides them.
CONVENTIONS = ("model.gelu", "model.norm_epsilon", "augment.mean", "augment.std")
VIEW = ("eval.fit", "eval.crop", "eval.resample")
Size = tuple[int, int]


class Hints(NamedTuple):
    """What to believe where neither the arrays nor what stands beside them tells."""

    format: str = ""
    heads: int | None = None
    trained_size: Size | None = None  # height and width in pixels that the weights were trained at
    requested_size: Size | None = None  # trained_size if it fits, else target_size
    target_size: Size | None = None  # that they are to be used at
    tree: str = ""  # of several models in a file, the one that is meant


NO_HINTS = Hints()


def hints_from_config(cfg: ConfigDict, heads: int | None = None) -> Hints:
    """What a config's init block says of a source. Raises UserError for a size that is none."""
    text, image = cfg.init.image, None
    if text:
        numbers = re.fullmatch(r"(\d+)x(\d+)", text)
        if not numbers:
            raise UserError(f"init.image={text!r} is not HEIGHTxWIDTH in pixels, such as 224x256")
        image = (int(numbers[1]), int(numbers[2]))
    return Hints(cfg.init.dialect, heads, image, tree=cfg.init.tree)


class Configured(NamedTuple):
    """The config that weights come to, how their positions lie, and what was believed of them."""

    cfg: ConfigDict
    before: int  # rows of positions of other tokens than patches
    assumed: tuple[str, ...]


def simplified(dialect: WeightFormat, arrays: Arrays) -> tuple[Arrays, list[str]]:
    """The same function in the arrays that our models have, and a line about each change."""
    depth, lines = depth_of(dialect, arrays), []
    arrays = _one_norm(dialect, arrays)
    arrays, scales = scaled(dialect, arrays, depth)
    if scales:
        lines.append(f"LayerScale is multiplied into the layers before it: {scales} arrays")
    rules = [r for r in rules_of(dialect, depth) if re.search(r"(query|key|value)/bias", str(r))]
    heads = [r for r in rules_of(dialect, 1) if r.parts[0] in ("head/kernel", "head/bias")]
    weight, bias = (rule.theirs for rule in heads)
    head = arrays.get(weight)
    if bias not in arrays and head is not None and head.ndim == 2:
        outputs = head.shape[0] if heads[0].layout == "linear" else head.shape[1]
        arrays[bias] = np.zeros(outputs, np.float32)
        lines.append("the head has no bias: it is zero")
    absent = [rule for rule in rules if rule.parts[0].startswith("blocks/")]
    if absent and not any(rule.theirs in arrays for rule in absent):  # qkv_bias=False
        kernels = {rule.parts[0]: rule.theirs for rule in rules_of(dialect, depth)}
        for rule in absent:
            kernel = arrays.get(kernels[rule.parts[0].replace("bias", "kernel")])
            if kernel is not None and kernel.ndim == 2:
                arrays[rule.theirs] = np.zeros(len(kernel), np.float32)
        lines.append("queries, keys and values have no biases: they are zero")
    return arrays, lines


def _one_norm(dialect: WeightFormat, arrays: Arrays) -> Arrays:
    """The arrays with a norm after pooling named as the one before it. Raises UserError."""
    if not dialect.fc_norm or f"{dialect.fc_norm[0]}.weight" not in arrays:
        return arrays
    after, before = dialect.fc_norm
    if f"{before}.weight" in arrays:
        raise UserError(f"it has {before} before pooling and {after} after it: no model here does")
    pattern = rf"^{after}\."
    return {re.sub(pattern, f"{before}.", name): array for name, array in arrays.items()}


def configure(
    dialect: WeightFormat, arrays: Arrays, known: About, hints: Hints, names: frozenset[str]
) -> Configured:
    """The config of the model that these arrays are of, and that had these names in the file.

    Raises UserError.
    """
    first = _first(dialect, arrays)
    patch, width = first["embed/kernel"].shape[1::2]
    mlp = first["blocks/0/mlp/up/kernel"].shape[1]
    depth = depth_of(dialect, arrays)
    heads, assumed = _heads(dialect, first, known, hints, (width, depth, mlp))
    for name, size in (("width", width), ("depth", depth)):
        if known.sizes.get(name) not in (None, size):
            raise UserError(
                f"config.json beside it says {name} {known.sizes[name]}, and its arrays are of "
                f"{name} {size}: they are of two models"
            )
    cfg = config.base()
    cfg.model.update(metadata.variant(width, depth, heads, mlp, patch))
    cfg.model.update({**dialect.model, **known.model, "heads": cfg.model.heads})
    assumed += _pool(cfg, dialect, first, known, names)
    cfg.model.distilled = "dist" in first
    if "representation/bias" in first:
        cfg.model.representation = len(first["representation/bias"])
    cfg.model.classes = len(first["head/bias"]) if "head/bias" in first else 1
    pixels, view = known.library
    cfg.augment.update({**dialect.augment, **pixels, **known.augment})
    cfg.eval.update({**dialect.view, **view, **known.view})
    found = _positions(dialect, first, known, hints, patch, names)
    cfg.data.resolution = found.grid[0] * patch
    cfg.data.width = found.grid[1] * patch if found.grid[1] != found.grid[0] else None
    said = {f"{block}.{name}" for block in ("model", "augment") for name in getattr(known, block)}
    open_fields = [name for name in CONVENTIONS if name not in said]
    open_fields += [f for f in VIEW if f.removeprefix("eval.") not in known.view]
    given = config.fields(cfg)
    assumed += [f"{name}={given[name]}".replace(" ", "") for name in open_fields]
    return Configured(cfg, found.before, (*filter(None, [found.assumed]), *assumed))


def _pool(
    cfg: ConfigDict, dialect: WeightFormat, first: Arrays, known: About, names: frozenset[str]
) -> list[str]:
    """Set what the head reads; what was believed of it. Raises UserError."""
    said, cls = known.model.get("pool"), "cls" in first
    cfg.model.fc_norm = bool(dialect.fc_norm) and f"{dialect.fc_norm[0]}.weight" in names
    pool = "map" if "pool/probe" in first else "gap" if cfg.model.fc_norm or not cls else "cls"
    if said == "gap" and cls and pool == "cls":
        pool = "gap"
    if said not in (None, pool):
        raise UserError(
            f"it is pooled by {said}, and its arrays are those of pooling by {pool}: no model here "
            "does that"
        )
    if pool == "map" and cls:
        raise UserError("it has a [CLS] token and attention pooling: no model here has both")
    cfg.model.pool, cfg.model.class_token = pool, cls and pool == "gap"
    both = dialect.reads_both and cls and said is None and not cfg.model.fc_norm
    return ["the head reads [CLS] (model.pool=cls)"] if both else []


def _positions(
    dialect: WeightFormat,
    first: Arrays,
    known: About,
    hints: Hints,
    patch: int,
    names: frozenset[str],
) -> Positions:
    """The grid of patches, and how the rows of positions lie. Raises UserError."""
    if POSITIONS not in first:
        given = known.image or hints.trained_size or hints.requested_size
        size = given or hints.target_size or (RESOLUTION, RESOLUTION)
        nothing = "" if given else f"trained at {size[0]} x {size[1]} px"
        return Positions((size[0] // patch, size[1] // patch), 0, nothing)
    tokens = ("cls" in first) + ("dist" in first)
    before: tuple[int, ...] = (tokens,) if dialect.fused else (0,)
    if known.apart is not None:
        before = (0,) if known.apart else before
    elif tokens and dialect.apart:  # LayerScale is DINOv2's as well as DeiT III's
        surely, perhaps = (bool(re.search(mark, " ".join(names))) for mark in dialect.apart)
        before = (0,) if surely else (tokens, 0) if perhaps else before
    sizes = Sizes(known.image, hints.trained_size, hints.requested_size, hints.target_size)
    return position_tables.read(len(first[POSITIONS]), before, sizes, patch)


def _first(dialect: WeightFormat, arrays: Arrays) -> Arrays:
    """Our parameters outside the blocks and of the first, those that are there.

    Where heads are fused in an array, they are one head here.
    """
    first = read(dialect, arrays, 1, 1)
    rules = {name: rule.theirs for rule in rules_of(dialect, 1) for name in rule.parts}
    if POSITIONS in first and first[POSITIONS].ndim != 2:
        raise UserError(f"{rules[POSITIONS]} has the wrong shape, {arrays[rules[POSITIONS]].shape}")
    axes = {"embed/kernel": 4, "blocks/0/mlp/up/kernel": 2, "blocks/0/attention/query/kernel": 3}
    for name, count in axes.items():
        if name not in first:
            raise UserError(
                f"{rules[name]} is missing: it is damaged, or of another dialect than "
                f"{dialect.name}; it has {some(sorted(arrays))}"
            )
        if first[name].ndim != count:
            raise UserError(f"{rules[name]} has the wrong shape, {arrays[rules[name]].shape}")
    return first


def _heads(
    dialect: WeightFormat, first: Arrays, known: About, hints: Hints, size: tuple[int, int, int]
) -> tuple[int, list[str]]:
    """The arrays' axis of heads, else what is known of them, else those of such a size.

    And what was believed.
    """
    query = "blocks/0/attention/query/kernel"
    if any(rule.parts == (query,) and rule.layout == "same" for rule in rules_of(dialect, 1)):
        return first[query].shape[1], []
    if heads := known.model.get("heads"):
        return heads, []
    if hints.heads:
        return hints.heads, [f"{hints.heads} heads, as given"]
    for letter, usual in SIZES.items():
        if size == (usual.width, usual.depth, usual.mlp):
            other = "MoCo v3's has 12, " if letter == "S" else "otherwise "
            give = f"({other}give --config.model.heads)"
            return usual.heads, [f"{usual.heads} heads, as ViT-{letter} has {give}"]
    raise UserError(
        f"width {size[0]}, depth {size[1]} and MLP {size[2]} are no usual size, and nothing tells "
        "how many heads there are: give --config.model.heads to train or convert"
    )


def depth_of(dialect: WeightFormat, arrays: Mapping[str, Any]) -> int:
    patterns = [
        re.escape(rule.theirs).replace(re.escape(BLOCK), r"(\d+)")
        for rule in dialect.rules
        if BLOCK in rule.theirs
    ]
    found = (re.fullmatch(pattern, name) for pattern in patterns for name in arrays)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def names_of(dialect: WeightFormat, arrays: Mapping[str, Any]) -> set[str]:
    """Our names of what is there, outside the blocks and of the first."""
    return {name for rule in rules_of(dialect, 1) if rule.theirs in arrays for name in rule.parts}

"""Policies: which operations an image gets, how likely, and how strongly, by the name of a paper.

    rand-m9-mstd0.5-inc1    RandAugment in timm's grammar: m, n, p, mstd, mmax, inc
    randaug(2,10)           RandAugment as big_vision has it, by way of EfficientNet: layers, level
    original, originalr,    AutoAugment's ImageNet policy in timm's four readings;
      v0, v0r                 -mstd0.5 may follow
    3a                      3-Augment (DeiT-III): solarize, grey or blur
    trivialaugment          TrivialAugment as torchvision has it ("wide")
    autoaugment-imagenet,   AutoAugment as torchvision has it
      autoaugment-cifar10

A policy draws, for each layer, one of its operations and a level; a table says what argument the
level means. Rotated and shifted images are filled with `augment.mean` and interpolated by
`augment.resample` in timm's policies, with grey by the nearest pixel in big_vision's, with black by
the nearest in torchvision's.

RandAugment: Cubuk et al. 2020. AutoAugment: Cubuk et al. 2019. TrivialAugment: Müller and Hutter
2021. 3-Augment: Touvron et al. 2022.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from vit_scale.augment.autoaugment import CIFAR, EFFICIENTNET, IMAGENET
from vit_scale.errors import UserError, nearest

NAMES = (
    "rand-m9-mstd0.5-inc1",
    "randaug(2,10)",
    *("original", "originalr", "v0", "v0r", "3a"),
    *("trivialaugment", "autoaugment-imagenet", "autoaugment-cifar10"),
)


class Argument(NamedTuple):
    """An operation, and what a level means to it: base + sign * min(rate * level, cap)."""

    operation: str  # a key of operations.OPERATIONS
    rate: float = 0.0
    base: float = 0.0
    sign: int = 1  # 0: drawn
    rounding: str = ""  # of rate * level: "" | down | nearest
    cap: float = math.inf
    least: float = -math.inf  # of the argument
    spread: float = 0.0  # the argument is drawn, uniformly from `base` to base + spread


class Policy(NamedTuple):
    """A policy, to be drawn from: see `draw`.

    rows: float [r, layers, 3], or None. A row has (operation, probability, level) of each layer;
      an image gets one row. None: the layers are independent.
    """

    arguments: tuple[Argument, ...]
    layers: int
    chance: float = 1.0  # that a layer is applied, without rows
    level: float = 0.0  # without rows
    deviation: float = 0.0  # of the normal distribution around the level; inf: uniform below it
    highest: float = math.inf  # level
    bins: int = 0  # the level is drawn from 0 to bins - 1 instead
    rows: np.ndarray | None = None
    shuffled: bool = False  # every operation once, in a drawn order; or none of them
    interpolation: str = "nearest"  # nearest | bilinear | bicubic | random (of the latter two)
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def skips(self) -> bool:
        """Whether a layer may be left out."""
        return self.chance < 1 or self.rows is not None


def draw(policy: Policy, key: PRNGKeyArray) -> dict[str, Array]:
    """Draw one image's operations, arrays [layers].

    Returns:
      operation: int32, the number in policy.arguments, or -1 for none.
      argument: float32.
      numbers: float32 [layers, 2] in [0, 1), for operations that draw more.
    """
    chosen, chance, level, sign, more = jax.random.split(key, 5)
    k, count = policy.layers, len(policy.arguments)
    levels, chances = jnp.full(k, policy.level), jnp.full(k, policy.chance)
    applied = jax.random.uniform(chance, (k,))
    if policy.shuffled:
        operation, applied = jax.random.permutation(chosen, k), applied[:1]
    elif policy.rows is None:
        operation = jax.random.randint(chosen, (k,), 0, count)
    else:
        row = jnp.asarray(policy.rows)[jax.random.randint(chosen, (), 0, len(policy.rows))]
        operation, chances, levels = row[:, 0].astype(jnp.int32), row[:, 1], row[:, 2]
    if policy.bins:
        levels = jax.random.randint(level, (k,), 0, policy.bins).astype(jnp.float32)
    elif policy.deviation == math.inf:
        levels *= jax.random.uniform(level, (k,))
    elif policy.deviation:
        levels += policy.deviation * jax.random.normal(level, (k,))
    levels = jnp.clip(levels, 0, policy.highest)
    return {
        "operation": jnp.where(applied < chances, operation, -1),
        "argument": arguments(policy, operation, levels, jax.random.uniform(sign, (2, k))),
        "numbers": jax.random.uniform(more, (k, 2)),
    }


def arguments(
    policy: Policy, operation: Array, levels: Array, numbers: Float[Array, "2 k"]
) -> Float[Array, "k"]:
    """Return the arguments of operations at these levels.

    `numbers`, in [0, 1), draw the sign and the spread of each.
    """
    columns = zip(*(argument[1:] for argument in policy.arguments), strict=True)
    rate, base, sign, rounding, cap, least, spread = columns
    offset = jnp.array([{"": 0.0, "down": 0.0, "nearest": 0.5}[r] for r in rounding])

    def of(column) -> Array:
        return jnp.asarray(np.array(column, np.float32))[operation]

    strength = of(rate) * levels
    whole = jnp.floor(strength + offset[operation])
    strength = jnp.where(of([bool(r) for r in rounding]) > 0, whole, strength)
    drawn = jnp.where(numbers[0] < 0.5, 1.0, -1.0)
    signed = jnp.where(of(sign) == 0, drawn, of(sign)) * jnp.minimum(strength, of(cap))
    return jnp.maximum(of(base) + signed, of(least)) + of(spread) * numbers[1]


def make(cfg: ConfigDict, size: tuple[int, int]) -> list[Policy]:
    """Return the policies of a config's augment block for images of `size` = (H, W), in order.

    These are augment.policy, jitter, grey, blur and solarize, as far as they are on.

    Raises UserError for an unknown policy.
    """
    made = [_named(cfg, size)] if cfg.policy else []
    if any(cfg.jitter):
        names = ("brightness", "contrast", "colour")
        strengths = [
            Argument(name, base=max(0.0, 1 - strength), spread=min(1.0, strength) + strength)
            for name, strength in zip(names, cfg.jitter, strict=False)
        ]
        strengths += [Argument("hue", base=-h, spread=2 * h) for h in cfg.jitter[3:]]
        used = tuple(s for s in strengths if s.spread)
        made.append(Policy(used, len(used), chance=cfg.jitter_chance, shuffled=True))
    extras = {
        "grey": Argument("grey"),
        "blur": Argument("blur", base=0.1, spread=1.9),
        "solarize": Argument("solarize", base=128.0),
    }
    return made + [Policy((extras[n],), 1, chance=cfg[n]) for n in extras if cfg[n]]


def _named(cfg: ConfigDict, size: tuple[int, int]) -> Policy:
    name = cfg.policy
    if name in ("trivialaugment", "autoaugment-imagenet", "autoaugment-cifar10"):
        return _torchvision(name, size)
    if match := re.fullmatch(r"randaug\((\d+), ?(\d+)\)", name):
        return _big_vision(int(match[1]), int(match[2]))
    kind, *options = name.split("-")
    if kind not in ("rand", "original", "originalr", "v0", "v0r", "3a"):
        raise UserError(f"augment.policy={name!r} is unknown; {nearest(name, NAMES)}")
    if cfg.resample == "lanczos":
        raise UserError(
            f"augment.resample=lanczos can't rotate images: augment.policy={name} needs bilinear, "
            "bicubic or random"
        )
    policy = _timm(kind, _options(name, kind, options), size)
    red, green, blue = (min(255.0, float(round(255 * mean))) for mean in cfg.mean)
    return policy._replace(interpolation=cfg.resample, fill=(red, green, blue))


def _options(name: str, kind: str, options: list[str]) -> dict[str, float]:
    """Parse "m9", "mstd0.5", ..., the parts of timm's names."""
    known = ("m", "n", "p", "mstd", "mmax", "inc") if kind == "rand" else ("mstd",)
    values = {}
    for option in options:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", option)
        if not match or match[1] not in known:
            raise UserError(
                f"augment.policy={name!r}: {option!r} is not one of {', '.join(known)}, "
                "followed by a number"
            )
        values[match[1]] = float(match[2])
    return values


def _geometry(rotate: float, shear: float, x: float, y: float, rounding: str = "") -> dict:
    """Return the geometric operations: degrees, shear and pixels a level, in a drawn direction."""
    return {
        "rotate": Argument("rotate", rotate, sign=0),
        "shear_x": Argument("shear_x", shear, sign=0),
        "shear_y": Argument("shear_y", shear, sign=0),
        "translate_x": Argument("translate_x", x, sign=0, rounding=rounding),
        "translate_y": Argument("translate_y", y, sign=0, rounding=rounding),
    }


def _enhanced(rate: float, **settings) -> dict[str, Argument]:
    names = ("colour", "contrast", "brightness", "sharpness")
    return {name: Argument(name, rate, **settings) for name in names}


PLAIN = {name: Argument(name) for name in ("autocontrast", "equalize", "invert")}


def _timm(kind: str, options: dict[str, float], size: tuple[int, int]) -> Policy:
    """Return a policy as timm's `auto_augment_transform` and `rand_augment_transform` make it."""
    increasing = kind.endswith("r") or bool(options.get("inc"))
    table = PLAIN | _geometry(3.0, 0.03, 0.045 * size[1], 0.045 * size[0])
    table |= _enhanced(0.18, base=0.1)
    posterize = Argument("posterize", 0.4, rounding="down")
    solarize = Argument("solarize", 25.6, rounding="down", cap=256)
    if increasing:
        posterize = posterize._replace(base=4.0, sign=-1)
    if options.get("inc"):
        solarize = solarize._replace(base=256.0, sign=-1)
        table |= _enhanced(0.09, base=1.0, sign=0, least=0.1)
    if kind == "original":
        posterize = posterize._replace(base=4.0)
    table |= {"posterize": posterize, "solarize": solarize}
    table["solarize_add"] = Argument("solarize_add", 11.0, rounding="down", cap=128)
    deviation = options.get("mstd", 0.0)
    noise: dict[str, Any] = {"deviation": deviation, "highest": options.get("mmax", 10.0)}
    if kind == "3a":
        table["grey"] = Argument("grey")
        table["blur"] = Argument("blur", base=0.1, spread=1.9)
        return _of_rows("solarize 1 5\ngrey 1 10\nblur 1 10", table, **noise)
    if kind != "rand":
        return _of_rows(EFFICIENTNET if kind in ("v0", "v0r") else IMAGENET, table, **noise)
    if deviation > 100:
        noise["deviation"] = math.inf
    return Policy(
        tuple(table[name] for name in RAND),
        int(options.get("n", 2)),
        chance=options.get("p", 0.5),
        level=options.get("m", 10.0),
        **noise,
    )


def _big_vision(layers: int, level: int) -> Policy:
    """Return RandAugment as EfficientNet's code for TPUs has it.

    Levels are stored in 8 bits there: solarize's threshold of 256, at level 10, is 0, and inverts;
    posterize keeps at least one bit.
    """
    if layers < 1 or level > 20:
        raise UserError(
            f"augment.policy='randaug({layers},{level})' needs at least one layer and a level of "
            "at most 20: posterize can't keep more than 8 bits"
        )
    table = PLAIN | _geometry(3.0, 0.03, 10.0, 10.0) | _enhanced(0.18, base=0.1)
    table |= {
        "posterize": Argument("posterize", 0.4, rounding="down", least=1),
        "solarize": Argument("solarize", base=int(level / 10 * 256) % 256),
        "solarize_add": Argument("solarize_add", 11.0, rounding="down"),
        "cutout": Argument("cutout", 4.0, rounding="down"),
    }
    for name in ("colour", "contrast", "sharpness", "shear_x", "shear_y"):
        table[name] = table[name]._replace(operation=f"{name}_tf")
    names = (*RAND, "cutout")
    return Policy(tuple(table[name] for name in names), layers, level=level, fill=(128.0,) * 3)


def _torchvision(name: str, size: tuple[int, int]) -> Policy:
    """Return TrivialAugmentWide or AutoAugment as torchvision has them.

    The levels are numbers of equal steps: 30 to the strongest in TrivialAugment, 9 in AutoAugment.
    Its 15th step translates by 15 pixels there, where 16 is 15.999999 in float32; here by 16.
    """
    if name == "trivialaugment":
        steps, bits, degrees, shear, most = 30, 6, 135.0, 0.99, 0.99
        down, across = 32.0, 32.0
    else:
        steps, bits, degrees, shear, most = 9, 4, 30.0, 0.3, 0.9
        down, across = (150 / 331 * side for side in size)
    table = PLAIN | _geometry(
        degrees / steps, shear / steps, across / steps, down / steps, rounding="down"
    )
    table |= _enhanced(most / steps, base=1.0, sign=0)
    table |= {
        "posterize": Argument("posterize", bits / steps, 8.0, -1, rounding="nearest"),
        "solarize": Argument("solarize", 255 / steps, 255.0, -1),
        "identity": Argument("identity"),
    }
    if name == "trivialaugment":
        names = [n for n in RAND if n not in ("invert", "solarize_add")]
        names = ["identity", *names]
        return Policy(tuple(table[n] for n in names), 1, bins=steps + 1)
    return _of_rows(CIFAR if name.endswith("cifar10") else IMAGENET, table)


def _of_rows(text: str, table: dict[str, Argument], **settings: Any) -> Policy:
    """Return the policy of a table: a line has (operation, probability, level) for each layer."""
    lines = [line.split() for line in text.strip().splitlines()]
    layers = len(lines[0]) // 3
    used = sorted({name for line in lines for name in line[::3]})
    rows = [
        [used.index(word) if i % 3 == 0 else float(word) for i, word in enumerate(line)]
        for line in lines
    ]
    shaped = np.array(rows, np.float32).reshape(len(lines), layers, 3)
    return Policy(tuple(table[name] for name in used), layers, rows=shaped, **settings)


RAND = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add"),
    *("colour", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)

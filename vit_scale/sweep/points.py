"""The points of a sweep: which values of which fields each run has."""

import hashlib
import itertools
import math
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_scale import config
from vit_scale.errors import USAGE, UserError, nearest

Point = dict[str, str]  # {"optim.lr": "3e-4"}, as it is typed after --config.
LONGEST_NAME = 120  # characters; file systems allow 255 bytes
MOST_DRAWS = 1000  # in a row that are drawn already


class Space(NamedTuple):
    """What the points are drawn from; the fields of the three don't overlap.

    `grid` maps fields to their values, `uniform` and `log_uniform` to the lowest and highest.
    """

    grid: Mapping[str, Sequence[str]]
    uniform: Mapping[str, tuple[float, float]]
    log_uniform: Mapping[str, tuple[float, float]]

    @property
    def fields(self) -> list[str]:
        return [*self.grid, *self.uniform, *self.log_uniform]


def split_values(text: str) -> list[str]:
    """Split "1e-3,(0.3,1.0)" at the commas outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def make_space(grid: Sequence[str], uniform: Sequence[str], log_uniform: Sequence[str]) -> Space:
    """Parse FIELD=VALUE,VALUE and FIELD=LOW,HIGH. Raises UserError."""
    parsed: list[dict[str, Any]] = [
        dict(map(_parse, items)) for items in (grid, uniform, log_uniform)
    ]
    names = [item.partition("=")[0] for item in (*grid, *uniform, *log_uniform)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{twice[0]} is given twice: give all of its values at once", USAGE)
    for name, values in parsed[1].items():
        parsed[1][name] = _bounds(name, values, -math.inf)
    for name, values in parsed[2].items():
        parsed[2][name] = _bounds(name, values, 0)
    return Space(*parsed)


def _parse(item: str) -> tuple[str, list[str]]:
    name, _, text = item.partition("=")
    fields = config.fields(config.base())
    if name not in fields:
        raise UserError(f"no config field is named {name!r}; {nearest(name, fields)}", USAGE)
    values = split_values(text)
    if not text or len(set(values)) < len(values):
        raise UserError(f"{item} must be FIELD=VALUE,VALUE with different values", USAGE)
    return name, values


def _bounds(name: str, values: Sequence[str], above: float) -> tuple[float, float]:
    message = f"{name}={','.join(values)} must be two numbers, LOW,HIGH, with LOW < HIGH"
    try:
        low, high = map(float, values)
    except ValueError:
        raise UserError(message, USAGE) from None
    if not above < low < high < math.inf:
        raise UserError(f"{message}{'' if above else ' and both above 0'}", USAGE)
    return low, high


def make_points(space: Space, count: int | None = None, seed: int = 0) -> list[Point]:
    """Return all points of the grid, or `count` different ones, drawn at random.

    The first draws don't depend on `count`: a larger one adds points. Raises UserError for ranges
    without a count, and for more points than the grid has.
    """
    size = math.prod(len(values) for values in space.grid.values())
    ranges = {**space.uniform, **space.log_uniform}
    if count is None:
        if ranges:
            raise UserError(
                f"{next(iter(ranges))} is drawn from a range: give --random N, the number of runs",
                USAGE,
            )
        rows = itertools.product(*space.grid.values())
        return [dict(zip(space.grid, row, strict=True)) for row in rows]
    if not ranges and count > size:
        raise UserError(f"--random {count} is more than the {size} points of the grid", USAGE)
    points: list[Point] = []
    generator, repeated = np.random.default_rng(seed), 0
    while len(points) < count:
        point = _draw(space, generator)
        repeated = repeated + 1 if point in points else 0
        if repeated > MOST_DRAWS and not ranges:  # almost the whole grid: the rest in order
            points += [point for point in make_points(space) if point not in points]
            return points[:count]
        if repeated > MOST_DRAWS:
            raise UserError(f"--random {count}: there are only about {len(points)} points", USAGE)
        if not repeated:
            points.append(point)
    return points


def _draw(space: Space, generator: np.random.Generator) -> Point:
    point = {
        name: values[int(generator.integers(len(values)))] for name, values in space.grid.items()
    }
    for name, (low, high) in space.uniform.items():
        point[name] = _number(generator.uniform(low, high), name, low, high)
    for name, (low, high) in space.log_uniform.items():
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
        point[name] = _number(value, name, low, high)
    return point


def _number(value: float, field: str, low: float, high: float) -> str:
    """Return a number of a range as text: an integer where the field is one, or three digits.

    More digits where three are coarse for the range, or leave it.
    """
    if is_integer(field):
        return str(round(value))
    for digits in range(3, 17):
        text = f"{value:.{digits}g}"
        if low <= float(text) <= high and abs(float(text) - value) <= (high - low) / 200:
            return text
    return repr(value)


def is_integer(field: str) -> bool:
    """Return whether a config field is an integer."""
    *blocks, name = field.split(".")
    owner = config.base()
    for block in blocks:
        owner = owner[block]
    return owner.get_type(name) is int


def run_name(point: Point) -> str:
    """Return the name of a point's folder: "optim.lr=1e-3,model.width=128"."""
    name = ",".join(f"{field}={value}" for field, value in point.items())
    name = "".join("-" if letter in "/\\ :" else letter for letter in name)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 2]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def train_arguments(
    name: str, overrides: Sequence[str], point: Point, folder: pathlib.Path
) -> list[str]:
    """Return the arguments of `vit-scale train` for a point's run."""
    fields = [*overrides, *(f"{field}={value}" for field, value in point.items())]
    return ["--config", name, *(f"--config.{one}" for one in fields), "--workdir", str(folder)]


def train_command(prefix: str, arguments: Sequence[str], number: int) -> str:
    """Return a command line of a run; `{number}` in `prefix` is the run's number, from 0."""
    return f"{prefix.replace('{number}', str(number))} {shlex.join(arguments)}"

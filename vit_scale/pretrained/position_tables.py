"""Which grid of patches a table of positions is of, and which of its rows are other tokens'.

Others store a table as rows: perhaps one of [CLS] and of a distillation token, then the patches',
row by row. Neither the grid nor the first rows are marked, so a wrong guess scrambles an image
without a word. Hence: the tokens follow from the other names of the file, the grid from the size
that stands beside it, else from the size that is given, else it is a square, which is said; what
can be read in two ways is refused with both.
"""

import math
from typing import NamedTuple

from vit_scale.errors import UserError

Size = tuple[int, int]
GIVE = "give --config.init.image=HEIGHTxWIDTH, at which it was trained, to convert or train"


class Sizes(NamedTuple):
    """Sizes in pixels (height, width) that are known; None where they are not."""

    stored: Size | None = None  # stands beside the weights
    trained: Size | None = (
        None  # was given as the one that they were trained at, and as nothing else
    )
    requested: Size | None = None  # was given; it may also be meant as one to resample to
    target: Size | None = None  # they are to be used at, which may be another one


class Positions(NamedTuple):
    grid: Size
    before: int  # rows of other tokens than patches, which come first
    assumed: str = ""  # what was believed of it, where nothing says it


def read(rows: int, before: tuple[int, ...], sizes: Sizes, patch: int) -> Positions:
    """The grid of a table of so many rows.

    `before` are the numbers of other tokens that may have a row, the format's own first. Raises
    UserError with the readings where there is none or more than one.
    """
    for size, counts in (
        (sizes.stored, (*before, 0)),  # [CLS] may have no row: one size fits one reading only
        (sizes.trained, (*before, 0)),
        (sizes.requested, before),
    ):
        if size and (found := _matching(rows, counts, _grid(size, patch))) is not None:
            square = math.isqrt(rows - found) ** 2 == rows - found
            other = size is sizes.requested and square and size[0] != size[1]
            text = f"{_text(rows, found, _grid(size, patch))}, the size given"
            return Positions(_grid(size, patch), found, text if other else "")
    squares = [
        (math.isqrt(rows - count), count)
        for count in before
        if rows > count and math.isqrt(rows - count) ** 2 == rows - count
    ]
    wanted = _grid(sizes.target, patch) if sizes.target else None
    matching = _matching(rows, before, wanted) if wanted else None
    readings = {_text(rows, count, (side, side)): (side, count) for side, count in squares}
    if wanted and matching is not None and (wanted[0], matching) not in readings.values():
        if not squares:
            return Positions(wanted, matching, _text(rows, matching, wanted))
        readings[_text(rows, matching, wanted)] = (0, 0)
    elif squares and squares[0][1] != before[0] and matching is None:
        # No square in the format's own reading: another grid is as likely as another reading.
        readings[f"{rows} positions are of {_others(before[0])}a grid that is no square"] = (0, 0)
    if len(readings) != 1:
        raise UserError(_refusal(rows, before, list(readings), sizes, patch))
    ((text, (side, count)),) = readings.items()
    if sizes.stored:
        h, w = _grid(sizes.stored, patch)
        text = f"{text} although the size beside the file is of {h} x {w}"
    return Positions((side, side), count, text)


def _grid(size: Size, patch: int) -> Size:
    return size[0] // patch, size[1] // patch


def _matching(rows: int, before: tuple[int, ...], grid: Size) -> int | None:
    """How many other tokens have a row, where the rest is of this grid."""
    return next((count for count in before if math.prod(grid) + count == rows), None)


def _others(count: int) -> str:
    return f"{count} other token{'s' * (count > 1)} and " if count else ""


def _text(rows: int, count: int, grid: Size) -> str:
    return f"{rows} positions are of {_others(count)}{grid[0]} x {grid[1]} patches"


def _refusal(
    rows: int, before: tuple[int, ...], readings: list[str], sizes: Sizes, patch: int
) -> str:
    if readings:
        return f"it can be read in two ways: {', or '.join(readings)}; {GIVE}"
    counts = " or ".join(f"{rows - count} patches" for count in before)
    tried = [size for size in sizes if size]
    grids = [f"{h} x {w} px is {h // patch} x {w // patch} patches" for h, w in tried]
    return (
        f"{rows} positions are of {counts}, which is no square grid"
        f"{''.join(f'; {grid}' for grid in grids)}; {GIVE}"
    )

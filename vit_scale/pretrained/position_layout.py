"""Infer the patch grid of stored position embeddings, and which rows belong to other tokens.

Libraries store one row per token: perhaps [CLS] and the distillation token, then the patches in
row-major order. A file marks neither, and a wrong guess silently scrambles the image. So the number
of leading rows follows from the file's keys; the grid follows from the size in the metadata, else
from the size that the user gives, else a square is assumed, with a note. Rows that fit two layouts
raise an error that names both.
"""

import math
from typing import NamedTuple

from vit_scale.errors import UserError
from vit_scale.pretrained.hints import Size

SET_IMAGE = "set --config.init.image=HEIGHTxWIDTH to the size in pixels that they were trained at"


class KnownSizes(NamedTuple):
    """Image sizes in pixels (height, width) that are known; None where they are not."""

    stored: Size | None = None  # in the metadata beside the weights
    trained: Size | None = None  # from the user: the size the weights were trained at
    requested: Size | None = None  # from the user: trained at it, or to be resampled to it
    target: Size | None = None  # the size the weights will be used at


class PositionLayout(NamedTuple):
    grid: Size
    leading: int  # rows of [CLS] and the distillation token, before those of the patches
    assumption: str = ""  # what was assumed, if the layout is not stated anywhere


def infer_position_layout(
    rows: int, leading: tuple[int, ...], sizes: KnownSizes, patch: int
) -> PositionLayout:
    """Infer the layout of `rows` position embeddings, for patches of `patch` pixels.

    `leading` holds the possible numbers of leading rows, the format's usual one first. Raises
    UserError, with the candidates, unless exactly one layout fits.
    """
    if layout := _from_known_size(rows, leading, sizes, patch):
        return layout
    squares = [
        (math.isqrt(rows - count), count)
        for count in leading
        if rows > count and math.isqrt(rows - count) ** 2 == rows - count
    ]
    target = _grid(sizes.target, patch) if sizes.target else None
    target_leading = _leading_for(rows, leading, target) if target else None
    candidates = {_text(rows, count, (side, side)): (side, count) for side, count in squares}
    if target and target_leading is not None:
        if (target[0], target_leading) not in candidates.values():
            text = _text(rows, target_leading, target)
            if not squares:
                return PositionLayout(target, target_leading, text)
            candidates[text] = (0, 0)
    elif squares and squares[0][1] != leading[0]:
        # No square with the usual leading rows: a grid that is not square is just as likely.
        candidates[
            f"{rows} position embeddings for {_others(leading[0])}a grid that is not square"
        ] = (0, 0)
    if len(candidates) != 1:
        raise UserError(_no_single_layout(rows, leading, list(candidates), sizes, patch))
    ((text, (side, count)),) = candidates.items()
    if sizes.stored:
        h, w = _grid(sizes.stored, patch)
        text = f"{text}, although the size beside the file gives {h} x {w}"
    return PositionLayout((side, side), count, text)


def _from_known_size(
    rows: int, leading: tuple[int, ...], sizes: KnownSizes, patch: int
) -> PositionLayout | None:
    """The layout of the first size that the rows fit, of those that may be the trained one."""
    for size, counts in (
        (sizes.stored, (*leading, 0)),  # given a size, [CLS] may lack a row: only one can fit
        (sizes.trained, (*leading, 0)),
        (sizes.requested, leading),
    ):
        if not size:
            continue
        grid = _grid(size, patch)
        count = _leading_for(rows, counts, grid)
        if count is None:
            continue
        square = math.isqrt(rows - count) ** 2 == rows - count
        ambiguous = size is sizes.requested and square and size[0] != size[1]
        text = f"{_text(rows, count, grid)}, the size given"
        return PositionLayout(grid, count, text if ambiguous else "")
    return None


def _grid(size: Size, patch: int) -> Size:
    return size[0] // patch, size[1] // patch


def _leading_for(rows: int, leading: tuple[int, ...], grid: Size) -> int | None:
    """The number of leading rows with which the other rows fill this grid; None if none does."""
    return next((count for count in leading if math.prod(grid) + count == rows), None)


def _others(count: int) -> str:
    return f"{count} other token{'s' * (count > 1)} and " if count else ""


def _text(rows: int, leading: int, grid: Size) -> str:
    return f"{rows} position embeddings for {_others(leading)}{grid[0]} x {grid[1]} patches"


def _no_single_layout(
    rows: int, leading: tuple[int, ...], candidates: list[str], sizes: KnownSizes, patch: int
) -> str:
    if candidates:
        return f"the position embeddings are ambiguous: {', or '.join(candidates)}; {SET_IMAGE}"
    counts = " or ".join(f"{rows - count} patches" for count in leading)
    tried = [size for size in sizes if size]
    grids = [f"{h} x {w} px is {h // patch} x {w // patch} patches" for h, w in tried]
    return (
        f"{rows} position embeddings are for {counts}, which is not a square grid"
        f"{''.join(f'; {grid}' for grid in grids)}; {SET_IMAGE}"
    )

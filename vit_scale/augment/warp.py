"""Shear, translate and rotate one image as Pillow does.

A CPU or GPU gathers the pixels. A TPU gathers slowly and multiplies matrices quickly, so there
pixels are chosen by products with matrices of zeros and ones. The levels are the same, but for one
in a hundred, at most, that is truncated to the one below.

`cubic` is None for the nearest pixel, else whether to interpolate bicubically (a = -1) or
bilinearly. As in Pillow's Image.transform, the source's edge is repeated, levels are truncated, and
pixels that the source doesn't have get the colour `fill`, from 0 to 255.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

Cubic = Bool[Array, ""] | bool | None
Fill = tuple[float, float, float]
TILE = 32  # pixels; on a TPU a rotated image is made of tiles
WINDOW = 50  # pixels of each side that a tile reads: its diagonal, and the filter's four taps
FIXED = 65536  # Pillow finds the nearest pixel in 1/65536 of a pixel
NUDGE = 1 / 256  # of a level, before truncating: a flat area may come out just below its level


def slide_rows(
    image: UInt8[Array, "3 h w"], shifts: Float[Array, "h"], fill: Fill, cubic: Cubic
) -> UInt8[Array, "3 h w"]:
    """Return the image whose pixel (x, y) is the source's at (x + shifts[y], y).

    A single shift is that of all rows.
    """
    if cubic is None:
        shifts = jnp.floor(shifts * FIXED + 0.5) / FIXED
    by_products = slide_by_products if len(shifts) > 1 else translate_by_product
    return jax.lax.platform_dependent(
        image,
        shifts,
        tpu=lambda image, shifts: by_products(image, shifts, fill, cubic),
        default=lambda image, shifts: slide_by_gather(image, shifts, fill, cubic),
    )


def slide_columns(
    image: UInt8[Array, "3 h w"], shifts: Float[Array, "w"], fill: Fill, cubic: Cubic
) -> UInt8[Array, "3 h w"]:
    """Return the image whose pixel (x, y) is the source's at (x, y + shifts[x])."""
    return slide_rows(image.swapaxes(1, 2), shifts, fill, cubic).swapaxes(1, 2)


def rotate(
    image: UInt8[Array, "3 h w"], degrees: Float[Array, ""], fill: Fill, cubic: Cubic
) -> UInt8[Array, "3 h w"]:
    """Rotate counterclockwise about the centre."""
    return jax.lax.platform_dependent(
        image,
        jnp.radians(degrees),
        tpu=lambda image, angle: rotate_by_products(image, angle, fill, cubic),
        default=lambda image, angle: rotate_by_gather(image, angle, fill, cubic),
    )


def slide_by_gather(image, shifts, fill, cubic) -> UInt8[Array, "3 h w"]:
    """`slide_rows`, on a CPU or GPU."""
    _, h, w = image.shape
    x = jnp.arange(w) + shifts[:, None]
    inside = _inside(x, w, cubic)
    rows = jnp.arange(h)[:, None]
    levels = sum(weight * image[:, rows, column] for column, weight in _taps(x, w, cubic))
    return _levels(levels, inside, fill)


def rotate_by_gather(image, angle, fill, cubic) -> UInt8[Array, "3 h w"]:
    """`rotate`, on a CPU or GPU."""
    _, h, w = image.shape
    u, v = _rotated(jnp.arange(w), jnp.arange(h)[:, None], angle, (h, w), cubic)
    inside = _inside(u, w, cubic) & _inside(v, h, cubic)
    columns = _taps(u, w, cubic)
    levels = sum(
        row_weight * sum(weight * image[:, row, column] for column, weight in columns)
        for row, row_weight in _taps(v, h, cubic)
    )
    return _levels(levels, inside, fill)


def slide_by_products(image, shifts, fill, cubic) -> UInt8[Array, "3 h w"]:
    """`slide_rows`, on a TPU: one product a row."""
    w = image.shape[2]
    inside = _inside(jnp.arange(w) + shifts[:, None], w, cubic)
    whole = jnp.floor(shifts if cubic is not None else shifts + 0.5).astype(jnp.int32)
    sources = jnp.clip(whole[:, None] + jnp.arange(-1, w + 2), 0, w - 1)
    lines = jnp.einsum("yxu,cyu->cyx", _one_hot(sources, w), image.astype(jnp.bfloat16))
    lines = lines.astype(jnp.float32)
    if cubic is None:
        return _levels(lines[..., 1 : w + 1], inside, fill)
    weights = _filter(shifts - whole - jnp.arange(-1, 3)[:, None], cubic)[..., None]
    taps = jnp.stack([lines[..., i : i + w] for i in range(4)])
    return _levels((weights[:, None] * taps).sum(0), inside, fill)


def translate_by_product(image, shifts, fill, cubic) -> UInt8[Array, "3 h w"]:
    """`slide_rows` by one shift, on a TPU: one product with the matrix of the filter."""
    w = image.shape[2]
    x = jnp.arange(w) + shifts
    padded = jnp.pad(image, ((0, 0), (0, 0), (2, 2)), mode="edge").astype(jnp.float32)
    first = x if cubic is not None else jnp.floor(x + 0.5)
    matrix = _filter(first[:, None] + 2 - jnp.arange(w + 4), cubic)
    levels = jnp.einsum("xu,cyu->cyx", matrix, padded, precision="high")
    return _levels(levels, _inside(x, w, cubic), fill)


def rotate_by_products(image, angle, fill, cubic) -> UInt8[Array, "3 h w"]:
    """`rotate`, on a TPU: products for all tiles at once."""
    _, h, w = image.shape
    rows, columns = -(-h // TILE), -(-w // TILE)
    y, x = jnp.indices((rows * TILE, columns * TILE))
    y, x = (c.reshape(rows, TILE, columns, TILE).swapaxes(1, 2) for c in (y, x))
    y, x = (c.reshape(-1, TILE * TILE) for c in (y, x))  # n p
    u, v = _rotated(x, y, angle, (h, w), cubic)
    inside = _inside(u, w, cubic) & _inside(v, h, cubic)
    # Windows of the image, whose edge is repeated for the filter's outer taps.
    image = jnp.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge").astype(jnp.bfloat16)
    top, down = _window(v, h)
    left, right = _window(u, w)
    windows = jnp.einsum("nsv,cvu->ncsu", down, image)
    windows = jnp.einsum("ntu,ncsu->ncst", right, windows)
    v, u = (c - start for c, start in ((v, top), (u, left)))  # in windows
    *_, side_h, side_w = windows.shape
    down = _filter(v[..., None] - jnp.arange(side_h), cubic)
    across = _filter(u[..., None] - jnp.arange(side_w), cubic)
    if cubic is None:
        lines = jnp.einsum("nps,ncst->ncpt", down.astype(jnp.bfloat16), windows)
    else:
        lines = jnp.einsum("nps,ncst->ncpt", down, windows.astype(jnp.float32), precision="high")
    levels = (lines.astype(jnp.float32) * across[:, None]).sum(-1)
    levels = _levels(levels.swapaxes(0, 1), inside, fill)  # c n p
    levels = levels.reshape(3, rows, columns, TILE, TILE).swapaxes(2, 3)
    return levels.reshape(3, rows * TILE, columns * TILE)[:, :h, :w]


def _rotated(x: Array, y: Array, angle: Array, size: tuple[int, int], cubic: Cubic):
    """Return the source's (u, v) of the pixel (x, y), or the pixel nearest to it.

    A pixel's centre has whole coordinates.
    """
    middle_x, middle_y = (size[1] - 1) / 2, (size[0] - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    right = middle_x - cos * middle_x + sin * middle_y
    down = middle_y - sin * middle_x - cos * middle_y
    if cubic is None:
        numbers = (cos, sin, right + 0.5, down + 0.5)
        cos, sin, right, down = (jnp.floor(c * FIXED + 0.5).astype(jnp.int32) for c in numbers)
        return (cos * x - sin * y + right) >> 16, (sin * x + cos * y + down) >> 16
    return cos * x - sin * y + right, sin * x + cos * y + down


def _inside(position: Array, size: int, cubic: Cubic) -> Bool[Array, "..."]:
    return (position >= -0.5) & (position < size - 0.5)


def _taps(position: Float[Array, "..."], size: int, cubic: Cubic) -> list[tuple[Array, Array]]:
    """Return the pixels that a position is interpolated from, and their weights."""
    first = jnp.floor(position if cubic is not None else position + 0.5)
    taps = (0,) if cubic is None else (-1, 0, 1, 2)
    return [
        (
            jnp.clip(first + tap, 0, size - 1).astype(jnp.int32),
            jnp.ones(()) if cubic is None else _filter(position - first - tap, cubic),
        )
        for tap in taps
    ]


def _window(positions: Array, size: int) -> tuple[Array, Array]:
    """Return the start of each tile's window, and the rows (or columns) of the image in it.

    `size` is the image's without its repeated edge of two pixels.
    """
    length = min(WINDOW, size + 4)
    start = jnp.clip(jnp.floor(positions).min(1, keepdims=True) - 1, -2, size + 2 - length)
    start = start.astype(jnp.int32)
    return start, _one_hot(start + 2 + jnp.arange(length), size + 4)


def _one_hot(numbers: Int[Array, "... n"], size: int) -> Float[Array, "... n size"]:
    return (numbers[..., None] == jnp.arange(size)).astype(jnp.bfloat16)


def _filter(distance: Float[Array, "..."], cubic: Cubic) -> Float[Array, "..."]:
    """Return the weight of a pixel at this distance."""
    d = abs(distance)
    if cubic is None:
        return (d == 0).astype(jnp.float32)
    keys = jnp.where(d < 1, 1 - 2 * d**2 + d**3, jnp.where(d < 2, 4 - 8 * d + 5 * d**2 - d**3, 0))
    return jnp.where(cubic, keys, jnp.maximum(0, 1 - d))


def _levels(sums: Float[Array, "..."], inside: Bool[Array, "..."], fill: Fill) -> Array:
    """Truncate sums to levels, and fill what is outside of the source; the first axis is colour."""
    colours = jnp.array(fill).reshape(3, *(1,) * (sums.ndim - 1))
    return jnp.where(inside, jnp.clip(sums + NUDGE, 0, 255), colours).astype(jnp.uint8)

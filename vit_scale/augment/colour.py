"""Change the colours of one image as Pillow does: uint8 [3, h, w] to the same.

Each function equals Pillow's, to the level; where truncation decides, a blend may be one off, and
what a docstring names. Those that end in `_tf` are TensorFlow's where EfficientNet's code, and
big_vision's after it, differ from Pillow.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

Image = UInt8[Array, "3 h w"]
Number = Float[Array, ""]
NUDGE = 1 / 1024  # of a level, before truncating: a product of float32 may come out just below one


def invert(image: Image) -> Image:
    """Return 255 minus each level."""
    return 255 - image


def posterize(image: Image, bits: Number) -> Image:
    """Keep the `bits` highest bits of each level."""
    dropped = 8 - bits.astype(jnp.int32)
    return ((image.astype(jnp.int32) >> dropped) << dropped).astype(jnp.uint8)


def solarize(image: Image, threshold: Number) -> Image:
    """Invert the levels that are not below `threshold`."""
    return jnp.where(image < threshold, image, 255 - image)


def solarize_add(image: Image, addition: Number) -> Image:
    """Add to the levels below 128, up to 255."""
    added = jnp.minimum(image + addition, 255).astype(jnp.uint8)
    return jnp.where(image < 128, added, image)


def brightness(image: Image, factor: Number) -> Image:
    """Blend with black."""
    return _blend(jnp.zeros_like(image), image, factor)


def colour(image: Image, factor: Number) -> Image:
    """Blend with the image in grey."""
    return _blend(grey(image), image, factor)


def contrast(image: Image, factor: Number) -> Image:
    """Blend with the mean of the image in grey."""
    levels, pixels = grey(image)[0].astype(jnp.uint32), image[0].size
    mean = (2 * levels.sum() + pixels) // (2 * pixels)
    return _blend(jnp.full_like(image, mean), image, factor)


def sharpness(image: Image, factor: Number) -> Image:
    """Blend with the image smoothed by a kernel of 3 x 3 pixels, except for the outermost."""
    smooth = ((2 * _neighbourhood(image.astype(jnp.int32)) + 13) // 26).astype(jnp.uint8)
    return _blend(image.at[:, 1:-1, 1:-1].set(smooth), image, factor)


def autocontrast(image: Image) -> Image:
    """Stretch each channel's levels to 0 to 255.

    Pillow truncates a product in double precision, and may be one level lower.
    """
    low, high = (f(image, axis=(1, 2), keepdims=True).astype(jnp.int32) for f in (jnp.min, jnp.max))
    stretched = 255 * (image.astype(jnp.int32) - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched.astype(jnp.uint8), image)


def equalize(image: Image) -> Image:
    """Flatten each channel's histogram."""
    return jax.lax.platform_dependent(image, tpu=equalize_by_products, default=equalize_by_gather)


def equalize_by_gather(image: Image) -> Image:
    """`equalize`, on a CPU or GPU."""
    values = image.reshape(3, -1).astype(jnp.int32)
    counts = jax.vmap(lambda channel: jnp.bincount(channel, length=256))(values)
    table, step = _equalizing(counts)
    flat = jnp.take_along_axis(table, values, axis=1).reshape(image.shape)
    return jnp.where(step[..., None] == 0, image, flat.astype(jnp.uint8))


def equalize_by_products(image: Image) -> Image:
    """`equalize`, on a TPU, which neither counts nor looks up levels quickly one by one.

    The matrices are of zeros and ones: a row for each value of a level's upper or lower four bits.
    """
    levels = image.reshape(3, -1).astype(jnp.int32)
    upper, lower = (
        (bits[:, None] == jnp.arange(16)[:, None]).astype(jnp.bfloat16)  # 3 16 p
        for bits in (levels >> 4, levels & 15)
    )
    exact = {"preferred_element_type": jnp.float32}
    counts = jnp.einsum("cap,cbp->cab", upper, lower, **exact).reshape(3, 256)
    table, step = _equalizing(counts.astype(jnp.int32))
    table = table.reshape(3, 16, 16).astype(jnp.bfloat16)  # whole numbers up to 255 are exact
    chosen = jnp.einsum("cab,cbp->cap", table, lower, **exact)
    flat = (chosen * upper).sum(1).reshape(image.shape).astype(jnp.uint8)
    return jnp.where(step[..., None] == 0, image, flat)


def _equalizing(counts: Int[Array, "3 256"]) -> tuple[Int[Array, "3 256"], Int[Array, "3 1"]]:
    """Return the new level of each, and the pixels a level should have; 0 of them: no change."""
    below = jnp.cumsum(counts, axis=1) - counts
    step = jnp.where(counts > 0, below, 0).max(1, keepdims=True) // 255
    return jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255), step


def grey(image: Image) -> Image:
    """Replace each pixel by its luma (ITU-R 601-2)."""
    red, green, blue = image.astype(jnp.int32)
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return jnp.broadcast_to(luma.astype(jnp.uint8), image.shape)


def hue(image: Image, shift: Number) -> Image:
    """Turn the hue by `shift`, -1/2 to 1/2 of the circle, in steps of 1/255, as torchvision.

    One value in a thousand differs from Pillow's, which converts in double precision, by up to 5.
    """
    red, green, blue = image.astype(jnp.float32)
    value, lowest = image.max(0).astype(jnp.float32), image.min(0).astype(jnp.float32)
    span = jnp.maximum(value - lowest, 1)
    from_red, from_green, from_blue = ((value - c) / span for c in (red, green, blue))
    angle = jnp.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red)
    angle = jnp.where(red == value, from_blue - from_green, angle)
    angle = jnp.floor(jnp.where(angle < 0, angle / 6 + 1, angle / 6) * 255)
    angle = jnp.where(value > lowest, angle, 0)
    saturation = jnp.floor(255 * (value - lowest) / jnp.maximum(value, 1)) / 255
    angle = jnp.mod(angle + jnp.trunc(255 * shift), 256) * 6 / 255
    sector = jnp.floor(angle)
    part = angle - sector
    p, q, t = (
        jnp.floor(value * (1 - saturation * x) + 0.5) for x in (jnp.ones(()), part, 1 - part)
    )
    sixth = jnp.mod(sector, 6)
    orders = [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value)]
    turned = jnp.stack((value, p, q))
    for number, order in enumerate(orders):
        turned = jnp.where(sixth == number, jnp.stack(order), turned)
    return turned.astype(jnp.uint8)


def blur(image: Image, sigma: Number) -> Image:
    """Blur by `sigma` pixels, at most 2.4, as Pillow's GaussianBlur: the mean of a box, thrice."""
    for axis in (2, 1):
        for _ in range(3):
            image = _box_blur(image, _box_radius(sigma), axis)
    return image


def cutout(image: Image, half: Number, centre: Float[Array, "2"]) -> Image:
    """Grey the square of 2 `half` pixels around `centre`, (y, x) as fractions of the image."""
    inside = jnp.ones(image.shape[1:], bool)
    for axis, share in enumerate(centre):
        size = image.shape[1 + axis]
        middle = jnp.floor(share * size)
        line = jnp.arange(size).reshape(-1, *(1,) * (1 - axis))
        inside &= (line >= middle - half) & (line < middle + half)
    return jnp.where(inside, jnp.uint8(128), image)


def colour_tf(image: Image, factor: Number) -> Image:
    """Blend with the image in grey, whose weights are rounded differently."""
    weights = jnp.array([0.2989, 0.587, 0.114])[:, None, None]
    levels = (image.astype(jnp.float32) / 255 * weights).sum(0) * 255.5
    return _blend(jnp.broadcast_to(levels.astype(jnp.uint8), image.shape), image, factor)


def contrast_tf(image: Image, factor: Number) -> Image:
    """Blend with a constant: the number of pixels / 256, by a known mistake, and at most 255."""
    return _blend(jnp.full_like(image, min(image[0].size // 256, 255)), image, factor)


def sharpness_tf(image: Image, factor: Number) -> Image:
    """Blend with the smoothed image, truncated instead of rounded.

    A smoothed level may differ by one, in sums of float32 that TensorFlow truncates.
    """
    smooth = (_neighbourhood(image.astype(jnp.int32)) // 13).astype(jnp.uint8)
    return _blend(image.at[:, 1:-1, 1:-1].set(smooth), image, factor)


def _blend(first: Image, second: Image, factor: Number) -> Image:
    """Return first + factor (second - first), truncated."""
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    return jnp.clip(a + factor * (b - a) + NUDGE, 0, 255).astype(jnp.uint8)


def _neighbourhood(image: Int[Array, "3 h w"]) -> Int[Array, "3 h-2 w-2"]:
    """Return the sum of the 3 x 3 pixels around each, the middle one five times."""
    lines = image[:, :-2] + image[:, 1:-1] + image[:, 2:]
    return lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * image[:, 1:-1, 1:-1]


def _box_radius(sigma: Number) -> Number:
    """Return the radius of the box that, applied three times, blurs by `sigma`."""
    variance = sigma * sigma / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def _box_blur(image: Image, radius: Number, axis: int) -> Image:
    """Return the mean of 2 radius + 1 pixels along an axis, in Pillow's fixed-point arithmetic."""
    whole = jnp.floor(radius).astype(jnp.int32)
    weight = (2**24 / (2 * radius + 1)).astype(jnp.uint32)
    edge = (2**24 - (2 * whole + 1).astype(jnp.uint32) * weight) // 2
    pads = [(2, 2) if i == axis else (0, 0) for i in range(3)]
    padded = jnp.pad(image, pads, mode="edge").astype(jnp.uint32)
    total = jnp.uint32(2**23)
    for offset in range(-2, 3):
        weights = jnp.where(
            abs(offset) <= whole, weight, jnp.where(abs(offset) == whole + 1, edge, 0)
        )
        first = 2 + offset
        shifted = jax.lax.slice_in_dim(padded, first, first + image.shape[axis], axis=axis)
        total = total + weights.astype(jnp.uint32) * shifted
    return (total >> 24).astype(jnp.uint8)

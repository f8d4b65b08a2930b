"""How much arithmetic a model is, counted on paper.

Counted are the multiply-accumulates (MACs) of matrix products, attention's two among them, and of
convolutions, also with the zeros around an image; norms, softmax, GELU and biases are not, as is
usual for model FLOPs utilisation (PaLM, appendix B). Recomputation (remat) isn't either, nor what a
head does not read of the last block: MFU measures what the model needs, not what was done.
"""

from collections.abc import Sequence


def forward_macs(
    grid: tuple[int, int],
    patch: int,
    d: int,
    depth: int,
    f: int,
    classes: int,
    pool: str,
    *,
    channels: int = 3,
    distilled: bool = False,
    class_token: bool = False,
    representation: int = 0,
    read: int | None = None,
) -> int:
    """Multiply-accumulates of one image's forward pass.

    Args:
      grid: rows and columns of patches (h, w).
      patch: side of a patch, pixels (a hybrid's are of its feature map).
      d: token width.
      depth: number of blocks.
      f: MLP width.
      classes: outputs of the head; 0: no head.
      pool: cls | gap | map (attention pooling, its MLP as wide as the blocks').
      channels: of a pixel.
      distilled: whether there is a distillation token, and its head.
      class_token: whether there is a [CLS] that the head does not read; with pool=cls there is one.
      representation: width of the layer before the head; 0: none.
      read: tokens of the last block that the head reads; None: all, as figures in print have it.
    """
    patches = grid[0] * grid[1]
    n = patches + (pool == "cls" or class_token) + distilled
    embed = patches * patch * patch * channels * d

    def block(m: int) -> int:
        """Of m tokens that attend to all: their q and out, all k and v; scores and values; MLP."""
        return (2 * m + 2 * n) * d * d + 2 * m * n * d + 2 * m * d * f

    unread = block(n) - block(read) if read and depth else 0
    pooling = block(1) if pool == "map" else 0  # one query, then its MLP
    head = (d + classes) * representation if representation else d * classes
    return embed + depth * block(n) - unread + pooling + head + distilled * d * classes


def convolution_macs(out: tuple[int, int], side: int, channels: tuple[int, int]) -> int:
    """Of a convolution with square kernels, at each of `out` (h, w) pixels; padding counts."""
    return out[0] * out[1] * side * side * channels[0] * channels[1]


def cnn_macs(image: tuple[int, int], width: int, mlp: int, classes: int) -> int:
    """Multiply-accumulates of one image's forward pass of convnets.CNN."""
    (h, w), c = image, width
    channels = ((3, c, 2 * c), (2 * c, 4 * c, 4 * c), (4 * c, 8 * c, 8 * c))
    total = 0
    for i, (first, second, third) in enumerate(channels):
        for pair in ((first, second), (second, third)):
            total += convolution_macs((h >> i, w >> i), 3, pair)
    return total + (h // 8) * (w // 8) * 8 * c * mlp + mlp * (mlp // 2) + mlp // 2 * classes


def resnet_macs(
    image: tuple[int, int], width: int, blocks: int, stages: int, projection: bool
) -> int:
    """Of convnets.ResNetFeatures: 2 `blocks` convolutions in each of `stages`; no head."""
    total = convolution_macs(image, 3, (3, width))
    for i in range(stages):
        out, c = (image[0] >> i, image[1] >> i), width << i
        total += (2 * blocks - (i > 0)) * convolution_macs(out, 3, (c, c))
        if i:
            total += convolution_macs(out, 3, (c // 2, c))
            total += projection * convolution_macs(out, 1, (c // 2, c))
    return total


def stem_macs(image: tuple[int, int], channels: Sequence[int]) -> int:
    """Of convnets.ConvStem: convolutions of stride 2 with these channels."""
    pairs = zip((3, *channels), channels, strict=False)
    return sum(
        convolution_macs((image[0] >> i, image[1] >> i), 3, pair) for i, pair in enumerate(pairs, 1)
    )


def training_flops(macs: int) -> int:
    """FLOPs of one image's training step: two a MAC, forward once and backward twice."""
    return 6 * macs

"""How much arithmetic a ViT is, counted on paper, and how much of a chip's peak a speed amounts to.

Counted are the multiply-accumulates (MACs) of matrix products, attention's two among them; norms,
softmax, GELU and biases are not, as is usual for model FLOPs utilisation (PaLM, appendix B).
Recomputation (remat) isn't either: MFU measures what the model needs, not what was done.
"""

import re

# Dense bfloat16 FLOP/s of one device, as jax counts devices; vendors' data sheets. Each pattern is
# searched in `jax.Device.device_kind`; the first that is found decides. A slice of a GPU (MIG) has
# no published peak.
PEAK = {
    r"\bMIG\b": None,
    r"^TPU v4$": 275e12,
    r"^TPU (v5 lite|v5e)$": 197e12,
    r"^TPU (v5|v5p)$": 459e12,
    r"^TPU (v6 lite|v6e)$": 918e12,
    r"^TPU7x$": 2307e12 / 2,  # two devices a chip
    r"\bA100\b": 312e12,
    r"\bH100 PCIe\b": 756e12,
    r"H[12]00\b": 989e12,  # GH200 as well
}


def forward_macs(
    grid: tuple[int, int],
    patch: int,
    d: int,
    depth: int,
    f: int,
    classes: int,
    pool: str,
    representation: int = 0,
) -> int:
    """Multiply-accumulates of one image's forward pass.

    Args:
      grid: rows and columns of patches (h, w).
      patch: side of a patch, pixels; three channels.
      d: token width.
      depth: number of blocks.
      f: MLP width.
      classes: outputs of the head; 0: no head.
      pool: cls (one more token) | gap | map (attention pooling, its MLP as wide as the blocks').
      representation: width of the layer before the head; 0: none.
    """
    patches = grid[0] * grid[1]
    n = patches + (pool == "cls")
    embed = patches * patch * patch * 3 * d
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * f  # q k v out; scores and values; MLP
    # One query: its q and out, every token's k and v, then one token's MLP.
    pooling = (2 + 2 * n) * d * d + 2 * n * d + 2 * d * f if pool == "map" else 0
    head = (d + classes) * representation if representation else d * classes
    return embed + depth * block + pooling + head


def training_flops(macs: int) -> int:
    """FLOPs of one image's training step: two a MAC, forward once and backward twice."""
    return 6 * macs


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None where it is not known, as for a CPU."""
    return next((peak for kind, peak in PEAK.items() if re.search(kind, device_kind)), None)


def mfu(
    images_per_second: float, flops_per_image: float, devices: int, device_kind: str
) -> float | None:
    """Model FLOPs utilisation, 0 to 1, of all devices together; None where the peak is not known.

    Args:
      images_per_second: over all devices.
      flops_per_image: `training_flops` while training.
      devices: `jax.device_count()`.
      device_kind: `jax.Device.device_kind`, the same for all.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else images_per_second * flops_per_image / (devices * peak)

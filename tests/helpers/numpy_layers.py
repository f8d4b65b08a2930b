"""Layers of convolutional networks in numpy, float64: what tests compare ours with."""

import numpy as np


def conv(x, part, stride=1):
    """x [b, h, w, i]: windows of zero-padded x times the kernel."""
    kernel = np.asarray(part["kernel"], np.float64)
    side, (h, w) = kernel.shape[0], x.shape[1:3]
    pad = side // 2
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    out = sum(
        x[:, i : i + h : stride, j : j + w : stride] @ kernel[i, j]
        for i in range(side)
        for j in range(side)
    )
    return out + np.asarray(part.get("bias", 0.0), np.float64)


def norm(x, part, mask=None):
    if mask is None:
        mean, variance = part["mean"], part["variance"]
    else:
        mean, variance = x[mask].mean((0, 1, 2)), x[mask].var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + 1e-5) * part["scale"] + part["bias"]


def relu(x):
    return np.maximum(x, 0)


def halved(x):
    """Max-pool x [b, h, w, c] by 2 x 2."""
    return np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)

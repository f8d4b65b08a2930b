"""The order of a head's channels in models with rotary positions.

Our models rotate channel i with channel i + e/2, and the first half of their angles follow the row
("halves", as DINOv3). EVA-02 and RoPE-ViT rotate neighbours, ("pairs"), and some of them follow the
column first ("pairs-xy"). Queries and keys are permuted alike, so that scores are the same.
"""

import re

import numpy as np

from vit_scale.pretrained.key_mapping import Arrays

ORDERS = ("halves", "pairs", "pairs-xy")
ROTATED = re.compile(r"attention/((query|key)/(kernel|bias)|(query|key)_norm/(scale|bias))$")


def channel_order(order: str, head_width: int) -> np.ndarray:
    """Return the library's channel of each of our channels of a head."""
    if order == "halves":
        return np.arange(head_width)
    pairs = np.arange(head_width // 2)
    if order == "pairs-xy":  # of our rows first, then columns
        pairs = np.roll(pairs, head_width // 4)
    return np.concatenate([2 * pairs, 2 * pairs + 1])


def reorder(params: Arrays, order: str, *, back: bool = False) -> Arrays:
    """Permute the channels of queries and keys, and of their norms, to our order; or `back`."""
    if order == "halves":
        return params

    def permuted(name: str, x: np.ndarray) -> np.ndarray:
        if not (name.startswith("blocks/") and ROTATED.search(name)):
            return x
        channels = channel_order(order, x.shape[-1])
        return x[..., np.argsort(channels) if back else channels]

    return {name: permuted(name, x) for name, x in params.items()}

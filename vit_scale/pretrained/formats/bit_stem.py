"""The layers of a hybrid's BiT ResNet, by our names and by those of a format."""

from collections.abc import Callable, Mapping

BLOCKS = (3, 4, 9, 3)  # in each stage, at most: those of R50, with stride 16 or 32


def layers(
    root: Mapping[str, str], block: Callable[[int, int], str], parts: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return (our name, the format's key) of each convolution and norm, without its arrays.

    Args:
      root: keys of the root block's `conv` and `norm`.
      block: function from the numbers of a stage and of a block in it to its keys' prefix.
      parts: keys of the layers of a block, by our names.
    """
    pairs = [(f"stem/{part}", key) for part, key in root.items()]
    for stage, count in enumerate(BLOCKS):
        for i in range(count):
            ours, prefix = f"stem/stages/{stage}/{i}/", block(stage, i)
            pairs += [(ours + part, prefix + key) for part, key in parts.items()]
    return pairs

"""What a user says about external weights in the config's init block."""

import re
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.errors import UserError

Size = tuple[int, int]  # (height, width)


class Hints(NamedTuple):
    """Facts to use if neither the arrays nor the files beside them state them.

    Sizes are (height, width) in pixels.
    """

    format: str = ""  # name of the weight format (init.dialect); empty: detect it
    heads: int | None = None
    trained_size: Size | None = None  # the weights were trained at this size (init.image)
    requested_size: Size | None = None  # trained_size if the positions fit it, else target_size
    target_size: Size | None = None  # the weights will be used at this size
    tree: str = ""  # which of several state dicts in a file (init.tree)
    architecture: str = ""  # timm's name of it, for a file without a config.json


NO_HINTS = Hints()


def hints_from_config(cfg: ConfigDict, heads: int | None = None) -> Hints:
    """Read hints from a config's init block. Raises UserError if init.image is malformed."""
    text, size = cfg.init.image, None
    if text:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if not match:
            raise UserError(f"init.image={text!r} is not HEIGHTxWIDTH in pixels, such as 224x256")
        size = (int(match[1]), int(match[2]))
    return Hints(
        cfg.init.dialect, heads, size, tree=cfg.init.tree, architecture=cfg.init.architecture
    )

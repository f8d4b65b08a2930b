"""Layers as Flax names them, in Flax's layouts, as google-research's two libraries store them."""

from collections.abc import Iterable

from vit_scale.pretrained.key_mapping import KeyMapping


def leaves(param: str, key: str, names: Iterable[str] = ("kernel", "bias")) -> list[KeyMapping]:
    """The mappings of a layer's parameters `names`."""
    return [KeyMapping(f"{param}/{name}", f"{key}/{name}") for name in names]


def norm(param: str, key: str) -> list[KeyMapping]:
    return leaves(param, key, ("scale", "bias"))


def attention(param: str, key: str) -> list[KeyMapping]:
    parts = ("query", "key", "value", "out")
    return [row for part in parts for row in leaves(f"{param}/{part}", f"{key}/{part}")]


def mlp(param: str, key: str) -> list[KeyMapping]:
    return [*leaves(f"{param}/up", f"{key}/Dense_0"), *leaves(f"{param}/down", f"{key}/Dense_1")]

"""Encode global and local crops with one model, for objectives that compare them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from ml_collections import ConfigDict

from vit_scale.augment.multi_crop import local_size
from vit_scale.config import image_size
from vit_scale.models.build import Model, build
from vit_scale.models.flops import count_macs
from vit_scale.models.lora import adapted
from vit_scale.models.parameters import of_model
from vit_scale.models.position_embeddings import resample, sincos2d


class CropEncoder(NamedTuple):
    """A model for global crops, and the same one for local crops; None: there are no local ones."""

    model: Model
    small: Model | None

    def __call__(
        self, params: dict, examples: dict[str, Array], key: PRNGKeyArray | None
    ) -> list[Float[Array, "b v d"]]:
        """Return the pooled vectors of all crops of `multi_crop`, the global ones first."""
        vectors = [encode_crops(self.model, of_model(params), examples["global"], key)[0]]
        return vectors + self.local(params, examples, key)

    def local(
        self, params: dict, examples: dict[str, Array], key: PRNGKeyArray | None
    ) -> list[Float[Array, "b l d"]]:
        """Return the pooled vectors of the local crops, in a list that is empty without any."""
        if self.small is None:
            return []
        own = self._resampled(of_model(params))
        local_key = None if key is None else jax.random.fold_in(key, 1)
        return [encode_crops(self.small, own, examples["local"], local_key)[0]]

    def _resampled(self, params: dict) -> dict:
        """Return the parameters with positions of the local crops' grid, as in DINO."""
        assert self.small
        if "posemb" not in self.small.abstract_params:
            return params
        width = self.model.shape.size.width
        positions = params.get("posemb")
        if positions is None:
            positions = sincos2d(self.model.shape.grid, width)
        return {**params, "posemb": resample(positions, self.small.shape.grid, "bicubic")}


def make_crop_encoder(model: Model, cfg: ConfigDict) -> CropEncoder:
    """Build what encodes the crops of a config; `model` is that of its global crops."""
    if not cfg.views.locals:
        return CropEncoder(model, None)
    block = cfg.model.copy_and_resolve_references()
    if block.posemb == "sincos2d":  # those of the large grid, resampled, are a parameter here
        block.posemb = "learned"
    return CropEncoder(model, adapted(build(block, local_size(cfg), model.constrain), cfg.lora))


def encode_crops(
    model: Model,
    params: dict,
    crops: Float[Array, "b v H W 3"],
    key: PRNGKeyArray | None,
    hidden: tuple[Bool[Array, "b v p"], Float[Array, "d"]] | None = None,
    tokens: bool = False,
) -> tuple[Float[Array, "b v d"], Float[Array, "b v n d"]]:
    """Encode all crops as one batch; return the pooled vectors and the patch tokens.

    Without `tokens` only those patch tokens are computed, and returned, that are pooled.
    """
    b, v = crops.shape[:2]
    if hidden is not None:
        hidden = hidden[0].reshape(b * v, -1), hidden[1]
    images = crops.reshape(b * v, *crops.shape[2:])
    pooled, everything = model.encode(params, images, key, None, hidden, tokens)
    patches = everything[:, model.shape.before :]
    return pooled.reshape(b, v, -1), patches.reshape(b, v, *patches.shape[1:])


def count_crop_macs(encoder: CropEncoder, cfg: ConfigDict) -> tuple[int, int]:
    """Return the multiply-accumulates of an image's global crops, and of its local ones."""

    def macs(model: Model | None, count: int, size: tuple[int, int]) -> int:
        images = jax.ShapeDtypeStruct((count, *size, 3), jnp.float32)
        return count_macs(model.encode, model.abstract_params, images) if model else 0

    large = macs(encoder.model, cfg.views.globals, image_size(cfg))
    return large, macs(encoder.small, cfg.views.locals, local_size(cfg))


def plain_model(cfg: ConfigDict) -> tuple[Model, ConfigDict]:
    """Return the model of a config, and the config, as its arithmetic is counted."""
    plain = cfg.copy_and_resolve_references()
    plain.model.update({"remat": "none", "attention": "xla", "dropout": 0.0, "drop_path": 0.0})
    plain.model.patch_drop = 0.0
    return build(plain.model, image_size(plain)), plain

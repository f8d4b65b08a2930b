"""Write our configs as other libraries do: the JSON files beside exported weights."""

from typing import Any

from ml_collections import ConfigDict

from vit_scale.augment.view import View
from vit_scale.config import image_size
from vit_scale.models.spec import shape
from vit_scale.pretrained.preprocessing import PIL_RESAMPLING

# Fields of the model block that transformers' ViTs lack, and their values without them. LayerScale
# and absent biases are the same function with other parameters.
PLAIN_BLOCK: dict[str, Any] = {
    "rope": "none",
    "norm": "layernorm",
    "pre_norm": False,
    "final_norm": True,
    "attention_norm": False,
    "mlp_norm": False,
    "qk_norm": "none",
    "fc_norm": False,
    "nearest_grid": False,
}
ACTIVATIONS = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}


def npz_config(cfg: ConfigDict, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of the .json beside an exported .npz; no other library reads it."""
    model = shape(cfg.model, image_size(cfg))
    fields = ("gelu", "norm_epsilon", "pool", *(("stem_epsilon",) if model.stem else ()))
    return {
        "model": {"heads": model.size.heads, **{name: cfg.model[name] for name in fields}},
        "mean": list(cfg.augment.mean),
        "std": list(cfg.augment.std),
        "eval": {name: cfg.eval[name] for name in ("fit", "crop", "resample")},
        "image": list(image_size(cfg)),
        "classes": list(classes),
    }


def huggingface_config(cfg: ConfigDict, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of Hugging Face's config.json, for `from_pretrained(FOLDER)`."""
    model, image = shape(cfg.model, image_size(cfg)), image_size(cfg)
    size = model.size
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp,
        "hidden_act": ACTIVATIONS[cfg.model.gelu],
        "layer_norm_eps": cfg.model.norm_epsilon,
        "image_size": image[0] if image[0] == image[1] else list(image),
        "patch_size": model.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
        "dtype": "float32",
    }


def huggingface_preprocessor(cfg: ConfigDict, view: View) -> dict[str, Any]:
    """The content of Hugging Face's preprocessor_config.json."""
    height, width = image_size(cfg)
    resized = view.resized((height, width))
    size = {"height": resized[0], "width": resized[1]}
    if view.fit != "stretch":
        size = {"shortest_edge": resized[0]}
    crops = view.fit != "stretch" or resized != (height, width)
    return {
        # In transformers 4, ViTImageProcessor can't crop; in 5 they are the same.
        "image_processor_type": "BitImageProcessor" if crops else "ViTImageProcessor",
        "do_resize": True,
        "size": size,
        "do_center_crop": crops,
        "crop_size": {"height": height, "width": width},
        "resample": PIL_RESAMPLING[view.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.augment.mean),
        "image_std": list(cfg.augment.std),
    }

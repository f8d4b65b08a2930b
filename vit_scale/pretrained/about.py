"""What stands beside weights: how they were trained, how pixels came in, what the classes are.

timm and Hugging Face write `config.json` into the folder of a model; `preprocessor_config.json` is
Hugging Face's alone. Google's .npz has nothing beside it: ours gets a .json of its own name, so
that it comes back as it went.
"""

import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_scale.config import image_size
from vit_scale.errors import UserError
from vit_scale.pretrained.dialects import HUGGINGFACE, TIMM
from vit_scale.pretrained.files import read_json
from vit_scale.pretrained.rules import Dialect
from vit_scale.shape import SIZES, shape

GELUS = {  # in transformers and timm
    "gelu": "exact",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
}
POOLS = {"token": "cls", "avg": "gap", "map": "map"}  # in timm
# What a ViT may be in a model's config: what else is set there makes another function.
PLAIN: dict[str, dict[str, Any]] = {
    TIMM.name: {"fc_norm": False, "qk_norm": False, "reg_tokens": 0},
    HUGGINGFACE.name: {"num_channels": 3},
}


class About(NamedTuple):
    """What is known of a model but for its arrays; what is not known is empty."""

    model: dict[str, Any]  # fields of the config's model block
    augment: dict[str, Any]  # fields of its augment block
    classes: tuple[str, ...]
    image: tuple[int, int] | None  # height and width in pixels


def read(dialect: Dialect, file: pathlib.Path) -> About:
    """What stands beside a file of weights.

    Raises UserError for a model that is no plain ViT, and where it is not as the dialect writes it.
    """
    try:
        return _read(dialect, file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: what stands beside it is not as {dialect.text} writes it: {error!r}"
        ) from error


def _read(dialect: Dialect, file: pathlib.Path) -> About:
    own = read_json(file.with_suffix(".json")) if file.suffix == ".npz" else {}
    if own:
        return About(own["model"], _pixels(own), tuple(own["classes"]), tuple(own["image"]))
    content = read_json(file.parent / "config.json")
    for name, plain in PLAIN.get(dialect.name, {}).items():
        given = {**content, **content.get("model_args", {})}.get(name, plain)
        if given not in (plain, None):
            raise UserError(f"{file}: {name}={given} makes it another model than a plain ViT")
    if dialect is TIMM and "architecture" in content:
        return _read_timm(content)
    if dialect is HUGGINGFACE and content:
        return _read_huggingface(file, content)
    return About({}, {}, (), None)


def _pixels(content: dict) -> dict[str, Any]:
    names = {"mean": ("mean", "image_mean"), "std": ("std", "image_std")}
    return {
        name: tuple(map(float, content[key]))
        for name, keys in names.items()
        for key in keys
        if content.get(key)
    }


def _gelu(name: str, file: str) -> dict[str, str]:
    if name not in GELUS:
        raise UserError(f"{file}: its activation is {name}; a ViT here has {', '.join(GELUS)}")
    return {"gelu": GELUS[name]}


def _read_timm(content: dict) -> About:
    arguments, trained = content.get("model_args", {}), content.get("pretrained_cfg", {})
    model: dict[str, Any] = {}
    if "num_heads" in arguments:
        model["heads"] = int(arguments["num_heads"])
    if "act_layer" in arguments:
        model |= _gelu(arguments["act_layer"], "config.json")
    pool = arguments.get("global_pool", content.get("global_pool"))
    if pool in POOLS:
        model["pool"] = POOLS[pool]
    size = arguments.get("img_size") or trained.get("input_size", (None,))[1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return About(model, _pixels(trained), tuple(trained.get("label_names") or ()), size or None)


def _read_huggingface(file: pathlib.Path, content: dict) -> About:
    pixels = read_json(file.parent / "preprocessor_config.json")
    model: dict[str, Any] = {
        "heads": int(content["num_attention_heads"]),
        "norm_epsilon": float(content["layer_norm_eps"]),
    }
    model |= _gelu(content.get("hidden_act", "gelu"), "config.json")
    size = content["image_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    named = content.get("id2label") or {}
    classes = tuple(named[i] for i in sorted(named, key=int))
    if all(name.startswith("LABEL_") for name in classes):  # where nobody gave names
        classes = ()
    return About(model, _pixels(pixels), classes, size)


def own(cfg: ConfigDict, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of a .npz's .json."""
    model = shape(cfg.model, image_size(cfg))
    fields = ("gelu", "norm_epsilon", "pool")
    return {
        "model": {"heads": model.size.heads, **{name: cfg.model[name] for name in fields}},
        "mean": list(cfg.augment.mean),
        "std": list(cfg.augment.std),
        "image": list(image_size(cfg)),
        "classes": list(classes),
    }


def timm(cfg: ConfigDict, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of timm's config.json, for `timm.create_model("local-dir:FOLDER")`."""
    model, image = shape(cfg.model, image_size(cfg)), image_size(cfg)
    size, pool = model.size, next(name for name, p in POOLS.items() if p == model.pool)
    arguments = {
        "img_size": list(image),
        "patch_size": model.patch,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": size.mlp / size.width,
        "class_token": model.pool == "cls",
        "global_pool": pool,
        "fc_norm": False,
        "act_layer": "gelu_tanh" if cfg.model.gelu == "tanh" else "gelu",
    }
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": cfg.model.classes,
        "num_features": size.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, *image],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(cfg.augment.mean),
            "std": list(cfg.augment.std),
            "num_classes": cfg.model.classes,
            "label_names": list(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def huggingface(cfg: ConfigDict, classes: tuple[str, ...]) -> dict[str, Any]:
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
        "hidden_act": "gelu_pytorch_tanh" if cfg.model.gelu == "tanh" else "gelu",
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


def preprocessor(cfg: ConfigDict) -> dict[str, Any]:
    """The content of Hugging Face's preprocessor_config.json."""
    height, width = image_size(cfg)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.augment.mean),
        "image_std": list(cfg.augment.std),
    }


def variant(width: int, depth: int, heads: int, mlp: int, patch: int) -> dict[str, Any]:
    """Fields of the model block for a size: its letter where it has one, else every number."""
    numbers = {"width": width, "depth": depth, "heads": heads, "mlp": mlp}
    letter = next((n for n, size in SIZES.items() if vars(size) == numbers), None)
    if letter:
        return {"variant": f"{letter}/{patch}"}
    return {"variant": f"Ti/{patch}", **numbers}

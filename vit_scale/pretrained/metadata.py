"""Read the metadata beside external weights: architecture, preprocessing and class names.

timm and Hugging Face write a `config.json` beside the weights, Hugging Face also a
`preprocessor_config.json`. Google's .npz files come alone; those that we export have a .json of the
same name. A setting that no model here can honour raises an error; none is ignored.
"""

import pathlib
import re
from typing import Any, NamedTuple

from vit_scale.errors import UserError
from vit_scale.pretrained import preprocessing
from vit_scale.pretrained.formats import HUGGINGFACE, TIMM
from vit_scale.pretrained.key_mapping import WeightFormat
from vit_scale.pretrained.weight_files import read_json

GELUS = {  # names in transformers and timm -> model.gelu
    "gelu": "exact",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
}
POOLS = {"token": "cls", "avg": "gap", "map": "map"}  # timm's global_pool -> model.pool
# Arguments of timm's VisionTransformer: read here; determined by the arrays; irrelevant outside
# training. Any other argument that is set changes the function of the same arrays.
READ = ("num_heads", "act_layer", "global_pool", "img_size", "no_embed_class", "norm_layer")
IN_ARRAYS = (
    *("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias"),
    *("init_values", "class_token", "fc_norm", "proj_bias", "pre_norm", "reg_tokens", "qk_norm"),
    *("embed_layer", "mlp_layer", "distilled", "pretrained", "in_features", "representation_size"),
)
TRAINING = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad"),
    *("strict_img_size", "pretrained_cfg", "pretrained_cfg_overlay", "features_only", "checkpoint"),
)
# timm architectures: prefixes of plain ViTs; those that compute something else from arrays of the
# same names; those with the tanh approximation of GELU.
PLAIN_VIT = ("vit_", "deit", "flexivit_", "test_vit", "timm_vit")
OTHER_FUNCTION = re.compile("_rpn|quickgelu")
TANH_GELU = re.compile("so400m|vit_base_patch32_siglip_256|vit_large_patch16_siglip(_gap)?_512")
EPSILONS = {"layernorm": 1e-6, "layernormfp32": 1e-6, "layernorm2d": 1e-6}  # by timm's norm_layer
SINGLE_LABEL = (None, "", "single_label_classification")  # Hugging Face's problem_type


class Metadata(NamedTuple):
    """What is stated about a model beside its arrays; a field is empty where nothing is."""

    model: dict[str, Any]  # fields of the config's model block
    augment: dict[str, Any]  # fields of its augment block
    eval: dict[str, Any]  # fields of its eval block: how images are resized and cropped
    classes: tuple[str, ...]
    image_size: tuple[int, int] | None  # (height, width) in pixels
    no_embed_class: bool | None = None  # timm: position embeddings have no row for [CLS]
    dimensions: dict[str, Any] = {}  # noqa: RUF012  # width and depth, to check the arrays against
    # (augment fields, eval fields) that the library falls back to, which the file does not state.
    library_defaults: tuple[dict[str, Any], dict[str, Any]] = ({}, {})


NO_METADATA = Metadata({}, {}, {}, (), None)


def read_metadata(fmt: WeightFormat, file: pathlib.Path) -> Metadata:
    """Read the metadata beside the weight file `file`.

    Raises UserError if it is malformed, or describes a model that is no plain ViT.
    """
    try:
        return _read(fmt, file)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{file}: the metadata beside it is not as {fmt.title} writes it: {error!r}"
        ) from error


def _read(fmt: WeightFormat, file: pathlib.Path) -> Metadata:
    own = read_json(file.with_suffix(".json")) if file.suffix == ".npz" else {}
    if own:
        pixels = {name: tuple(map(float, own[name])) for name in ("mean", "std")}
        view = own.get("eval", {})  # absent from files of earlier versions
        return Metadata(own["model"], pixels, view, tuple(own["classes"]), tuple(own["image"]))
    content = read_json(file.parent / "config.json")
    if fmt is TIMM and "architecture" in content:
        return _read_timm(file, content)
    if fmt is HUGGINGFACE and content:
        return _read_huggingface(file, content)
    return NO_METADATA


def _gelu(file: pathlib.Path, name: str) -> dict[str, str]:
    if name not in GELUS:
        raise UserError(
            f"{file}: config.json has the activation {name}, which is not supported; "
            f"supported: {', '.join(GELUS)}"
        )
    return {"gelu": GELUS[name]}


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) of an int or a pair; None if empty."""
    if not value:
        return None
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def _read_timm(file: pathlib.Path, content: dict) -> Metadata:
    # Before timm 0.9, config.json was one flat dictionary.
    arguments, trained = content.get("model_args", {}), content.get("pretrained_cfg", content)
    architecture = content["architecture"]
    if not architecture.startswith(PLAIN_VIT) or OTHER_FUNCTION.search(architecture):
        raise UserError(f"{file}: config.json has architecture={architecture}, not a plain ViT")
    for name, value in arguments.items():
        if value and name not in (*READ, *IN_ARRAYS, *TRAINING):
            raise UserError(f"{file}: config.json has {name}={value}, not a plain ViT")
    no_embed_class = arguments.get("no_embed_class")
    if no_embed_class is None and architecture.startswith("deit3_"):
        no_embed_class = True
    pixels, view = preprocessing.from_timm(file, trained)
    candidates = (c.get(key) for key in ("label_names", "labels") for c in (content, trained))
    return Metadata(
        _timm_model(file, architecture, arguments, content.get("global_pool")),
        pixels,
        view,
        _labels(file, next(filter(None, candidates), ())),
        _size(arguments.get("img_size")) or _size(trained.get("input_size", (None,))[1:]),
        no_embed_class,
        {"width": arguments.get("embed_dim"), "depth": arguments.get("depth")},
        (preprocessing.TIMM_PIXELS, preprocessing.TIMM_VIEW),
    )


def _timm_model(
    file: pathlib.Path, architecture: str, arguments: dict, global_pool: str | None
) -> dict[str, Any]:
    """Fields of the model block that timm's config.json states."""
    model: dict[str, Any] = {}
    if "num_heads" in arguments:
        model["heads"] = int(arguments["num_heads"])
    if arguments.get("act_layer"):
        model |= _gelu(file, arguments["act_layer"])
    elif TANH_GELU.search(architecture):
        model["gelu"] = "tanh"
    if norm := arguments.get("norm_layer"):
        if norm not in EPSILONS:
            raise UserError(f"{file}: config.json has norm_layer={norm}, which is not supported")
        model["norm_epsilon"] = EPSILONS[norm]
    if pool := arguments.get("global_pool", global_pool):
        if pool not in POOLS:
            raise UserError(
                f"{file}: config.json has global_pool={pool}, which is not supported; "
                f"supported: {', '.join(POOLS)}"
            )
        model["pool"] = POOLS[pool]
    return model


def _labels(file: pathlib.Path, names: Any) -> tuple[str, ...]:
    """Class names in the order of the outputs, from a list or a dict {output: name}.

    Raises UserError if an output has no name.
    """
    if isinstance(names, dict):
        outputs = sorted(map(int, names))
        if outputs != list(range(len(outputs))):
            raise UserError(
                f"{file}: config.json names {len(outputs)} classes, for outputs {outputs[0]} to "
                f"{outputs[-1]}; every output from 0 needs a name"
            )
        by_output = {int(key): name for key, name in names.items()}
        names = [by_output[i] for i in outputs]
    return tuple(map(str, names))


def _read_huggingface(file: pathlib.Path, content: dict) -> Metadata:
    model_type = content.get("model_type", "vit")
    if model_type not in ("vit", "deit", "vit_mae", "vit_msn"):
        raise UserError(f"{file}: config.json has model_type={model_type}, not a plain ViT")
    if content.get("problem_type") not in SINGLE_LABEL:
        raise UserError(
            f"{file}: config.json has problem_type={content['problem_type']}; only single-label "
            "classification is supported"
        )
    if content.get("num_channels", 3) != 3:
        raise UserError(
            f"{file}: config.json has num_channels={content['num_channels']}; only 3 are supported"
        )
    model: dict[str, Any] = {
        "heads": int(content["num_attention_heads"]),
        "norm_epsilon": float(content["layer_norm_eps"]),
    }
    model |= _gelu(file, content.get("hidden_act", "gelu"))
    size = _size(content["image_size"])
    classes = _labels(file, content.get("id2label") or {})
    if classes == tuple(f"LABEL_{i}" for i in range(len(classes))):  # transformers' placeholders
        classes = ()
    pixels, view = preprocessing.from_huggingface(file, size)
    dimensions = {"width": content.get("hidden_size"), "depth": content.get("num_hidden_layers")}
    return Metadata(model, pixels, view, classes, size, None, dimensions)

"""What stands beside weights: how they were trained, how pixels came in, what the classes are.

timm and Hugging Face write `config.json` into the folder of a model; `preprocessor_config.json` is
Hugging Face's alone. Google's .npz has nothing beside it: ours gets a .json of its own name, so
that it comes back as it went. What is said there is honoured or refused, never passed over.
"""

import pathlib
import re
from typing import Any, NamedTuple

from vit_scale.errors import UserError
from vit_scale.models.spec import SIZES
from vit_scale.pretrained import preprocessing
from vit_scale.pretrained.formats import HUGGINGFACE, TIMM
from vit_scale.pretrained.key_mapping import WeightFormat
from vit_scale.pretrained.weight_files import read_json

GELUS = {  # in transformers and timm
    "gelu": "exact",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
}
POOLS = {"token": "cls", "avg": "gap", "map": "map"}  # in timm
# Arguments of timm's VisionTransformer that are read here, that its arrays tell, or that only
# training needs. Any other that is set makes another function of the same arrays.
READ = ("num_heads", "act_layer", "global_pool", "img_size", "no_embed_class", "norm_layer")
TOLD = (
    *("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias"),
    *("init_values", "class_token", "fc_norm", "proj_bias", "pre_norm", "reg_tokens", "qk_norm"),
    *("embed_layer", "mlp_layer", "distilled", "pretrained", "in_features", "representation_size"),
)
TRAINING = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad"),
    *("strict_img_size", "pretrained_cfg", "pretrained_cfg_overlay", "features_only", "checkpoint"),
)
# Names of timm's models that are plain ViTs, parts of those that are not although their arrays have
# the same names, and of those whose GELU is the approximation.
ARCHITECTURES = ("vit_", "deit", "flexivit_", "test_vit", "timm_vit")
OTHER = re.compile("_rpn|quickgelu")
TANH = re.compile("so400m|vit_base_patch32_siglip_256|vit_large_patch16_siglip(_gap)?_512")
EPSILONS = {"layernorm": 1e-6, "layernormfp32": 1e-6, "layernorm2d": 1e-6}  # timm's norm_layer


class About(NamedTuple):
    """What is known of a model but for its arrays; what is not known is empty."""

    model: dict[str, Any]  # fields of the config's model block
    augment: dict[str, Any]  # fields of its augment block
    view: dict[str, Any]  # fields of its eval block: how images are resized and cropped
    classes: tuple[str, ...]
    image: tuple[int, int] | None  # height and width in pixels
    apart: bool | None = None  # whether [CLS] has no row among the positions
    sizes: dict[str, Any] = {}  # noqa: RUF012  # width and depth, to be compared with the arrays'
    # What the file's own library does of pixels where the file does not say it.
    library: tuple[dict[str, Any], dict[str, Any]] = ({}, {})


NOTHING = About({}, {}, {}, (), None)


def read(dialect: WeightFormat, file: pathlib.Path) -> About:
    """What stands beside a file of weights.

    Raises UserError for a model that is no plain ViT, and where it is not as the dialect writes it.
    """
    try:
        return _read(dialect, file)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{file}: what stands beside it is not as {dialect.text} writes it: {error!r}"
        ) from error


def _read(dialect: WeightFormat, file: pathlib.Path) -> About:
    own = read_json(file.with_suffix(".json")) if file.suffix == ".npz" else {}
    if own:
        pixels = {name: tuple(map(float, own[name])) for name in ("mean", "std")}
        view = own.get("eval", {})  # files of before have none
        return About(own["model"], pixels, view, tuple(own["classes"]), tuple(own["image"]))
    content = read_json(file.parent / "config.json")
    if dialect is TIMM and "architecture" in content:
        return _read_timm(file, content)
    if dialect is HUGGINGFACE and content:
        return _read_huggingface(file, content)
    return NOTHING


def _gelu(name: str, file: str) -> dict[str, str]:
    if name not in GELUS:
        raise UserError(f"{file}: its activation is {name}; a ViT here has {', '.join(GELUS)}")
    return {"gelu": GELUS[name]}


def _size(value: Any) -> tuple[int, int] | None:
    if not value:
        return None
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def _read_timm(file: pathlib.Path, content: dict) -> About:
    # Before timm 0.9 a config.json was one dictionary.
    arguments, trained = content.get("model_args", {}), content.get("pretrained_cfg", content)
    architecture = content["architecture"]
    if not architecture.startswith(ARCHITECTURES) or OTHER.search(architecture):
        raise UserError(f"{file}: config.json says architecture={architecture}: no plain ViT")
    for name, value in arguments.items():
        if value and name not in (*READ, *TOLD, *TRAINING):
            raise UserError(f"{file}: {name}={value} makes it another model than a plain ViT")
    model: dict[str, Any] = {}
    if "num_heads" in arguments:
        model["heads"] = int(arguments["num_heads"])
    if arguments.get("act_layer"):
        model |= _gelu(arguments["act_layer"], "config.json")
    if norm := arguments.get("norm_layer"):
        if norm not in EPSILONS:
            raise UserError(f"{file}: norm_layer={norm} is none of a plain ViT's")
        model["norm_epsilon"] = EPSILONS[norm]
    pool = arguments.get("global_pool", content.get("global_pool"))
    if pool and pool not in POOLS:
        raise UserError(f"{file}: global_pool={pool}; a ViT here has {', '.join(POOLS)}")
    if pool:
        model["pool"] = POOLS[pool]
    size = _size(arguments.get("img_size")) or _size(trained.get("input_size", (None,))[1:])
    if "gelu" not in model and TANH.search(architecture):
        model["gelu"] = "tanh"
    apart = arguments.get("no_embed_class")
    if apart is None and architecture.startswith("deit3_"):
        apart = True
    pixels, view = preprocessing.of_timm(file, trained)
    names = (c.get(key) for key in ("label_names", "labels") for c in (content, trained))
    classes = _labels(file, next(filter(None, names), ()))
    sizes = {"width": arguments.get("embed_dim"), "depth": arguments.get("depth")}
    library = (preprocessing.TIMM_PIXELS, preprocessing.TIMM_VIEW)
    return About(model, pixels, view, classes, size, apart, sizes, library)


def _labels(file: pathlib.Path, named: Any) -> tuple[str, ...]:
    """The names of the outputs, given as a list or by their numbers. Raises UserError for gaps."""
    if isinstance(named, dict):
        numbers = sorted(map(int, named))
        if numbers != list(range(len(numbers))):
            raise UserError(
                f"{file}: names of classes are given for outputs {numbers[0]} to {numbers[-1]}, "
                f"{len(numbers)} of them: each output from 0 needs one"
            )
        named = [{int(key): name for key, name in named.items()}[i] for i in numbers]
    return tuple(map(str, named))


PROBLEMS = (None, "", "single_label_classification")


def _read_huggingface(file: pathlib.Path, content: dict) -> About:
    kind = content.get("model_type", "vit")
    if kind not in ("vit", "deit", "vit_mae", "vit_msn"):
        raise UserError(f"{file}: config.json says model_type={kind}, which is no plain ViT")
    if content.get("problem_type") not in PROBLEMS:
        raise UserError(
            f"{file}: config.json says problem_type={content['problem_type']}; the outputs of a "
            "model here are classes of which one is right"
        )
    if content.get("num_channels", 3) != 3:
        raise UserError(f"{file}: num_channels={content['num_channels']}: a ViT here has 3")
    model: dict[str, Any] = {
        "heads": int(content["num_attention_heads"]),
        "norm_epsilon": float(content["layer_norm_eps"]),
    }
    model |= _gelu(content.get("hidden_act", "gelu"), "config.json")
    size = _size(content["image_size"])
    classes = _labels(file, content.get("id2label") or {})
    if classes == tuple(f"LABEL_{i}" for i in range(len(classes))):  # where nobody gave names
        classes = ()
    pixels, view = preprocessing.of_huggingface(file, size)
    sizes = {"width": content.get("hidden_size"), "depth": content.get("num_hidden_layers")}
    return About(model, pixels, view, classes, size, None, sizes)


def variant(width: int, depth: int, heads: int, mlp: int, patch: int) -> dict[str, Any]:
    """Fields of the model block for a size: its letter where it has one, else every number."""
    numbers = {"width": width, "depth": depth, "heads": heads, "mlp": mlp}
    letter = next((n for n, size in SIZES.items() if vars(size) == numbers), None)
    if letter:
        return {"variant": f"{letter}/{patch}"}
    return {"variant": f"Ti/{patch}", **numbers}

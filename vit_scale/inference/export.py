"""Export a trained model: weight files for timm, transformers and Google's code, or a JAX function.

The exported model computes the same logits. If the other library would compute anything else, such
as another epsilon or GELU, a returned line says so; a model that it can't express is refused.
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_scale.augment.view import View, view
from vit_scale.config import image_size
from vit_scale.data import are_files
from vit_scale.data.targets import CLASSES, VALUE
from vit_scale.errors import USAGE, UserError, nearest
from vit_scale.inference.jax_export import export_jax
from vit_scale.inference.model_card import LIBRARY, model_card
from vit_scale.inference.predictor import decode_size
from vit_scale.models.parameters import named, unstack, without_layer_scale
from vit_scale.models.position_embeddings import sincos2d
from vit_scale.models.spec import Shape
from vit_scale.pretrained import Pretrained, hub, load_model, model_file
from vit_scale.pretrained.dinov2_export import (
    class_name,
    dinov2_arrays,
    dinov2_config,
    is_dinov2,
)
from vit_scale.pretrained.formats import BIG_VISION, GOOGLE, HUGGINGFACE
from vit_scale.pretrained.key_mapping import POSITIONS, Arrays, WeightFormat, to_arrays
from vit_scale.pretrained.library_configs import (
    PLAIN_BLOCK,
    huggingface_config,
    huggingface_preprocessor,
    npz_config,
)
from vit_scale.pretrained.preprocessing import library_view
from vit_scale.pretrained.timm_export import timm_arrays, timm_config
from vit_scale.pretrained.weight_files import SAFETENSORS, write_npz, write_safetensors
from vit_scale.runs.json_files import write_json
from vit_scale.storage import files, paths
from vit_scale.storage.errors import user_errors

FILE = "safetensors"  # the format of this project: one file


def export(
    run: str | os.PathLike,
    kind: str,
    out: str | os.PathLike,
    push: str = "",
    private: bool = False,
    licence: str = "",
    dtype: str = "float32",
    card: bool = False,
) -> list[str]:
    """Write the model of `run` to `out`; return lines on how to load it, and on what differs.

    Args:
      run: a run's folder, RUN/checkpoints/STEP, or external weights (`pretrained.load_model`).
      kind: FILE, or a key of EXPORTERS.
      out: a folder, or a file for `safetensors`, `npz` and `jax`.
      push: ORG/NAME of a repository on the Hugging Face Hub, to which the folder is uploaded.
      private: whether only its owners see the repository.
      licence: identifier for the model card, such as apache-2.0.
      dtype: of the parameters in the one file of `safetensors`: float32, float16 or bfloat16.
      card: whether to write a model card beside the one file; folders always have one.

    Raises:
      UserError: for an unknown `kind`, a model that the format can't express, a path that can't be
        written; before anything is written, where a push can't work.
    """
    if kind not in (FILE, *EXPORTERS):
        raise UserError(f"--format {kind!r} is unknown; {nearest(kind, (FILE, *EXPORTERS))}", USAGE)
    _check_flags(kind, push, private, licence, dtype, card)
    path = paths.parse(out)
    if paths.in_bucket(path):
        raise UserError(f"--out {out} is in a bucket: export to a local path, then copy it")
    with user_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == FILE:
            return _export_file(run, path, dtype, card, licence)
        exported = EXPORTERS[kind](run, path)
        if isinstance(exported, list):
            return exported
        exported = exported._replace(lines=[*exported.lines, *_outputs(exported.loaded.cfg)])
        _write_folder(path, exported, licence, push)
    if not push:
        return exported.lines
    files = (SAFETENSORS, hub.CARD, *exported.contents)
    message = f"{kind} by vit_scale, step {exported.loaded.step}"
    return [*exported.lines, hub.push(path, files, push, private, message)]


def _outputs(cfg: ConfigDict) -> list[str]:
    """Return lines on what the outputs of a model are that other libraries don't expect."""
    lines = []
    if cfg.eval.flip:
        lines.append(
            "this run averages the outputs of an image and its mirror image (eval.flip); the "
            "library computes those of the image alone"
        )
    if cfg.data.target == CLASSES:
        lines.append("an image has several classes: probabilities are the sigmoid of the outputs")
    if cfg.data.target == VALUE:
        mean, std = cfg.regression.mean, cfg.regression.std
        lines.append(f"the outputs are numbers, minus {mean}, divided by {std}")
    return lines


def _check_flags(kind: str, push: str, private: bool, licence: str, dtype: str, card: bool) -> None:
    """Raise UserError for flags that don't apply, and where a push can't work."""
    model_file.check_dtype(dtype)
    if dtype != "float32" and kind != FILE:
        raise UserError(f"--dtype is for the format {FILE}, not {kind}", USAGE)
    folder = kind.startswith(f"{FILE}-")
    if card and kind != FILE:
        why = "whose folder has one anyway" if folder else "which has none"
        raise UserError(f"--card is for the format {FILE}, not {kind}, {why}", USAGE)
    if licence and kind == FILE and not card:
        raise UserError("--license is for model cards: add --card", USAGE)
    flags = {"--push": push, "--license": "" if card else licence}
    if not folder and (given := [flag for flag in flags if flags[flag]]):
        kinds = ", ".join(name for name in EXPORTERS if name.startswith(f"{FILE}-"))
        raise UserError(f"{given[0]} is for the formats {kinds}, not {kind}", USAGE)
    if private and not push:
        raise UserError("--private is of a repository: give --push ORG/NAME too", USAGE)
    if push:
        hub.check_push(push)


class FolderExport(NamedTuple):
    """What is written to a folder for `library`; `lines` say how to load it, and what differs."""

    loaded: Pretrained
    library: str
    arrays: Arrays
    contents: dict[str, dict]  # JSON files by name
    lines: list[str]


def _export_timm(run: str | os.PathLike, folder: pathlib.Path) -> FolderExport:
    loaded = _load_vit(run)
    cfg, shape = loaded.cfg, loaded.model.shape
    arrays = timm_arrays(_named(loaded), cfg.model, shape)
    timm_view, notes = _library_view(loaded, "shorter")
    content, differences = timm_config(cfg, shape, loaded.classes, timm_view)
    lines = [f'{folder}: timm.create_model("local-dir:{folder}", pretrained=True)']
    contents = {"config.json": content}
    return FolderExport(loaded, "timm", arrays, contents, [*lines, *differences, *notes])


def _export_huggingface(run: str | os.PathLike, folder: pathlib.Path) -> FolderExport:
    loaded = _load_vit(run)
    cfg, shape = loaded.cfg.model, loaded.model.shape
    config, kind = huggingface_config(loaded.cfg, loaded.classes), "ViT"
    newer = shape.registers or shape.size.swiglu or cfg.gelu == "quick" or shape.pool != "cls"
    if newer and is_dinov2(cfg, shape):
        arrays = dinov2_arrays(_named(loaded), shape)
        config, kind = dinov2_config(shape, config), class_name(shape)
    else:
        _check_huggingface(loaded)
        arrays = _first_vit_arrays(loaded, HUGGINGFACE)
    processor_view, notes = _library_view(loaded, "shortest_edge")
    height, width = image_size(loaded.cfg)
    if processor_view.fit == "shortest_edge" and height != width:
        processor_view = processor_view._replace(fit="stretch")
        notes.append(
            f"transformers stretches images to {height} x {width}, where this run keeps their "
            "aspect ratio (eval.fit), so pixels differ"
        )
    contents = {
        "config.json": config,
        "preprocessor_config.json": huggingface_preprocessor(loaded.cfg, processor_view),
    }
    name, options = f"transformers.{kind}ForImageClassification", ""
    if not loaded.classes:  # the pooler is a layer that no run has
        name, config["architectures"] = f"transformers.{kind}Model", [f"{kind}Model"]
        options = ", add_pooling_layer=False" if kind == "ViT" else ""
    lines = [f'{folder}: {name}.from_pretrained("{folder}"{options})', *notes]
    return FolderExport(loaded, "transformers", arrays, contents, lines)


def _check_huggingface(loaded: Pretrained) -> None:
    """Raise UserError for pooling and tokens that transformers' ViT hasn't."""
    model = loaded.cfg.model
    if model.pool != "cls":
        raise UserError(
            f"{loaded.path} has pool={model.pool}, but transformers' ViT only supports pool=cls: "
            "export to safetensors-timm"
        )
    if model.distilled:
        raise UserError(
            f"{loaded.path} has a distillation token, which transformers' ViT doesn't support: "
            "export to safetensors-timm"
        )


def _library_view(loaded: Pretrained, fit: str) -> tuple[View, list[str]]:
    """The view of the model's evaluation in a library that crops as `fit`; lines on differences."""
    one_resize = decode_size(loaded, loaded.cfg) == image_size(loaded.cfg)
    files = not loaded.data or are_files(loaded.cfg.data)
    return library_view(view(loaded.cfg.eval), fit, files, one_resize)


def _export_npz(run: str | os.PathLike, file: pathlib.Path) -> list[str]:
    loaded = _load_vit(run)
    cfg = loaded.cfg
    if not loaded.classes:
        raise UserError(f"{run} has no head, which a .npz has: export to safetensors-timm")
    if file.suffix != ".npz":
        raise UserError(f"--out {file} must end in .npz")
    if cfg.model.class_token or cfg.model.distilled:
        raise UserError(
            f"{run} has a [CLS] or distillation token that a .npz can't express: export to "
            "safetensors-timm"
        )
    if cfg.model.pool == "cls_gap":
        raise UserError(f"{run} has pool=cls_gap, which a .npz can't express: export to jax")
    fmt = BIG_VISION if cfg.model.pool == "map" else GOOGLE
    write_npz(file, _first_vit_arrays(loaded, fmt))
    write_json(file.with_suffix(".json"), npz_config(cfg, loaded.classes))
    lines = [f"{file}: format {fmt.title}; the .json beside it has the settings that .npz lacks"]
    for name, value in fmt.model.items():
        if cfg.model[name] != value:
            lines.append(
                f"this model has model.{name}={cfg.model[name]}, but {fmt.title} computes with "
                f"{value}: logits differ there"
            )
    return lines


def _export_file(
    run: str | os.PathLike, file: pathlib.Path, dtype: str, card: bool, licence: str
) -> list[str]:
    """Write a model as one file, which `vit-scale` takes wherever it takes a run."""
    if file.suffix != ".safetensors":
        raise UserError(f"--out {file} must end in .safetensors")
    loaded = load_model(run)
    loaded.print_notes()
    description = {
        "classes": list(loaded.classes),
        "step": loaded.step,
        "data": loaded.data,
        "selection": loaded.read_selection(),
    }
    notes = file.with_suffix(".md")
    if card:  # before anything is written, which it may refuse
        _check_replaced(notes)
        rounded = "" if dtype == "float32" else dtype
        text = model_card(loaded, LIBRARY, licence, file.name, rounded=rounded)
    model_file.write_model(file, loaded.params, loaded.cfg, description, dtype)
    size = file.stat().st_size / 1e6
    use = f"; vit-scale predict {file} IMAGE" if loaded.classes else ""
    lines = [f"{file}: {size:.1f} MB, parameters in {dtype}{use}"]
    if card:
        files.write(notes, text.encode())
        lines.append(f"{notes}: its model card")
    return lines


def _check_replaced(card: pathlib.Path) -> None:
    """Raise UserError for a file that isn't a model card, which a card would replace."""
    if card.exists() and not (card.is_file() and card.read_bytes().startswith(b"---\nlicense:")):
        raise UserError(f"the model card would replace {card}, which isn't one: move it away")


EXPORTERS: dict[str, Callable[[str | os.PathLike, pathlib.Path], list[str] | FolderExport]] = {
    "safetensors-timm": _export_timm,
    "safetensors-hf": _export_huggingface,
    "npz": _export_npz,
    "jax": export_jax,
}


def _load_vit(run: str | os.PathLike) -> Pretrained:
    """Load a model. Raises UserError unless it is a ViT with a head, or was trained without one."""
    loaded = load_model(run)
    loaded.print_notes()
    if not isinstance(loaded.model.shape, Shape):
        raise UserError(
            f"{run} is a {loaded.cfg.model.variant}, not a ViT: it can only be exported to jax"
        )
    if not loaded.classes and loaded.cfg.model.classes:
        raise UserError(f"{run} has no classification head to export")
    return loaded


def _named(loaded: Pretrained) -> Arrays:
    """The unrolled parameters by name; fixed position embeddings as learned ones."""
    params = jax.tree.map(np.asarray, unstack(loaded.params))
    shape = loaded.model.shape
    if loaded.cfg.model.posemb == "sincos2d":
        params[POSITIONS] = np.asarray(sincos2d(shape.grid, shape.size.width))
    return named(params)


# Fields of the model block that the first ViT lacks, and their values without them.
FIRST_VIT: dict[str, Any] = PLAIN_BLOCK | {"registers": 0, "pool_heads": None, "pool_mlp": None}


def _first_vit_arrays(loaded: Pretrained, fmt: WeightFormat) -> Arrays:
    """The parameters as arrays of a format that has the first ViT alone. Raises UserError."""
    cfg, shape = loaded.cfg.model, loaded.model.shape
    newer = [f"model.{name}={cfg[name]}" for name in FIRST_VIT if cfg[name] != FIRST_VIT[name]]
    if shape.size.swiglu:
        newer.append("a gated MLP")
    if cfg.gelu == "quick":
        newer.append("model.gelu=quick")
    if cfg.representation and fmt is HUGGINGFACE:
        newer.append(f"model.representation={cfg.representation}")
    if shape.stem and not (shape.stem.is_bit and fmt is GOOGLE):
        newer.append(f"the stem of {cfg.variant}")
    if newer:
        raise UserError(
            f"{loaded.path} has {newer[0]}, which {fmt.title} doesn't support: export to "
            "safetensors-timm"
        )
    params = without_layer_scale(_named(loaded))
    if POSITIONS not in params:
        params[POSITIONS] = np.zeros((*shape.grid, shape.size.width), np.float32)
    for name, kernel in list(params.items()):
        bias = name.removesuffix("kernel") + "bias"
        if re.match(r"(?!stem/).*/kernel$", name) and bias not in params:
            outputs = kernel.shape[1:] if re.search("query|key|value", name) else kernel.shape[-1:]
            params[bias] = np.zeros(outputs, np.float32)
    return to_arrays(fmt, params, shape.size.depth)


def _write_folder(folder: pathlib.Path, export: FolderExport, licence: str, push: str) -> None:
    card = model_card(export.loaded, export.library, licence, push, export.lines[1:])
    _check_replaced(folder / hub.CARD)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in export.contents.items():
        write_json(folder / name, content)
    write_safetensors(folder / SAFETENSORS, export.arrays)
    files.write(folder / hub.CARD, card.encode())

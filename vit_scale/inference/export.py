"""A trained model for others: files that timm, transformers and Google's code load, or a function.

What comes out computes the same logits there. Where the other code computes something else than
was trained (another epsilon, another GELU), a line says so. What it has no place for is refused.
"""

import copy
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable

import jax
import numpy as np
from jax import export as jax_export

from vit_scale.augment.view import View, view
from vit_scale.config import image_size
from vit_scale.data import are_files
from vit_scale.errors import USAGE, UserError, nearest
from vit_scale.inference.predictor import Predictor, decode_size, load
from vit_scale.models.build import build
from vit_scale.models.parameters import named, unstack
from vit_scale.models.position_embeddings import sincos2d
from vit_scale.models.spec import Shape
from vit_scale.pretrained import (
    Pretrained,
    formats,
    key_mapping,
    load_model,
    preprocessing,
    sidecar_files,
    weight_files,
)
from vit_scale.pretrained.key_mapping import WeightFormat
from vit_scale.runs.json_files import write_json
from vit_scale.storage import files, paths
from vit_scale.storage.errors import user_errors

PLATFORMS = ("cpu", "cuda", "tpu")
SNIPPET = """\
from jax import export
import numpy as np
model = export.deserialize(bytearray(open({path!r}, "rb").read()))
images = np.zeros((8, {height}, {width}, 3), np.uint8)  # any number of them
probabilities = model.call(images)"""


def export(run: str | os.PathLike, kind: str, out: str | os.PathLike) -> list[str]:
    """Write the model of `run` to `out` in the format `kind`; lines that say how to use it.

    Raises UserError for an unknown format, a model that the format has no place for, and a place
    that can't be written.
    """
    if kind not in EXPORTERS:
        raise UserError(f"--format {kind!r} is unknown; {nearest(kind, EXPORTERS)}", USAGE)
    place = paths.parse(out)
    if paths.in_bucket(place):
        raise UserError(f"--out {out}: export to a disk, then copy it there")
    with user_errors(f"cannot write {place}"):
        place.parent.mkdir(parents=True, exist_ok=True)
        return EXPORTERS[kind](run, place)


def _timm(run: str | os.PathLike, folder: pathlib.Path) -> list[str]:
    given = _vit(run)
    arrays = _arrays(given, formats.TIMM)
    seen, notes = _seen(given, "shorter")
    content = sidecar_files.timm(given.cfg, given.classes, seen)
    _write_folder(folder, arrays, {"config.json": content})
    lines = [f'{folder}: timm.create_model("local-dir:{folder}", pretrained=True)']
    if given.cfg.model.norm_epsilon != 1e-6:
        lines.append(
            f"its norms add {given.cfg.model.norm_epsilon:g}, which timm's config can't say: there "
            "it is 1e-6, and logits differ; set eps of every LayerNorm after loading"
        )
    return lines + notes


def _huggingface(run: str | os.PathLike, folder: pathlib.Path) -> list[str]:
    given = _vit(run)
    if given.cfg.model.pool != "cls":
        raise UserError(f"transformers' ViT has pool=cls only, this is {given.cfg.model.pool}")
    if given.cfg.model.distilled:
        raise UserError(
            "transformers' ViT has no distillation token, this model has: export to timm"
        )
    arrays = _arrays(given, formats.HUGGINGFACE)
    seen, notes = _seen(given, "shortest_edge")
    height, width = image_size(given.cfg)
    if seen.fit == "shortest_edge" and height != width:
        seen = seen._replace(fit="stretch")
        notes.append(
            f"transformers stretches images to {height} x {width}; here their shape is kept "
            "(eval.fit), and it sees other pixels"
        )
    contents = {
        "config.json": sidecar_files.huggingface(given.cfg, given.classes),
        "preprocessor_config.json": sidecar_files.preprocessor(given.cfg, seen),
    }
    _write_folder(folder, arrays, contents)
    name = "transformers.ViTForImageClassification"
    return [f'{folder}: {name}.from_pretrained("{folder}")', *notes]


def _seen(given: Pretrained, fit: str) -> tuple[View, list[str]]:
    """What evaluation sees of an image, as code that cuts as `fit` has it, and what it has not."""
    whole = decode_size(given, given.cfg) == image_size(given.cfg)
    files = not given.data or are_files(given.cfg.data)
    return preprocessing.exported(view(given.cfg.eval), fit, files, whole)


def _npz(run: str | os.PathLike, file: pathlib.Path) -> list[str]:
    given = _vit(run)
    if file.suffix != ".npz":
        raise UserError(f"--out {file}: the name of a .npz file ends so")
    if given.cfg.model.class_token or given.cfg.model.distilled:
        raise UserError("a .npz has a [CLS] token only as what the head reads: export to timm")
    dialect = formats.BIG_VISION if given.cfg.model.pool == "map" else formats.GOOGLE
    weight_files.write_npz(file, _arrays(given, dialect))
    write_json(file.with_suffix(".json"), sidecar_files.own(given.cfg, given.classes))
    lines = [f"{file}: in the layout of {dialect.text}; the .json beside it says what that can't"]
    for name, theirs in dialect.model.items():
        if given.cfg.model[name] != theirs:
            lines.append(
                f"it was trained with model.{name}={given.cfg.model[name]}; {dialect.text} "
                f"computes with {theirs}, and gets other logits"
            )
    return lines


def _jax(run: str | os.PathLike, file: pathlib.Path) -> list[str]:
    predictor = portable(load(run))
    (batch,) = jax_export.symbolic_shape("b")
    height, width = predictor.size
    images = jax.ShapeDtypeStruct((batch, height, width, 3), np.uint8)
    function = jax.jit(lambda images: predictor.probabilities(predictor.params, images))
    artifact = jax_export.export(function, platforms=PLATFORMS)(images)
    files.write(file, bytes(artifact.serialize()))
    names = {"classes": list(predictor.classes), "size": [height, width]}
    write_json(file.with_name(file.name + ".json"), names)
    snippet = SNIPPET.format(path=str(file), height=height, width=width)
    return [f"{file}: for {', '.join(PLATFORMS)}; the classes are in {file.name}.json", snippet]


def portable(predictor: Predictor) -> Predictor:
    """The same function, of nothing that only some devices have: the artifact is for all."""
    cfg = copy.deepcopy(predictor.cfg)
    cfg.model.attention = "xla"
    return dataclasses.replace(predictor, cfg=cfg, model=build(cfg.model, predictor.size))


EXPORTERS: dict[str, Callable[[str | os.PathLike, pathlib.Path], list[str]]] = {
    "safetensors-timm": _timm,
    "safetensors-hf": _huggingface,
    "npz": _npz,
    "jax": _jax,
}


def _vit(run: str | os.PathLike) -> Pretrained:
    """The model of a run, if it is a ViT with a head."""
    given = load_model(run)
    given.print_notes()
    if not isinstance(given.model.shape, Shape):
        raise UserError(f"{run} is no ViT but {given.cfg.model.variant}: it goes out as jax only")
    if not given.classes:
        raise UserError(f"{run} has no head to export")
    return given


def _arrays(given: Pretrained, dialect: WeightFormat) -> key_mapping.Arrays:
    """The parameters as the dialect has them; fixed positions become stored ones."""
    params = jax.tree.map(np.asarray, unstack(given.params))
    shape = given.model.shape
    if given.cfg.model.posemb == "sincos2d":
        params["posemb"] = np.asarray(sincos2d(shape.grid, shape.size.width))
    representation = given.cfg.model.representation
    if representation and dialect in (formats.TIMM, formats.HUGGINGFACE):
        raise UserError(
            f"{dialect.text} has no layer between pooling and head; this model has one, "
            f"model.representation={representation}"
        )
    arrays = key_mapping.write(dialect, named(params), shape.size.depth)
    if not shape.fc_norm:
        return arrays
    if not dialect.fc_norm:
        raise UserError(f"{dialect.text} has no norm after pooling (model.fc_norm)")
    after, before = dialect.fc_norm
    return {re.sub(rf"^{before}\.", f"{after}.", name): x for name, x in arrays.items()}


def _write_folder(
    folder: pathlib.Path, arrays: key_mapping.Arrays, contents: dict[str, dict]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_json(folder / name, content)
    weight_files.write_safetensors(folder / weight_files.MODEL, arrays)

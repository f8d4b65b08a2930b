"""Export a model as a function for JAX alone, which needs none of this package."""

import copy
import dataclasses
import os
import pathlib

import jax
import numpy as np
from jax import export as jax_export

from vit_scale.inference.predictor import Predictor, load
from vit_scale.models.build import build
from vit_scale.runs.json_files import write_json
from vit_scale.storage import files

PLATFORMS = ("cpu", "cuda", "tpu")
SNIPPET = """\
from jax import export
import numpy as np
model = export.deserialize(bytearray(open({path!r}, "rb").read()))
images = np.zeros((8, {height}, {width}, 3), np.uint8)  # any batch size
probabilities = model.call(images)"""


def export_jax(run: str | os.PathLike, file: pathlib.Path) -> list[str]:
    """Write the function from pixels [b, H, W, 3] to probabilities; return lines on its use."""
    predictor = _on_any_platform(load(run))
    (batch,) = jax_export.symbolic_shape("b")
    height, width = predictor.size
    images = jax.ShapeDtypeStruct((batch, height, width, 3), np.uint8)
    function = jax.jit(lambda images: predictor.probabilities(predictor.params, images))
    artifact = jax_export.export(function, platforms=PLATFORMS)(images)
    files.write(file, bytes(artifact.serialize()))
    names = {"classes": list(predictor.classes), "size": [height, width]}
    if predictor.thresholds:
        names |= {"thresholds": list(predictor.thresholds)}
    write_json(file.with_name(file.name + ".json"), names)
    snippet = SNIPPET.format(path=str(file), height=height, width=width)
    return [f"{file}: for {', '.join(PLATFORMS)}; class names are in {file.name}.json", snippet]


def _on_any_platform(predictor: Predictor) -> Predictor:
    """The same predictor with an attention implementation that every platform has."""
    cfg = copy.deepcopy(predictor.cfg)
    cfg.model.attention = "xla"
    return dataclasses.replace(predictor, cfg=cfg, model=build(cfg.model, predictor.size))

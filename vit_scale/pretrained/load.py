"""Load a trained model: from a run of this project, or from external weights."""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vit_scale import checkpoint, config
from vit_scale.distributed.mesh import have_cudnn
from vit_scale.errors import UserError, printable
from vit_scale.models.build import Model, build
from vit_scale.models.lora import adapted, merge
from vit_scale.models.parameters import OBJECTIVE, of_model
from vit_scale.pretrained import hub, model_file
from vit_scale.pretrained.fetch import fetch_weights
from vit_scale.pretrained.hints import NO_HINTS, Hints
from vit_scale.pretrained.import_weights import import_weights
from vit_scale.pretrained.weight_files import SAFETENSORS, SUFFIXES
from vit_scale.storage import paths


class Pretrained(NamedTuple):
    """A trained model, and what is needed to use it.

    Attributes:
      cfg: the config it was trained with. Of external weights, the data block is the default.
      model: its pure functions.
      params: its parameters; the moving average, if the run kept one.
      classes: the names of its outputs: "0", "1", ... if they are unknown, none without a head.
      step: the training step of the checkpoint; 0 for external weights.
      path: the checkpoint folder, or the weight file or folder.
      notes: what was ignored or assumed of external weights.
      data: the description of the training set in the checkpoint; None for external weights.
      source: the address of external weights on the Hugging Face Hub, with their commit; else "".
      owned: what the run's objective trained besides the model, such as MAE's decoder; else {}.
      selection: of a model in one file, what was measured on the split that selects; else None.
    """

    cfg: ConfigDict
    model: Model
    params: dict
    classes: tuple[str, ...]
    step: int
    path: pathlib.Path
    notes: tuple[str, ...] = ()
    data: dict[str, Any] | None = None
    source: str = ""
    owned: dict = {}  # noqa: RUF012
    selection: dict | None = None

    @property
    def run(self) -> pathlib.Path | None:
        """The folder of the run that `path` is a checkpoint of; None for other weights."""
        folder = self.path.parent
        is_checkpoint = folder.name == checkpoint.FOLDER and self.path.name.isdigit()
        return folder.parent if is_checkpoint else None

    def read_selection(self) -> dict[str, Any]:
        """Return what the run measured of this checkpoint on the split that selects; {} if not.

        Raises UserError where that is damaged.
        """
        if self.selection is not None:
            return self.selection
        return checkpoint.read_selection(self.path) if self.run else {}

    def print_notes(self) -> None:
        """Print the notes to standard error."""
        for note in self.notes:
            print(f"vit-scale: {printable(note)}", file=sys.stderr)


def load_model(source: str | os.PathLike, hints: Hints = NO_HINTS) -> Pretrained:
    """Load a run or external weights.

    `source` is a run's folder, of which the newest checkpoint is loaded, or RUN/checkpoints/STEP,
    on disk or in a bucket; or a model that `vit-scale export` wrote as one file; or external
    weights in one of the `formats`, on disk, gs:// or https://: a .npz, .safetensors or PyTorch
    file, or a folder with config.json beside it; or a model on the Hugging Face Hub,
    hf://ORG/NAME[@REVISION][/FILE]. Raises UserError if it is missing, damaged or
    unsupported, or if `hints` are given for a run.
    """
    source = hub.pinned(source)
    path = fetch_weights(source)
    file = path / SAFETENSORS if path and path.is_dir() else path
    if file and (described := model_file.read_description(file)):
        _refuse_hints(source, hints)
        return _load_file(file, described)
    if path:
        imported = import_weights(path, hints)
        address = str(source) if hub.is_address(source) else ""
        origin = (f"{address}, licence: {hub.licence(address) or 'not stated'}",) if address else ()
        return Pretrained(
            imported.cfg,
            imported.model,
            imported.params,
            imported.classes,
            step=0,
            path=path,
            notes=(*origin, *imported.notes),
            source=address,
        )
    _refuse_hints(source, hints)
    return load_run(paths.parse(source))


def _refuse_hints(source: str | os.PathLike, hints: Hints) -> None:
    """Raise UserError for hints about a model of this project, which needs none."""
    fields = {"dialect": hints.format, "tree": hints.tree, "image": hints.trained_size}
    fields |= {"architecture": hints.architecture}
    for field, value in fields.items():
        if value:
            raise UserError(
                f"init.{field} only applies to external weights, and {source} is a run: remove it"
            )


def _load_file(path: pathlib.Path, described: Mapping[str, Any]) -> Pretrained:
    """Load a model that is one file."""
    (first, *_) = jax.local_devices()
    cfg = with_supported_attention(config.from_json(described["config"]), [first])
    return Pretrained(
        cfg,
        build(cfg.model, config.image_size(cfg)),
        model_file.read_params(path, cfg),
        tuple(described["classes"]),
        step=described["step"],
        path=path,
        data=described.get("data"),
        selection=described.get("selection", {}),
    )


def load_run(source: pathlib.Path) -> Pretrained:
    """Load a checkpoint of a run on one device: the moving average if it has one, else the params.

    Adapters are merged into their kernels, so that the model is one without any (lora.rank=0).
    Raises UserError if there is no checkpoint, or it is damaged.
    """
    folder = locate_checkpoint(source)
    description = checkpoint.read_description(folder)
    (first, *_) = jax.local_devices()
    cfg = with_supported_attention(config.from_json(description["config"]), [first])
    cfg.data.path = paths.resolve(cfg.data.path, folder.parent.parent, description.get("cwd", ""))
    plain = build(cfg.model, config.image_size(cfg))
    model = adapted(plain, cfg.lora)
    device = jax.sharding.SingleDeviceSharding(first)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        model.abstract_params,
    )
    tree = "ema" if checkpoint.has_ema(folder) else "params"
    owned = checkpoint.stored_shapes(folder, f"{tree}/{OBJECTIVE}/", device)
    target |= {OBJECTIVE: owned} if owned else {}
    stored = checkpoint.read(folder, {tree: target})[tree]
    params = of_model(stored)
    if cfg.lora.rank:
        params = jax.jit(merge, static_argnums=1)(params, cfg.lora.alpha / cfg.lora.rank)
        cfg.lora.rank = 0
    return Pretrained(
        cfg,
        plain,
        params,
        tuple(description["classes"]),
        step=int(folder.name),
        path=folder,
        data=description.get("data"),
        owned=stored.get(OBJECTIVE, {}),
    )


def with_supported_attention(cfg: ConfigDict, devices: Sequence[jax.Device]) -> ConfigDict:
    """Set the attention of a trained model's config to `xla`, unless the devices have cuDNN.

    So a model that was trained with cuDNN runs everywhere. `cfg` is changed and returned.
    """
    if not have_cudnn(devices):
        cfg.model.attention = "xla"
    return cfg


def locate_checkpoint(source: pathlib.Path) -> pathlib.Path:
    """The checkpoint folder of `source`: itself, or the newest of a run. Raises UserError."""
    if source.parent.name == checkpoint.FOLDER and source.name.isdigit() and source.is_dir():
        return source
    if not (source / "run.json").is_file():
        raise UserError(
            f"{source} is not a run folder, a checkpoint (RUN/checkpoints/STEP) or weights "
            f"({', '.join(SUFFIXES)}, a folder with {SAFETENSORS}, or hf://ORG/NAME on the Hugging "
            "Face Hub)"
        )
    steps = checkpoint.finished_steps(source)
    if not steps:
        raise UserError(f"{source} has no finished checkpoint yet: train it first")
    return source / checkpoint.FOLDER / str(steps[-1])

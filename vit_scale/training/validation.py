"""Check a config before anything is allocated, compiled, or billed.

`validate` makes every check that needs neither data nor weights, and `validate_inputs` those of the
opened data sets; `init_state.check_source` checks the source of the weights. Whatever passes is
built without further checks.
"""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_scale import config, data
from vit_scale.augment import pipeline as augment
from vit_scale.augment.view import view
from vit_scale.config import fields, image_size
from vit_scale.data.targets import CLASSES, VALUE
from vit_scale.distributed.mesh import (
    AnyMesh,
    compiler_options,
    devices_of,
    gpu_generation,
    have_cudnn,
)
from vit_scale.distributed.sharding import batch_rows, check_batch
from vit_scale.errors import UserError, nearest
from vit_scale.models import convnets
from vit_scale.models.position_embeddings import check_method
from vit_scale.models.spec import Shape, resolve
from vit_scale.models.stacked_blocks import remat_policy
from vit_scale.training import objectives, optimizer
from vit_scale.training.feature_measure import check_bank, check_probe
from vit_scale.training.measures import check_memory
from vit_scale.training.objectives.teacher import Teacher, check_teacher_classes
from vit_scale.training.splits import Splits

HOPPER = 9.0  # compute capability of an H100
FROZEN = ("auto", "each", "once")  # of checkpoint.frozen
LOWEST = {
    "steps": 1,
    "data.workers": 0,
    "data.threads": 1,
    "data.cache": 0,
    "data.repeats": 1,
    "optim.accumulate": 1,
    "seed": 0,
    "eval.every": 0,
    "log.every": 1,
    "log.images": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "divergence.patience": 0,
    "divergence.rollbacks": 0,
    "watchdog.compile": 0,
    "watchdog.step": 0,
    "watchdog.storage": 0,
    "watchdog.peer": 0,
}


def validate(cfg: ConfigDict, mesh: AnyMesh) -> None:
    """Check every field of `cfg`, alone and against the others, for training on `mesh`.

    Raises:
      UserError: a value can't work; one line with the field, its value, and the arithmetic.
    """
    check_counts(cfg)
    if cfg.checkpoint.frozen not in FROZEN:
        hint = nearest(cfg.checkpoint.frozen, FROZEN)
        raise UserError(f"checkpoint.frozen={cfg.checkpoint.frozen!r} is unknown; {hint}")
    check_batch("data.batch", cfg.data.batch, mesh, cfg.optim.accumulate)
    validate_evaluation(cfg, mesh)
    augment.check(cfg.augment)
    data.check_crop(cfg)
    check_groups(cfg)
    check_profile(cfg)
    check_method(cfg.init.resample)
    compiler_options(cfg.mesh, mesh)
    check_model(cfg, mesh)
    optimizer.check(cfg.optim, cfg.steps)
    objectives.check(cfg)


def check_groups(cfg: ConfigDict) -> None:
    """Raise UserError for a batch that does not consist of whole pairs."""
    if cfg.augment.mix == "pair" and cfg.data.batch % 2:
        raise UserError(f"augment.mix=pair needs an even data.batch, not {cfg.data.batch}")


def check_profile(cfg: ConfigDict) -> None:
    """Raise UserError where log.profile is not a range of the run's steps."""
    profile = tuple(cfg.log.profile)
    if len(profile) != 2 or not all(isinstance(n, int) and n >= 0 for n in profile):
        raise UserError(f"log.profile={profile} is not (STEP, STEPS), such as (100, 5)")
    first, steps = profile
    if steps and not 1 <= first <= first + steps - 1 <= cfg.steps:
        raise UserError(
            f"log.profile={profile} are the steps {first} to {first + steps - 1}, and the run has "
            f"steps 1 to {cfg.steps}"
        )


def validate_evaluation(cfg: ConfigDict, mesh: AnyMesh) -> None:
    """Check what evaluation alone reads of `cfg`. Raises UserError."""
    check_batch("eval.batch", cfg.eval.batch, mesh)
    view(cfg.eval)
    check_probe(cfg)


def check_counts(cfg: ConfigDict) -> None:
    """Raise UserError for a count below the smallest that makes sense."""
    values = fields(cfg)
    for name, lowest in LOWEST.items():
        if not values[name] >= lowest:  # also for NaN
            raise UserError(f"{name}={values[name]} must be at least {lowest}")
    if (load := cfg.data.load) and load < 0:
        raise UserError(f"data.load={load} must be at least 0, which is data.resolution")


def check_model(cfg: ConfigDict, mesh: AnyMesh | None = None) -> Shape | convnets.Shape:
    """Check the `model` block and what depends on the kind of model; return the model's shape.

    Without a mesh, what depends on the devices is not checked. Raises UserError.
    """
    shape = resolve(cfg.model, image_size(cfg))
    remat_policy(cfg.model.remat)
    check_combination(cfg, shape, mesh.shape["tensor"] if mesh else 1)
    if mesh:
        check_attention(cfg, mesh, shape)
    return shape


def check_combination(cfg: ConfigDict, shape: Shape | convnets.Shape, tensor: int = 1) -> None:
    """Raise UserError for a field that this kind of model doesn't support, or would ignore.

    `tensor` is the size of the mesh axis of that name.
    """
    name = cfg.model.variant
    required: dict[str, tuple] = {}  # field: (its one possible value, what another would do)
    stem = shape.stem if isinstance(shape, Shape) else None
    if isinstance(shape, convnets.Shape) or (stem and stem.batch_norm):
        frozen = "would leave the batch normalisation of frozen layers updating its statistics"
        split = "splits the batch over which batch normalisation takes its statistics"
        required |= {"optim.accumulate": (1, split), "optim.freeze": ((), frozen)}
        required |= {"optim.train": ("all", frozen), "lora.rank": (0, frozen)}
    if not stem or not stem.is_bit:
        applies = "applies to a hybrid with a ResNet of BiT"
        required |= {"model.stem_epsilon": (config.base().model.stem_epsilon, applies)}
    if isinstance(shape, Shape) and not stem:
        applies = "applies to stems and convnets"
        required |= {"optim.muon_convolutions": (False, applies)}
    if isinstance(shape, convnets.Shape):
        required |= {"optim.layer_decay": (1.0, "applies to the blocks of a ViT")}
        used = ("variant", "classes", "dtype", "head_bias", *convnets.FIELDS)
        required |= {
            f"model.{field}": (value, "applies to a ViT")
            for field, value in config.base().model.items()
            if field not in used
        }
        if cfg.optim.name == "muon" and not cfg.optim.muon_convolutions:
            raise UserError(
                f"optim.name=muon needs the matrices of a ViT, of which {name} has none: set "
                "optim.muon_convolutions=True"
            )
        if tensor > 1:
            raise UserError(
                f"mesh.tensor={tensor} splits attention heads and MLP, of which {name} has none: "
                "set it to 1"
            )
    values = fields(cfg)
    for field, (value, why) in required.items():
        if values[field] != value:
            raise UserError(
                f"{field}={values[field]} {why}: with model.variant={name} it must be {value}"
            )


def check_attention(cfg: ConfigDict, mesh: AnyMesh, shape) -> None:
    """Raise UserError where model.attention=cudnn can't run.

    jax.nn.dot_product_attention has the same requirements, but states them while it is traced. A
    mesh without devices is taken to be of the newest GPUs.
    """
    if cfg.model.attention != "cudnn":
        return
    size, devices = shape.size, devices_of(mesh)
    if not have_cudnn(devices):
        raise UserError(
            "model.attention=cudnn needs NVIDIA GPUs of Ampere or later, and the mesh is of "
            f"{len(devices)} x {devices[0].device_kind}: set model.attention=xla"
        )
    if cfg.model.dtype != "bfloat16":
        raise UserError(
            f"model.attention=cudnn needs model.dtype=bfloat16, not {cfg.model.dtype}: "
            "set that, or model.attention=xla"
        )
    most = 256 if all(gpu_generation(device) >= HOPPER for device in devices) else 128
    heads = {"model.heads": (size.width, size.heads)}
    if shape.pool == "map":
        heads["model.pool_heads"] = (size.width, cfg.model.pool_heads or size.heads)
    if cfg.objective == "mae":
        heads["mae.heads"] = (cfg.mae.width, cfg.mae.heads)
    for field, (width, count) in heads.items():
        if width // count % 8 or width // count > most:
            raise UserError(
                f"width {width} / {count} heads = {width // count}: model.attention=cudnn needs a "
                f"multiple of 8, at most {most}; set {field}, or model.attention=xla"
            )


def validate_inputs(
    cfg: ConfigDict, mesh: Mesh, splits: Splits, teacher: Teacher | None = None
) -> None:
    """Check the opened data sets: their classes, and the shared memory that their batches need.

    Raises UserError.
    """
    for source in filter(None, splits) if cfg.objective not in objectives.SELF_SUPERVISED else ():
        check_classes(source, cfg)
    vectors = cfg.data.target in (CLASSES, VALUE)
    for source in filter(None, splits[1:] if vectors else ()):
        check_memory(source.name, len(source), cfg.model.classes)
    check_teacher_classes(teacher, splits.train.classes)
    train, evaluation = (len(batch_rows(n, mesh)) for n in (cfg.data.batch, cfg.eval.batch))
    if splits.bank:
        check_bank(cfg, lambda *pair: data.share_images(cfg.data, *pair))
    training = (splits.train, train, cfg.steps)
    data.check_shared_memory([training], cfg.data.workers)
    for source in filter(None, splits[1:]):
        part = (source, evaluation, -(-len(source) // cfg.eval.batch))
        # The training pipeline keeps its prefetched batches, but not for the final evaluation.
        during = splits.selection and source is not splits.final
        data.check_shared_memory([training, part] if during else [part], cfg.data.workers)


def check_classes(source: data.Source, cfg: ConfigDict) -> None:
    """Raise UserError where the model has more or fewer outputs than the data set has classes."""
    classes, outputs = len(source.classes), cfg.model.classes
    if classes != outputs:
        what = "numbers an image" if cfg.data.target == VALUE else "classes"
        raise UserError(
            f"{source.name} has {classes} {what}, the model model.classes={outputs}; "
            f"train it with --config.model.classes={classes}, or give another set"
        )

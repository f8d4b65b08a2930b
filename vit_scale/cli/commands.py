"""The verbs of the command line: call the rest of the package and print.

A verb gets the parsed arguments and the overrides as "FIELD=VALUE", and refuses overrides that it
would ignore. Imports are inside the verbs, so that --help and typing errors don't wait for jax.
"""

import json
import sys
from collections.abc import Sequence

from vit_scale.distributed import preemption, profile_request
from vit_scale.errors import USAGE, UserError, printable

LIKELIEST = 5  # classes that `predict` prints
UNUSED = {"data.train", "data.batch", "eval.split", "eval.every", "eval.probe", "eval.bank"}


def train(args, overrides: Sequence[str]) -> None:
    preemption.install()
    profile_request.install()
    from vit_scale import api, checkpoint, config
    from vit_scale.runs import report
    from vit_scale.storage import paths

    join_hosts(args)
    workdir = paths.parse(args.workdir or api.default_workdir(args.config))
    fields = as_fields(overrides)
    results = api.train(
        args.config, workdir, quiet=args.quiet, watchdog=True, until=args.until, **fields
    )
    if not args.quiet and not results:
        latest = max(checkpoint.finished_steps(workdir), default=0)
        print(f"{workdir}: saved after step {latest:,}; without --until it continues")
    elif not args.quiet:
        stages = config.load(args.config, overrides).stages
        rows = report.rows([workdir / stage for stage in stages] or [workdir])
        print(report.table(rows))
        print(json.dumps({"runs": rows}))


def evaluate(args, overrides: Sequence[str]) -> None:
    from vit_scale import api
    from vit_scale.runs import report

    refuse_unused(overrides, "eval", EVAL, args.split)
    join_hosts(args)
    fields = as_fields(overrides)
    result = api.evaluate(args.run, args.split, real=args.real, quiet=args.quiet, **fields)
    if args.quiet:
        return
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['set']}: {report.format_results(result)} (step {result['step']:,})")


def probe(args, overrides: Sequence[str]) -> None:
    from vit_scale import api
    from vit_scale.evaluation import accuracy_rows
    from vit_scale.runs import report

    refuse_unused(overrides, "probe", PROBE, args.split)
    join_hosts(args)
    result = api.probe(
        args.run,
        args.train,
        args.split,
        knn=args.knn,
        temperature=args.temperature,
        feature=args.feature,
        layer=args.layer,
        shots=args.shots,
        draws=args.draws,
        only=args.only,
        cache=args.cache,
        quiet=args.quiet,
        **as_fields(overrides),
    )
    if args.quiet:
        return
    if args.json:
        print(json.dumps(result))
        return
    layer = "after the last block" if result["layer"] is None else f"after block {result['layer']}"
    print(
        f"{result['set']} by {result['train_n']:,} images of {result['train']}: "
        f"{result['dimensions']} features, {result['feature']}, {layer} (step {result['step']:,})"
    )
    if rows := accuracy_rows(result):
        print(report.table(rows))
    if statistics := result.get("statistics"):
        names = ("effective_rank", "alignment", "uniformity")
        values = {name: statistics[name] for name in names if statistics[name] is not None}
        texts = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        print(f"{', '.join(texts)}, n {statistics['n']:,}")


def as_fields(overrides: Sequence[str]) -> dict[str, str]:
    """Return overrides "FIELD=VALUE" by field.

    Raises UserError for an unknown field, and for one without a value.
    """
    from vit_scale import config

    fields: dict[str, str] = {}
    for item in overrides:
        name, equals, value = item.partition("=")
        config.check_field(name)
        if not equals:
            raise UserError(f"--config.{name} needs a value: --config.{name}=VALUE", USAGE)
        fields[name] = value
    return fields


def predict(args, overrides: Sequence[str]) -> None:
    from vit_scale.inference.predictor import load

    refuse(overrides, "predict")
    predictor = load(args.run)
    predictor.check_head()
    one_class = predictor.target == "class"
    count = LIKELIEST if one_class else len(predictor.classes)
    predictions = {image: predictor.top(image, count) for image in args.images}
    marked = {image: predictor.mark(top) for image, top in predictions.items()}
    if not args.json:
        for image, top in predictions.items():
            print(printable(image))
            print_prediction(top, predictor.target, marked[image])
        return
    contents: dict = {image: by_class(top) for image, top in predictions.items()}
    if predictor.target == "classes":
        contents = {
            image: {"probabilities": content, "marked": marked[image]}
            for image, content in contents.items()
        }
    print(json.dumps(contents))


def print_prediction(top: Sequence[tuple[str, float]], target: str, marked: Sequence[str]) -> None:
    """Print numbers, or the likeliest classes; of several an image, a star at those it has."""
    if target == "value":
        for name, value in top:
            print(f"  {value:12.6g}  {printable(name)}")
        return
    for rank, (name, probability) in enumerate(top):
        if rank < LIKELIEST or name in marked:
            star = "* " if name in marked else "  "
            print(f"  {100 * probability:6.2f} %{star}{printable(name)}")


def by_class(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return probabilities by class name; the second of two classes of one name is "NAME (2)"."""
    probabilities: dict[str, float] = {}
    for name, probability in top:
        count = sum(other == name for other, _ in top[: len(probabilities)])
        probabilities[f"{name} ({count + 1})" if count else name] = probability
    return probabilities


def inspect(args, overrides: Sequence[str]) -> None:
    from vit_scale.inspect import format_rows, inspect
    from vit_scale.runs import report

    refuse_unused(overrides, "inspect", INSPECT, args.split)
    result = inspect(args.runs, args.images, args.split, args.out, overrides, args.wandb)
    if args.json:
        print(json.dumps(result))
        return
    print(report.table(format_rows(result["runs"])))
    for note in result["notes"]:
        print(note)
    print(result["page"])


def show(args, overrides: Sequence[str]) -> None:
    if bool(args.runs) == bool(args.config):
        raise UserError("show takes RUN folders or --config NAME; see vit-scale show --help", USAGE)
    if args.json:
        refuse_flags(args, "show --json", "markdown")
    (show_runs if args.runs else show_config)(args, overrides)


def show_runs(args, overrides: Sequence[str]) -> None:
    """Print a table of the results of runs, and what their time was spent on."""
    from vit_scale.runs import goodput, report

    refuse(overrides, "show RUN")
    refuse_flags(args, "show RUN", "sharding", "devices")
    rows = report.rows(args.runs)
    spent = {str(run): used for run in args.runs if (used := report.goodput(run))}
    if args.json:
        print(json.dumps({"runs": rows, "goodput": spent}))
        return
    print(report.table(rows, args.markdown))
    for run, used in spent.items() if not args.markdown else ():
        print(f"\n{run}: {goodput.format_summary(used)}")


def show_config(args, overrides: Sequence[str]) -> None:
    """Print the sizes, costs, and fields of a config, or the sharding of its parameters."""
    from vit_scale import api, config
    from vit_scale.runs import report
    from vit_scale.training.setup import make_setup, parameter_layout

    refuse_flags(args, "show --config", "markdown")
    cfg = config.load(args.config, overrides)
    if args.sharding:
        layout = parameter_layout(make_setup(cfg, args.devices))
        print(json.dumps(layout) if args.json else report.layout_table(layout))
        return
    content = api.show_named(args.config, list(overrides))
    if args.devices:  # raises UserError where the config can't train on that many
        for stage in cfg.stages or ("",):
            name = f"{args.config}:{stage}" if stage else args.config
            make_setup(config.load(name, overrides), args.devices)
    if args.json:
        print(json.dumps(content))
    else:
        for key, value in config.dotted(content).items():
            print(f"{key:24} {value}")


def plan(args, overrides: Sequence[str]) -> None:
    from vit_scale import plan
    from vit_scale.plan import table, topology

    where = topology.parse(args.topology, args.slices)
    if args.compare:
        refuse_flags(args, "plan --compare", "fit")
        rows = plan.compare(args.config, overrides, args.compare, where, args.price)
        print(json.dumps({"variants": rows}) if args.json else table.format_comparison(rows))
        return
    result = plan.plan(args.config, overrides, where, args.price)
    if args.fit and not result["fits"]:
        result = plan.fit(result, where, args.price, lambda line: print(line, file=sys.stderr))
    print(json.dumps(result) if args.json else table.format_plan(result))


def verify(args, overrides: Sequence[str]) -> None:
    from vit_scale.runs import report, verify

    refuse(overrides, "verify")
    rows = verify.verify(args.run)
    bad = [row["file"] for row in rows if row["state"] != "whole"]
    try:
        print(json.dumps({"files": rows}) if args.json else report.table(rows), flush=True)
    finally:
        if bad:  # also where nobody reads the table to its end
            raise UserError(
                f"{args.run}: {len(bad)} of {len(rows)} are damaged ({', '.join(bad)}); training "
                "resumes from the newest whole checkpoint"
            )


def convert(args, overrides: Sequence[str]) -> None:
    from vit_scale import pretrained

    if args.list == bool(args.out):
        raise UserError("convert takes SOURCE and OUT, or SOURCE and --list", USAGE)
    if args.list:
        refuse_unused(overrides, "convert --list", LIST, None)
        hints = pretrained.convert_hints(overrides)
        print("\n".join(pretrained.listing(pretrained.load_model(args.source, hints))))
        return
    run, rows = pretrained.convert(args.source, args.out, overrides)
    shape, classes = run.model.shape, len(run.classes)
    vit = f", patch {shape.patch}, pool {shape.pool}" if hasattr(shape, "patch") else ""
    text = f"{args.out}: {shape.size}{vit}, {classes} classes"
    print("\n".join([*run.notes, pretrained.adaptation_table(rows), text]))


def average(args, overrides: Sequence[str]) -> None:
    from vit_scale import api

    if bool(args.greedy) != bool(args.split):
        raise UserError("--greedy and --split SPLIT, which it selects by, go together", USAGE)
    if args.greedy:
        refuse_unused(overrides, "average", SOUP, args.split)
    else:
        refuse(overrides, "average without --greedy")
    fields = as_fields(overrides)
    api.average(args.runs, args.out, split=args.split, wise_ft=args.wise_ft, quiet=False, **fields)
    print(args.out)


def export(args, overrides: Sequence[str]) -> None:
    from vit_scale.inference.export import export

    refuse(overrides, "export")
    push = (args.push, args.private, args.license)
    lines = export(args.run, args.format, args.out, *push, dtype=args.dtype, card=args.card)
    print("\n".join(lines))


def refuse(overrides: Sequence[str], verb: str) -> None:
    """Raise UserError if there are overrides."""
    if overrides:
        raise UserError(f"vit-scale {verb} takes no --config.{overrides[0]}", USAGE)


# (blocks and fields of a run's config that a verb reads, those in them that it ignores). A run's
# model, optimizer, and augmentation can't be overridden.
SOUP = (("data", "eval", "mesh", "init.classes", "augment.mean", "augment.std"), UNUSED)
EVAL = ((*SOUP[0], "init.resample"), UNUSED)
OF_WEIGHTS = ("init.dialect", "init.tree", "init.image", "init.architecture", "model.heads")
PROBE = (
    ("data", "eval", "mesh", "augment.mean", "augment.std", "init.resample", *OF_WEIGHTS),
    UNUSED,
)
LIST = ((*OF_WEIGHTS, "data.resolution", "data.width"), UNUSED)
INSPECT = (
    ("data", "eval", "log.project", "init.classes", "augment.mean", "augment.std"),
    UNUSED - {"data.train"},
)


def refuse_unused(overrides: Sequence[str], verb: str, fields: tuple, split: str | None) -> None:
    """Raise UserError for an override that `verb` would ignore."""
    from vit_scale import config

    (read, unused), schema = fields, config.fields(config.base())
    for override in overrides:
        name = override.partition("=")[0]
        if name not in schema:
            continue  # refused where overrides are applied
        within = any(name == one or name.startswith(f"{one}.") for one in read)
        if not within or name in unused:
            instead = "; give --split" if name == "eval.split" else ""
            if name in ("eval.probe", "eval.bank") and verb != "probe":
                instead = ": vit-scale probe measures features"
            if verb == "probe" and name == "data.train":
                instead = "; give --train"
            if name in OF_WEIGHTS:
                instead = ": vit-scale convert makes a run of the weights with it"
            raise UserError(f"vit-scale {verb} has no use for --config.{name}{instead}", USAGE)
        if name == "eval.final" and split:
            raise UserError(f"--split {split} or --config.{override}, not both", USAGE)


def refuse_flags(args, verb: str, *names: str) -> None:
    """Raise UserError for a flag that `verb` would ignore."""
    for name in names:
        if getattr(args, name):
            raise UserError(f"vit-scale {verb} has no use for --{name}", USAGE)


def join_hosts(args) -> None:
    """Connect the processes of several hosts; all but the first are quiet."""
    from vit_scale.distributed import multihost

    multihost.join(args.coordinator, args.processes, args.process, args.wait)
    args.quiet = getattr(args, "quiet", False) or not multihost.is_first()

"""Resolve and check everything before anything is done, for a run and a dry run alike."""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from launch.tpu import accelerators, bundle, cloud_tpu, gcloud, preflight, secret
from launch.tpu.accelerators import Accelerator
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.flags import PASSED, Values
from launch.tpu.gcloud import Tpu
from launch.tpu.transport import chips_here

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # leaves room for suffixes, up to 63


@dataclass
class Plan:
    args: argparse.Namespace
    target: str  # vm | here | local
    name: str
    run: str  # the run's ID: equal for one name and --workdir, on any machine
    folder: pathlib.Path  # the run's journal, on this machine
    hosts: int
    config: str
    workdir: str
    arguments: list[str]  # of vit-scale
    setup: str  # a command that each worker runs before training
    secrets: dict[str, str]
    code: bundle.Bundle
    show: list[str] = field(default_factory=list)  # by which worker 0 checks the config, if set
    tpu: Tpu | None = None
    zones: list[str] = field(default_factory=list)
    accelerator: Accelerator | None = None
    summary: list[tuple[str, str]] = field(default_factory=list)  # (event, line) to print

    @property
    def price(self) -> float | None:
        """USD per hour for all slices; None if unknown."""
        each = self.accelerator.price if self.accelerator else None
        return None if each is None or self.tpu is None else each * self.tpu.slices


def make_plan(args: argparse.Namespace, overrides: list[str]) -> Plan:
    """Resolve and check the whole request. Raises Stop for anything that cannot work."""
    if not args.config:
        raise Stop(Exit.USAGE, "--config NAME is required; see launch/tpu_vm.sh --help")
    values = Values(args, ROOT)
    config = preflight.check_name(ROOT, args.config)
    file, _, argument = config.partition(":")
    default = f"{pathlib.PurePath(file).stem} {argument}".lower().strip()
    name = values.get("name", re.sub(r"[^a-z0-9]+", "-", default))
    if not NAME.fullmatch(name):
        raise Stop(Exit.USAGE, f"--name {name!r}: use at most 40 of a-z, 0-9 and -, a letter first")
    target, count = choose_target(args, values)
    devices: int | None = count * args.devices
    if target == "here":
        target, devices = here(args)
        name = args.name or name
    tpu, zones, accelerator = (
        resolve_tpu(args, values, name) if target == "vm" else (None, [], None)
    )
    hosts = accelerator.hosts * tpu.slices if tpu and accelerator else count
    if tpu:
        devices = accelerator.devices * tpu.slices if accelerator else None
    show = preflight.show_arguments(config, overrides, devices)
    resolved = preflight.resolve(ROOT, show, install=not args.dry_run)
    workdir = resolve_workdir(args, values, name, ROOT, target)
    run = f"{name}-{digest(workdir)}"
    if args.fresh:
        workdir = f"{workdir}-{digest([config, overrides])}"
    if target == "vm":
        preflight.check_workdir(workdir, hosts, args.existing, args.workdir_is_mounted)
    commands = preflight.check_data(resolved, target != "vm") if resolved else []
    commands = [args.setup] * bool(args.setup) + commands
    secrets = secret.collect(args.secret, args.env_file)
    code = bundle.make(ROOT, secret.redactable(secrets))
    plan = Plan(
        args=args,
        target=target,
        name=name,
        run=run,
        folder=ROOT / "runs" / "tpu" / run,
        hosts=hosts,
        config=config,
        workdir=workdir,
        arguments=["train", "--config", config, "--workdir", workdir, *overrides],
        setup=" && ".join(commands),
        secrets=secrets,
        code=code,
        show=show if resolved is None and target == "vm" else [],
        tpu=tpu and dataclasses.replace(tpu, labels=cloud_tpu.labels(run)),
        zones=zones,
        accelerator=accelerator,
    )
    plan.summary = describe(plan, values, resolved)
    return plan


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def choose_target(args: argparse.Namespace, values: Values) -> tuple[str, int]:
    """Return vm, here or local, and for local the number of workers."""
    word, _, number = args.target.partition(":")
    if not re.fullmatch(r"auto|vm|here|local(:0*[1-9]\d*)?", args.target):
        raise Stop(Exit.USAGE, f"invalid --target {args.target}: use auto, vm, here or local:N")
    if word == "local":
        return "local", int(number or 1)
    if args.target != "auto":
        return args.target, 1
    if values.get("type") or args.existing:
        return "vm", 1
    if chips_here():
        return "here", 1
    missing = "no TPU was requested, and this machine has none: "
    raise Stop(Exit.USAGE, missing + "pass --type v4-32 --zone ZONE, or --target local:4")


def here(args: argparse.Namespace) -> tuple[str, int | None]:
    """Choose between this TPU VM alone and, if it is one host of a slice, the whole slice.

    Returns the target and the number of this host's chips, if known; for a slice, names it in
    `args`.
    """
    environment = metadata()
    if not environment:
        return "here", chips_here()
    accelerator = accelerators.parse(environment.get("ACCELERATOR_TYPE", "v4-8"))
    if accelerator.hosts == 1:
        return "here", accelerator.chips
    names = {"name": "NODE_ID", "zone": "ZONE", "project": "CONSUMER_PROJECT_ID"}
    identity = {key: environment.get(variable, "") for key, variable in names.items()}
    if not all(identity.values()):
        problem = f"this is one host of a {accelerator.type} whose name is unknown: training on "
        problem += "one host hangs; use --existing --name NODE --zone ZONE --type TYPE"
        raise Stop(Exit.USAGE, problem)
    for key, value in {**identity, "type": accelerator.type}.items():
        setattr(args, key, value)
    args.existing = args.internal_ip = True
    return "vm", None


def metadata() -> dict[str, str]:
    """Read a TPU VM's own metadata: NODE_ID, ZONE, ACCELERATOR_TYPE, WORKER_ID ..."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/tpu-env"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    return dict(re.findall(r"^(\w+): '?([^'\n]*)'?$", text, re.M))


def resolve_tpu(
    args: argparse.Namespace, values: Values, name: str
) -> tuple[Tpu, list[str], Accelerator | None]:
    zones = [zone for zone in values.get_or_gcloud("zone", "compute/zone").split(",") if zone]
    if not zones:
        raise Stop(Exit.USAGE, "--zone is required, such as us-central2-b")
    project = values.get_or_gcloud("project", "project")
    kind = values.get("type") or (args.existing and existing_type(values, name, zones[0], project))
    if not kind and not (args.existing and args.dry_run):
        raise Stop(Exit.USAGE, "--type is required, such as v4-32")
    if kind and kind.startswith("tpu"):
        problem = f"{kind}: TPU7x and later are only on GKE"
        raise Stop(Exit.REFUSED, f"{problem}: launch/gke.py --type {kind}")
    accelerator = accelerators.parse(kind, args.price) if kind else None
    if args.num_slices < 1:
        raise Stop(Exit.USAGE, f"--num-slices {args.num_slices} must be at least 1")
    queued = ["--num-slices"] * (args.num_slices > 1)
    queued += ["--best-effort"] * (args.model == "best-effort")
    if queued and args.no_queue:
        raise Stop(Exit.USAGE, f"{queued[0]} needs a queued resource: remove --no-queue")
    tpu = Tpu(
        name=name,
        zone=zones[0],
        project=project,
        type=accelerator.type if accelerator else "",
        runtime=args.runtime or (accelerator.runtime if accelerator else ""),
        model=args.model or "on-demand",
        queue=not args.no_queue and not (args.existing and args.num_slices == 1),
        slices=args.num_slices,
        valid_until=f"{args.valid_until:.0f}s" if args.valid_until else "",
        internal_ip=args.internal_ip,
        iap=args.iap,
        flags=create_flags(args, values.get("service_account")),
    )
    return tpu, zones, accelerator


def create_flags(args: argparse.Namespace, account: str) -> tuple[str, ...]:
    """Return the flags that gcloud's create command gets as they are."""
    named = {name: getattr(args, name.replace("-", "_")) for name in PASSED}
    named |= {"service-account": account, "scopes": "cloud-platform" if account else ""}
    return (*(f"--{name}={value}" for name, value in named.items() if value), *args.gcloud_flag)


def existing_type(values: Values, name: str, zone: str, project: str) -> str:
    """Ask the API for an existing TPU VM's type; "" if it cannot be described."""
    if values.args.dry_run:
        return ""
    result = gcloud.run(gcloud.describe(Tpu(name, zone, project, queue=False)), timeout=60)
    values.sources["type"] = "the TPU VM itself"
    return json.loads(result.out).get("acceleratorType", "") if result.code == 0 else ""


def resolve_workdir(args, values: Values, name: str, root: pathlib.Path, target: str) -> str:
    if args.workdir:
        values.sources["workdir"] = "flag"
        local = target != "vm" and "://" not in args.workdir
        return str(pathlib.Path(args.workdir).resolve()) if local else args.workdir
    if bucket := values.get("bucket"):
        if not bucket.startswith("gs://"):
            raise Stop(Exit.BAD_INPUT, f"BUCKET={bucket} must be gs://NAME")
        values.sources["workdir"] = values.sources["bucket"]
        return f"{bucket.rstrip('/')}/{name}"
    return "" if target == "vm" else str(root / "runs" / name)


def describe(plan: Plan, values: Values, resolved: dict | None) -> list[tuple[str, str]]:
    """Summarize every resolved value with its source."""
    checked = "to be checked by worker 0" if plan.show else "not checked here"
    sources, lines = values.sources, [f"config {plan.config}, {checked}"]
    if resolved:
        batch = f"global batch {resolved['global_batch']}"
        size = f"{resolved['parameters'] / 1e6:.1f} M parameters"
        steps = sum(stage["steps"] for stage in preflight.stages(resolved).values())
        lines = [f"config {plan.config}: {size}, {batch}, {steps} steps"]
    lines.append(f"workdir {plan.workdir} ({sources.get('workdir', 'default')})")
    if plan.tpu and plan.accelerator:
        tpu, slice_ = plan.tpu, plan.accelerator
        many, each = (f"{tpu.slices} x ", " each") if tpu.slices > 1 else ("", "")
        size = f"{slice_.chips} chips, {slice_.hosts} hosts{each}"
        kind = f"type {many}{slice_.type} ({sources['type']}): {size}"
        model = "existing" if plan.args.existing else tpu.model
        runtime = f"runtime {tpu.runtime} ({'flag' if plan.args.runtime else 'table'})"
        zones = f"zone {', '.join(plan.zones)} ({sources['zone']})"
        project = f"{tpu.project or 'of gcloud'} ({sources.get('project', 'gcloud config')})"
        lines += [f"{kind}, {model}, {runtime}", f"{zones}, project {project}"]
    elif plan.tpu:
        lines.append(f"type: that of TPU VM {plan.name}, once described")
    else:
        lines.append(f"{plan.hosts} workers on this machine")
    code = f"code {plan.code.description}, {plan.code.sha[:12]}"
    lines.append(f"{code}, {len(plan.code.data) / 1e6:.1f} MB")
    if names := plan.code.left_out:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"left out, as they hold keys: {', '.join(names[:5])}{more}")
    if plan.setup:
        lines.append(f"setup on each worker: {plan.setup}")
    if plan.secrets:
        lines.append(f"secrets over stdin: {', '.join(sorted(plan.secrets))}")
    summary = [("resolve", line) for line in lines]
    return [*summary, ("cost", cost_line(plan))] if plan.tpu else summary


def cost_line(plan: Plan) -> str:
    args, price = plan.args, plan.price
    if price is None and args.max_cost:
        raise Stop(Exit.USAGE, "--max-cost needs a price: pass --price USD_PER_CHIP_HOUR")
    rate = "price unknown (pass --price USD_PER_CHIP_HOUR)"
    if price is not None:
        bound = "at most " if plan.tpu and plan.tpu.model == "spot" and args.price is None else ""
        source = "--price" if args.price is not None else accelerators.PRICE_SOURCE
        rate = f"{bound}${price:.2f}/h ({source})"
    limits = [f"{args.max_hours:g} h"] * bool(args.max_hours)
    limits += [f"${args.max_cost:g}"] * bool(args.max_cost)
    policy = "the machine is kept"
    if not args.existing:
        policy = f"on success: {args.on_success}, on failure: {args.on_failure}, "
        policy += f"on Ctrl-C: {args.on_interrupt or 'detach'}"
    return f"{rate}, limit {' and '.join(limits) or 'none'}; {policy}"

"""What is run on the workers, as text: a dry run prints it, and a run runs it."""

import hashlib
import pathlib
import shlex

from launch.tpu import gcloud, preflight
from launch.tpu.flags import seconds
from launch.tpu.plan import ROOT, Plan
from launch.tpu.transport import HOME, agent_command

AGENT = ROOT / "launch" / "agent.sh"
INCOMING = f"{HOME}/incoming/"


def prime(sha: str) -> str:
    """The first thing that a worker is asked; it says "have" where the code is there."""
    code = f"{HOME}/code/{sha}"
    return f"mkdir -p {INCOMING} && if test -d {code}; then echo have; else echo ready; fi"


def install() -> str:
    """Put the agent in its place, if it arrived whole."""
    sha = hashlib.sha256(AGENT.read_bytes()).hexdigest()
    check = f"echo {sha}  {INCOMING}agent.sh | sha256sum -c --status"
    return f"{check} && mv -f {INCOMING}agent.sh {HOME}/agent.sh && {agent_command('install')}"


def prepare(plan: Plan) -> str:
    extra = "tpu" if plan.target != "local" else ""
    return agent_command("prepare", plan.code.sha, extra, "" if plan.unchecked else plan.setup)


def show(plan: Plan) -> str:
    """What the config comes to, on a worker: where this machine can't say."""
    return agent_command(
        "show", plan.code.sha, *preflight.show(plan.config, plan.overrides, plan.devices)
    )


def start(plan: Plan, attempt: int, port: int, arguments: list[str]) -> str:
    """`arguments` are those that tell this worker who it is."""
    return agent_command(
        "start", plan.run, attempt, plan.code.sha, port, *plan.arguments, *arguments
    )


def port(run: str, attempt: int) -> int:
    """Another one for each attempt: the one before may not have let go of its own."""
    return 20000 + int(hashlib.sha256(f"{run} {attempt}".encode()).hexdigest(), 16) % 12000


def code_file(plan: Plan) -> pathlib.Path:
    return plan.folder / f"{plan.code.sha}.tgz"


def dry_run(plan: Plan) -> list[str]:
    """Every command of a run of one attempt, in order; of the workers, the first."""
    tpu = plan.tpu
    if tpu is None:
        return [shlex.join(["vit-scale", *plan.arguments])]
    node = tpu.nodes[0]

    def ssh(text: str) -> str:
        return gcloud.line(gcloud.ssh(tpu, node, 0, text))

    files = [str(AGENT), str(code_file(plan))]
    lines = [gcloud.line(gcloud.describe(tpu))]
    if not plan.args.existing:
        lines.append(gcloud.line(gcloud.create(tpu)))
    if tpu.queue:
        lines += [gcloud.line(gcloud.describe_node(tpu, name)) for name in tpu.nodes]
    lines += [
        ssh(prime(plan.code.sha)),
        gcloud.line(gcloud.copy(tpu, node, 0, files, INCOMING)),
        ssh(install()),
    ]
    if not plan.args.existing and plan.args.orphan:
        lines.append(ssh(reap(plan, tpu)))
    lines += [ssh(agent_command("status", plan.run, "last")), ssh(prepare(plan))]
    if plan.unchecked:
        lines.append(ssh(show(plan)))
    if plan.secrets:
        names = " ".join(f"{name}=..." for name in sorted(plan.secrets))
        lines.append(f"{ssh(agent_command('secrets', plan.run))} <<< '{names} #END'")
    lines.append(ssh(start(plan, 1, port(plan.run, 1), [])))
    if not plan.args.existing:
        lines.append(gcloud.line(gcloud.delete(tpu)))
    return lines


def reap(plan: Plan, tpu: gcloud.Tpu) -> str:
    """Worker 0 deletes the machine where its launcher is gone for good, unless it is to be kept."""
    kept = [ending.partition(":")[::2] for ending in (plan.args.on_success, plan.args.on_failure)]
    if ("keep", "") in kept:
        return agent_command("disarm", plan.run)
    longest = max(seconds(duration or "0") for _, duration in kept)
    patience = max(plan.args.orphan, longest + 600 if longest else 0)
    return agent_command("reap", plan.run, int(patience), *gcloud.delete(tpu))

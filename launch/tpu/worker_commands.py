"""Commands for the workers, as text: a run executes them, a dry run prints them."""

import hashlib
import shlex

from launch.tpu import gcloud
from launch.tpu.flags import seconds
from launch.tpu.plan import ROOT, Plan
from launch.tpu.transport import HOME, agent_command

AGENT = ROOT / "launch" / "agent.sh"
INCOMING = f"{HOME}/incoming/"


def probe(sha: str) -> str:
    """Open the first connection; the worker prints "have" if it has the code."""
    code = f"{HOME}/code/{sha}"
    folders = f"umask 077 && mkdir -p {INCOMING} {HOME}/code {HOME}/runs {HOME}/data"
    return f"{folders} && if test -d {code}; then echo have; else echo ready; fi"


def receive(name: str, content: bytes) -> str:
    """Receive a file over standard input, which is empty if gcloud repeats the call."""
    check = f"echo {hashlib.sha256(content).hexdigest()}  {INCOMING}{name} | sha256sum -c --status"
    return f"umask 077 && cat >{INCOMING}{name} && {check}"


def install() -> str:
    """Receive the agent."""
    received = receive("agent.sh", AGENT.read_bytes())
    return f"{received} && mv -f {INCOMING}agent.sh {HOME}/agent.sh"


def prepare(plan: Plan) -> str:
    extra = "tpu" if plan.target != "local" else ""
    return agent_command("prepare", plan.code.sha, extra, "" if plan.show else plan.setup)


def show(plan: Plan) -> str:
    """Resolve the config on a worker, if this machine cannot."""
    return agent_command("show", plan.code.sha, *plan.show)


def start(plan: Plan, attempt: int, port: int, arguments: list[str]) -> str:
    """Start an attempt; `arguments` identify this worker to the others."""
    own = [*plan.arguments, *arguments]
    return agent_command("start", plan.run, attempt, plan.code.sha, port, *own)


def port(run: str, attempt: int) -> int:
    """Choose a port by attempt: the previous attempt may still hold its own."""
    return 20000 + int(hashlib.sha256(f"{run} {attempt}".encode()).hexdigest(), 16) % 12000


def dry_run(plan: Plan) -> list[str]:
    """List every command of a run with one attempt, in order; of the workers', the first's."""
    tpu = plan.tpu
    if tpu is None:
        return [shlex.join(["vit-scale", *plan.arguments])]
    node = tpu.nodes[0]

    def ssh(text: str) -> str:
        return shlex.join(gcloud.ssh(tpu, node, 0, text))

    cloud = [gcloud.describe(tpu)]
    cloud += [gcloud.create(tpu)] * (not plan.args.existing)
    cloud += [gcloud.describe(tpu, name) for name in tpu.nodes] * tpu.queue
    lines = [*map(shlex.join, cloud), ssh(probe(plan.code.sha))]
    lines.append(shlex.join(gcloud.ssh_lines(tpu, node)))
    lines.append(f"{ssh(receive(f'{plan.code.sha}.tgz', plan.code.data))} <<< 'the code'")
    lines.append(f"{ssh(install())} <<< 'launch/agent.sh'")
    if not plan.args.existing and plan.args.orphan:
        lines.append(ssh(reap(plan, tpu)))
    lines += [ssh(agent_command("status", plan.run, "last")), ssh(prepare(plan))]
    if plan.show:
        lines.append(ssh(show(plan)))
    if plan.secrets:
        names = " ".join(f"{name}=..." for name in sorted(plan.secrets))
        lines.append(f"{ssh(agent_command('secrets', plan.run))} <<< '{names} #END'")
    lines.append(ssh(start(plan, 1, port(plan.run, 1), [])))
    if not plan.args.existing:
        lines.append(shlex.join(gcloud.delete(tpu)))
    return lines


def reap(plan: Plan, tpu: gcloud.Tpu) -> str:
    """Have worker 0 delete the machine if its launcher never returns, unless it is to be kept."""
    kept = [policy.partition(":")[::2] for policy in (plan.args.on_success, plan.args.on_failure)]
    if ("keep", "") in kept:
        return agent_command("disarm", plan.run)
    longest = max(seconds(duration or "0") for _, duration in kept)
    patience = max(plan.args.orphan, longest + 600 if longest else 0)
    return agent_command("reap", plan.run, int(patience), *gcloud.delete(tpu))

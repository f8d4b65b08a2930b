"""gcloud's commands: one builder each, which a dry run prints and a real run runs; and its errors.

gcloud decides by text what happened, with the same code for opposite remedies, so that the table of
ERRORS matches text. `ssh --worker=all` is never used: it hides which host failed, runs a command
again where a connection broke, and does not return where one host hangs.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TPUS = ["gcloud", "compute", "tpus"]
SSH = (
    "-oConnectTimeout=15",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
    "-oBatchMode=yes",
)

# The first pattern that is found decides.
ERRORS = (
    (r"has terminal state|currently in state .?PREEMPTED", "gone"),
    (r"no more capacity in the zone|not enough resources available|stockout", "stockout"),
    (r"Quota limit .* exceeded|Quota '.*' (exceeded|exhausted)|quota .* exceeded", "quota"),
    (r"Insufficient reserved capacity", "quota"),
    (
        r"authenticated account to use|reauth|not currently have an active account"
        r"|gcloud auth login|invalid_grant|UNAUTHENTICATED",
        "auth",
    ),
    (r"SSH Key is not present in the SSH agent", "agent"),
    (r"Permission denied \(publickey", "key"),
    (r"has not been used in project|SERVICE_DISABLED|it is disabled", "api"),
    (r"is not found or access is unauthorized|Location .* not found", "zone"),
    (r"Permission '?.*'? denied|PERMISSION_DENIED|does not have permission", "permission"),
    (r"ALREADY_EXISTS|already exists", "exists"),
    (r"NOT_FOUND|was not found|not found: projects", "absent"),
    (r"INVALID_ARGUMENT|is not a valid|Invalid value|unrecognized arguments", "invalid"),
)
# gcloud says so after each 401, 403 and 404, whatever the reason was.
ACCOUNT = re.compile(r"[. ]*This command is authenticated (as|with) [^\n]*")
REMEDIES = {
    "quota": "ask for quota (console, IAM & Admin, Quotas), take another zone or type, or look for "
    "leftovers that still use it: launch/tpu_vm.sh gc",
    "auth": "run: gcloud auth login",
    "agent": "run: ssh-add ~/.ssh/google_compute_engine",
    "key": "the machine does not take this account's key: gcloud compute config-ssh, or with OS "
    "Login the role OS Admin Login",
    "api": "run: gcloud services enable tpu.googleapis.com",
    "zone": "give a --zone that offers this type: gcloud compute tpus locations list",
    "permission": "this account needs the role TPU Admin in the project",
    "invalid": "see --type, --runtime and --zone",
}


class Result(NamedTuple):
    code: int  # 124: it took too long, and was ended
    out: bytes
    err: str


class ApiError(Exception):
    """What gcloud refused; `kind` is of ERRORS, or "transient"."""

    def __init__(self, kind: str, line: str):
        super().__init__(line)
        self.kind = kind


@dataclass(frozen=True)
class Tpu:
    """A slice, or several, as it is asked for."""

    name: str
    zone: str
    project: str
    type: str
    runtime: str
    model: str = "on-demand"  # spot | reserved | on-demand
    queue: bool = True  # a queued resource, or a node made at once
    slices: int = 1
    valid_until: str = ""
    internal_ip: bool = False
    iap: bool = False
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    data_disk: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """The names of its nodes, by slice."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{number}" for number in range(self.slices)]

    @property
    def where(self) -> list[str]:
        project = ["--project", self.project] if self.project else []
        return ["--zone", self.zone, *project]


def create(tpu: Tpu) -> list[str]:
    if tpu.queue:
        nodes = ["--node-id", tpu.name]
        if tpu.slices > 1:
            nodes = ["--node-count", str(tpu.slices), "--node-prefix", tpu.name]
        kind, runtime = ["queued-resources", "create", tpu.name, *nodes], "--runtime-version"
    else:
        kind, runtime = ["tpu-vm", "create", tpu.name], "--version"
    command = [*TPUS, *kind, *tpu.where, "--accelerator-type", tpu.type, runtime, tpu.runtime]
    if tpu.model != "on-demand":
        command.append(f"--{tpu.model}")
    if tpu.queue and tpu.valid_until:
        command += ["--valid-until-duration", tpu.valid_until]
    labels = ",".join(f"{key}={value}" for key, value in sorted(tpu.labels.items()))
    command += ["--labels", labels]
    if tpu.internal_ip:
        command.append("--internal-ips")
    for name in ("network", "subnetwork", "service_account", "data_disk"):
        if value := getattr(tpu, name):
            command += [f"--{name.replace('_', '-')}", value]
    if tpu.service_account:
        command += ["--scopes", "cloud-platform"]
    return [*command, "--async", "--quiet"]


def describe(tpu: Tpu) -> list[str]:
    kind = "queued-resources" if tpu.queue else "tpu-vm"
    return [*TPUS, kind, "describe", tpu.name, *tpu.where, "--format=json"]


def describe_node(tpu: Tpu, node: str) -> list[str]:
    return [*TPUS, "tpu-vm", "describe", node, *tpu.where, "--format=json"]


def delete(tpu: Tpu) -> list[str]:
    kind, force = ("queued-resources", ["--force"]) if tpu.queue else ("tpu-vm", [])
    return [*TPUS, kind, "delete", tpu.name, *tpu.where, *force, "--quiet", "--async"]


def renew(tpu: Tpu, node: str, expires: str) -> list[str]:
    command = [*TPUS, "tpu-vm", "update", node, *tpu.where]
    return [*command, "--update-labels", f"expires={expires}", "--async", "--quiet"]


def listing(kind: str, zone: str, project: str) -> list[str]:
    """`kind` is queued-resources or tpu-vm."""
    where = Tpu("", zone, project, "", "").where
    return [*TPUS, kind, "list", *where, "--format=json"]


def ssh(tpu: Tpu, node: str, worker: int, command: str = "") -> list[str]:
    flags = [f"--ssh-flag={flag}" for flag in SSH]
    run = ["--command", command] if command else []
    start = [*_tpu_vm(tpu), "ssh", node, *tpu.where, "--worker", str(worker)]
    return [*start, *_ssh_route(tpu), *flags, *run]


def copy(tpu: Tpu, node: str, worker: int, files: list[str], folder: str) -> list[str]:
    flags = [f"--scp-flag={flag}" for flag in SSH]
    start = [*_tpu_vm(tpu), "scp", *files, f"{node}:{folder}", *tpu.where]
    return [*start, "--worker", str(worker), *_ssh_route(tpu), *flags]


def _tpu_vm(tpu: Tpu) -> list[str]:
    """Only the alpha commands go through IAP to a TPU VM."""
    return ["gcloud", "alpha", "compute", "tpus", "tpu-vm"] if tpu.iap else [*TPUS, "tpu-vm"]


def _ssh_route(tpu: Tpu) -> list[str]:
    if tpu.iap:
        return ["--tunnel-through-iap"]
    return ["--internal-ip"] if tpu.internal_ip else []


def line(command: list[str]) -> str:
    """The command as one would type it."""
    return shlex.join(command)


def kind_of(text: str) -> str:
    return next((kind for pattern, kind in ERRORS if re.search(pattern, text, re.I)), "transient")


def error(text: str) -> ApiError:
    """The typed error of what gcloud printed, without whom it had asked for: see ACCOUNT."""
    text = ACCOUNT.sub("", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "")
    said = re.sub(r"^ERROR: (\(gcloud[\w.-]*\) )?", "", said)
    return ApiError(kind_of(text), said[:400] or "gcloud said nothing")


def run(command: list[str], stdin: bytes = b"", timeout: float | None = None) -> Result:
    """Run a command apart from the terminal, so that Ctrl-C is the launcher's alone.

    It is ended, with all that it started, after `timeout` seconds; Result.code is 124 then, and
    127 where there is no such program.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Result(127, b"", f"{command[0]}: {error.strerror}")
    try:
        out, err = process.communicate(stdin, timeout=timeout)
        return Result(process.returncode, out, err.decode(errors="replace"))
    except subprocess.TimeoutExpired as expired:
        _end(process)
        said = (expired.stderr or b"").decode(errors="replace").strip().splitlines()
        detail = f": {said[-1]}" if said else ""
        lines = [*said[:-1], f"no answer in {timeout:.0f} s{detail}"]
        return Result(124, b"", "\n".join(lines))
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:  # not read to its end: what it left behind may hold it open
            with contextlib.suppress(OSError):
                stream.close()

"""Build and run gcloud commands, and classify their errors.

gcloud uses one exit code for errors with opposite remedies, so ERRORS matches their text.
`ssh --worker=all` only prints ssh's command lines here: to run a command it hides which host
failed, reruns it after a dropped connection, and does not return while one host hangs.
"""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

TPUS = ["gcloud", "compute", "tpus"]
# Flags of `create` that only gcloud alpha has.
ALPHA = {"best-effort", "boot-disk", "reservation", "provisioning-model", "max-run-duration"}
ALPHA |= {"network-config", "autocheckpoint-enabled", "workload-type"}
SSH = ("ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4", "BatchMode=yes")
CHATTER = re.compile(r"^(Using ssh batch|SSH: Attempting|Warning: Permanently added).*\n", re.M)
RATE_LIMIT = r"quota metric|rate.?limit.?exceeded|too many requests|per.?minute"
RATE_LIMIT += r"|\bHTTP(Error)? 429\b|'status': '429'"

# (pattern, kind): the first match decides.
ERRORS = (
    (RATE_LIMIT, "transient"),
    (r"has terminal state|currently in state .?PREEMPTED", "gone"),
    (r"no more capacity in the zone|not enough resources available|stockout", "stockout"),
    (r"Quota limit .* exceeded|Quota '.*' (exceeded|exhausted)|quota .* exceeded", "quota"),
    (r"Insufficient reserved capacity", "quota"),
    (r"authenticated account to use|reauth|not currently have an active account", "auth"),
    (r"gcloud auth login|invalid_grant|UNAUTHENTICATED", "auth"),
    (r"SSH Key is not present in the SSH agent", "agent"),
    (r"Permission denied \(publickey", "key"),
    (r"has not been used in project|SERVICE_DISABLED|it is disabled", "api"),
    (r"is not found or access is unauthorized|Location .* not found", "zone"),
    (r"Permission '?.*'? denied|PERMISSION_DENIED|does not have permission", "permission"),
    (r"ALREADY_EXISTS|already exists", "exists"),
    (r"NOT_FOUND|was not found|not found: projects", "absent"),
    (r"INVALID_ARGUMENT|is not a valid|Invalid value|unrecognized arguments", "invalid"),
)
# gcloud appends this to every 401, 403 and 404.
ACCOUNT = re.compile(r"[. ]*This command is authenticated (as|with) [^\n]*")
REMEDIES = {
    "missing": "install it: https://cloud.google.com/sdk",
    "quota": "request quota (console: IAM & Admin, Quotas), choose another zone or type, or delete "
    "leftovers that still use it: launch/tpu_vm.sh gc",
    "auth": "run: gcloud auth login",
    "agent": "run: ssh-add ~/.ssh/google_compute_engine",
    "key": "the machine rejects the key: run gcloud compute config-ssh (with OS Login, the "
    "account needs the role OS Admin Login)",
    "api": "run: gcloud services enable tpu.googleapis.com",
    "zone": "choose a --zone that offers this type: https://cloud.google.com/tpu/docs/regions-zones",
    "permission": "this account needs the role TPU Admin in the project",
    "invalid": "check --type, --runtime and --zone",
}
NOT_STARTED = 256  # the code of a program that could not be started; no process has it


class Result(NamedTuple):
    code: int  # 124: timed out
    out: bytes
    err: str


class ApiError(Exception):
    """An error of gcloud; `kind` is one of ERRORS, or "transient"."""

    def __init__(self, kind: str, line: str):
        super().__init__(line)
        self.kind = kind


@dataclass(frozen=True)
class Tpu:
    """The slice, or slices, to request."""

    name: str
    zone: str
    project: str
    type: str = ""
    runtime: str = ""
    model: str = "on-demand"  # a key of flags.PROVISIONING
    queue: bool = True  # a queued resource, or a TPU VM created directly
    slices: int = 1
    valid_until: str = ""
    internal_ip: bool = False
    iap: bool = False
    flags: tuple[str, ...] = ()  # others of gcloud's create
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """Node names, one per slice."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{number}" for number in range(self.slices)]

    @property
    def location(self) -> list[str]:
        return ["--zone", self.zone, *(["--project", self.project] if self.project else [])]


def create(tpu: Tpu) -> list[str]:
    labels = ",".join(f"{key}={value}" for key, value in sorted(tpu.labels.items()))
    flags = [f"--{tpu.model}"] * (tpu.model != "on-demand")
    flags += [*tpu.flags, *["--internal-ips"] * tpu.internal_ip, "--labels", labels]
    alpha = any(flag[2:].partition("=")[0] in ALPHA for flag in flags)
    if alpha and tpu.model == "spot":
        flags.append("--provisioning-model=spot")  # else gcloud alpha 528 asks for standard as well
    kind, runtime = "tpu-vm", "--version"
    if tpu.queue:
        kind, runtime = "queued-resources", "--runtime-version"
        many = ["--node-count", str(tpu.slices), "--node-prefix", tpu.name]
        flags += many if tpu.slices > 1 else ["--node-id", tpu.name]
        flags += ["--valid-until-duration", tpu.valid_until] * bool(tpu.valid_until)
    command = ["gcloud", *["alpha"] * alpha, *TPUS[1:], kind, "create", tpu.name, *tpu.location]
    required = ["--accelerator-type", tpu.type, runtime, tpu.runtime]
    return [*command, *required, *flags, "--async", "--quiet"]


def describe(tpu: Tpu, node: str = "") -> list[str]:
    """Describe the request, or one of its nodes."""
    kind = "queued-resources" if tpu.queue and not node else "tpu-vm"
    return [*TPUS, kind, "describe", node or tpu.name, *tpu.location, "--format=json"]


def delete(tpu: Tpu) -> list[str]:
    kind, force = ("queued-resources", ["--force"]) if tpu.queue else ("tpu-vm", [])
    return [*TPUS, kind, "delete", tpu.name, *tpu.location, *force, "--quiet", "--async"]


def renew(tpu: Tpu, node: str, expires: str) -> list[str]:
    command = [*TPUS, "tpu-vm", "update", node, *tpu.location]
    return [*command, "--update-labels", f"expires={expires}", "--async", "--quiet"]


def listing(kind: str, location: list[str]) -> list[str]:
    """List resources of `kind`, queued-resources or tpu-vm, at the `location` of a Tpu."""
    return [*TPUS, kind, "list", *location, "--format=json"]


def ssh(tpu: Tpu, node: str, worker: int | str, command: str = "") -> list[str]:
    """Run a command on a worker, or open a shell; only gcloud alpha goes through IAP."""
    start = ["gcloud", *["alpha"] * tpu.iap, *TPUS[1:], "tpu-vm", "ssh", node, *tpu.location]
    route = ["--tunnel-through-iap"] if tpu.iap else ["--internal-ip"] * tpu.internal_ip
    flags = [f"--ssh-flag=-o{option}" for option in SSH]
    run = ["--command", command] if command else []
    return [*start, "--worker", str(worker), *route, *flags, *run]


def ssh_lines(tpu: Tpu, node: str) -> list[str]:
    """Print, for each of a node's workers, the command line of ssh that runs `true` there."""
    return [*ssh(tpu, node, "all", "true"), "--dry-run"]


def error(text: str) -> ApiError:
    """Classify what gcloud printed to stderr, ignoring its note about the account."""
    text = ACCOUNT.sub("", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "")
    message = re.sub(r"^ERROR: (\(gcloud[\w.-]*\) )?", "", message)
    kinds = (kind for pattern, kind in ERRORS if re.search(pattern, text, re.I))
    return ApiError(next(kinds, "transient"), message[:400] or "gcloud printed no error")


def run(command: list[str], stdin: bytes = b"", timeout: float | None = None) -> Result:
    """Run a command in its own session, so that Ctrl-C reaches only the launcher.

    After `timeout` seconds its process group is killed and the code is 124; it is NOT_STARTED if
    there is no such program. The output goes to files: a surviving child may hold it open.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": out, "stderr": err}
        try:
            process = subprocess.Popen(command, start_new_session=True, **streams)
        except OSError as error:
            return Result(NOT_STARTED, b"", f"{command[0]}: {error.strerror}")
        try:
            process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            lines = _written(err).decode(errors="replace").strip().splitlines()
            detail = f": {lines[-1]}" if lines else ""
            lines = [*lines[:-1], f"no answer in {timeout:.0f} s{detail}"]
            return Result(124, b"", "\n".join(lines))
        except BaseException:
            _end(process)
            raise
        return Result(process.returncode, _written(out), _written(err).decode(errors="replace"))


def _written(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

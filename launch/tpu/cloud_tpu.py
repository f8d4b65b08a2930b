"""A Cloud TPU resource: its status, creation, and deletion until it is gone.

`create` is asynchronous, and its operation may never finish although the machine exists: only
`describe` is trusted.
"""

import dataclasses
import json
import os
import random
import shlex
import time
from typing import NamedTuple

from launch.tpu import gcloud
from launch.tpu.clock import Clock, elapsed
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.gcloud import ApiError, Tpu
from launch.tpu.journal import Journal

TERMINAL = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDING", "HIDDEN")
RECOVERING = ("REPAIRING", "RESTARTING", "REIMAGING", "STARTING", "UNKNOWN")
CODES = dict.fromkeys(("quota", "zone", "invalid", "api"), Exit.REFUSED)
CODES |= dict.fromkeys(("auth", "permission", "agent", "key", "missing"), Exit.NOT_PERMITTED)
TRIES, LONGEST = 12, 60  # for an API that does not answer; seconds between the last tries
DELETION = 1200  # seconds a deletion may take
EXPIRES = 24 * 3600  # seconds until `gc` may delete a machine, unless its launcher renews the label
WORST_FIRST = ("gone", "recovering", "waiting", "unhealthy", "ready")  # of a machine's nodes


class Status(NamedTuple):
    """The status of a machine.

    `kind` is absent, waiting, ready, unhealthy (READY, but reports poor health), recovering, gone
    (will not recover), failed (the request was), or not_ours (the name belongs to another run).
    """

    kind: str
    detail: str
    hosts: list[tuple[str, int]] = []  # noqa: RUF012, [(node, number of workers)]
    created: str = ""
    labels: dict = {}  # noqa: RUF012


def refuse(error: ApiError) -> Stop:
    """Return the Stop for an error that waiting cannot mend, with its remedy."""
    remedy = gcloud.REMEDIES.get(error.kind, "")
    return Stop(CODES.get(error.kind, Exit.INFRASTRUCTURE), f"{error}; {remedy}".rstrip("; "))


def count_hosts(node: dict) -> int:
    """Count a node's hosts: it lists one endpoint for each network card of each host."""
    endpoints, cards = node.get("networkEndpoints", []), node.get("networkConfigs", [])
    return len(endpoints) // max(1, len(cards))


class CloudTpu:
    """The slices of `tpu`. `owned`: created by this launcher, which may delete them."""

    def __init__(self, tpu: Tpu, clock: Clock, journal: Journal, owned: bool = False):
        self.tpu, self.clock, self.journal, self.owned = tpu, clock, journal, owned
        self.missing = 0  # consecutive status checks in which a node was missing

    def call(self, argv: list[str], patience: int = TRIES) -> bytes:
        """Run gcloud and return its output, retrying transient errors. Raises ApiError."""
        delay = 1.0
        while True:
            self.journal.write("gcloud", argv=argv)
            result = gcloud.run(argv, timeout=self.clock.limit(120))
            if result.code == 0:
                return result.out
            if result.code in (127, gcloud.NOT_STARTED):  # 127: gcloud's own Python is missing
                raise ApiError("missing", "gcloud is missing")
            error = gcloud.error(result.err)
            patience -= 1
            if error.kind != "transient" or patience <= 0:
                raise error
            self.journal.write("retry", error=str(error))
            self.clock.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(2 * delay, LONGEST)

    def describe(self, node: str = "", patience: int = TRIES) -> dict | None:
        """Describe the request, or a node; None if it does not exist. Raises Stop if refused."""
        argv = gcloud.describe(self.tpu, node)
        try:
            return json.loads(self.call(argv, patience))
        except ApiError as error:
            if error.kind == "absent":
                return None
            raise refuse(error) from None
        except ValueError:
            raise Stop(Exit.INFRASTRUCTURE, f"invalid JSON from: {shlex.join(argv)}") from None

    def is_ours(self, labels: dict) -> bool:
        """Return whether these labels are this run's, or any run's if the run is unknown."""
        run = self.tpu.labels.get("run")
        return labels.get("managed-by") == "vit_scale" and run in (None, labels.get("run"))

    def status(self, patience: int = TRIES) -> Status:
        resource = self.describe(patience=patience)
        if self.tpu.queue and resource:
            return self._request(resource, patience)
        if self.tpu.queue:
            return self._without_request(patience)
        if resource is None:
            return Status("absent", f"TPU {self.tpu.name} does not exist")
        if resource.get("queuedResource") and self.is_ours(resource.get("labels", {})):
            self.tpu = dataclasses.replace(self.tpu, queue=True)  # requested by a queue
            return self.status(patience)
        return self._node(self.tpu.name, resource)

    def _without_request(self, patience: int) -> Status:
        """Check for nodes without a request: left over, created without a queue, or another's."""
        for name in self.tpu.nodes:
            node = self.describe(name, patience)
            if node is None:
                continue
            status = self._node(name, node)
            if self._is_leftover(node):
                return status._replace(kind="gone", detail=f"node {name} outlived its request")
            if self.is_ours(status.labels) and self.tpu.slices == 1:
                self.tpu = dataclasses.replace(self.tpu, queue=False)
                return status
            return status._replace(kind="not_ours", detail=f"TPU VM {name} is not this run's")
        return Status("absent", f"TPU {self.tpu.name} does not exist")

    def _is_leftover(self, node: dict) -> bool:
        """Return whether the node belongs to this request, which no longer exists."""
        labels, request = node.get("labels", {}), node.get("queuedResource", "")
        named = request.rpartition("/")[2] == self.tpu.name and not labels.get("run")
        return bool(request) and (named or self.is_ours(labels))

    def _request(self, request: dict, patience: int) -> Status:
        state = request.get("state", {}).get("state", "")
        labels = labels_of(request)
        if state == "FAILED":
            error = request["state"].get("failedData", {}).get("error", {}).get("message", "")
            return Status("failed", error or "the queued resource FAILED", labels=labels)
        if state in ("SUSPENDING", "SUSPENDED", "DELETING"):
            return Status("gone", f"its queued resource is {state}", labels=labels)
        if state != "ACTIVE":
            return Status("waiting", state or "no state reported yet", labels=labels)
        status = self._nodes(node_names(request), patience)
        return status if status.labels else status._replace(labels=labels)

    def _nodes(self, names: list[str], patience: int) -> Status:
        nodes = {name: self.describe(name, patience) for name in names}
        # It may not be listed yet, or be gone although its request is still ACTIVE.
        self.missing = 0 if all(nodes.values()) else self.missing + 1
        kind = "gone" if self.missing >= 3 else "waiting"
        statuses = [
            self._node(name, node) if node else Status(kind, f"node {name} does not exist")
            for name, node in nodes.items()
        ]
        hosts = [host for status in statuses for host in status.hosts]
        worst = min(statuses, key=lambda status: WORST_FIRST.index(status.kind))
        return worst._replace(hosts=hosts)

    def _node(self, name: str, node: dict) -> Status:
        state, health = node.get("state", "UNKNOWN"), node.get("health", "")
        common: dict = {"created": node.get("createTime", ""), "labels": node.get("labels", {})}
        common["hosts"] = [(name, count_hosts(node))]
        if state in TERMINAL:
            return Status("gone", f"node {name} is {state}", **common)
        if state in RECOVERING:
            return Status("recovering", f"node {name} is {state}", **common)
        if state != "READY":
            return Status("waiting", f"node {state}", **common)
        if health.startswith("UNHEALTHY"):
            description = node.get("healthDescription") or health
            return Status("unhealthy", f"node {name}: {description}", **common)
        return Status("ready", "node READY", **common)

    def create(self) -> bool:
        """Request the machine; False if the name exists already, whoever owns it.

        Raises ApiError.
        """
        self.journal.say("acquire", f"requesting {self.tpu.name} in {self.tpu.zone}")
        labels = {**self.tpu.labels, "expires": expiry()}
        self.tpu = dataclasses.replace(self.tpu, labels=labels)
        try:
            self.call(gcloud.create(self.tpu), patience=5)
        except ApiError as error:
            if error.kind != "exists":
                raise
            return False
        return True

    def delete(self) -> None:
        """Delete it and wait until it is gone. Raises Stop if it remains."""
        if not self.owned:
            return
        began, requested = self.clock.now(), False
        while self.clock.now() - began < DELETION:
            resource = self._exists()
            if resource is None:
                self.journal.write("deleted", zone=self.tpu.zone)
                return
            if not requested or "DELETING" not in json.dumps(resource.get("state", "")):
                requested = self._ask_to_delete(self.tpu) or requested
            self.clock.sleep(10)
        late = f"{self.tpu.name} still exists {elapsed(DELETION)} after its deletion began"
        raise Stop(Exit.INFRASTRUCTURE, f"{late}; run: {shlex.join(gcloud.delete(self.tpu))}")

    def _exists(self) -> dict | None:
        """Return the request or one of its nodes, or None; another run's machine does not count."""
        resource = self.describe()
        if resource is None and self.tpu.queue:  # a node may outlive its request
            for name in self.tpu.nodes:
                node = self.describe(name)
                if node and self._is_leftover(node):
                    resource = node
                    self._ask_to_delete(dataclasses.replace(self.tpu, name=name, queue=False))
            return resource
        return resource if resource and self.is_ours(labels_of(resource)) else None

    def _ask_to_delete(self, tpu: Tpu) -> bool:
        try:
            self.call(gcloud.delete(tpu))
        except ApiError as error:
            if error.kind in CODES:  # another request would be refused as well
                raise refuse(error) from error
            return False
        return True

    def renew(self) -> None:
        """Renew the expiry label. A failure is harmless: `gc` also asks the workers."""
        for node in self.tpu.nodes:
            try:
                self.call(gcloud.renew(self.tpu, node, expiry()), patience=1)
            except (ApiError, Stop) as error:
                self.journal.write("renew", error=str(error))


def node_specs(request: dict) -> list[dict]:
    return request.get("tpu", {}).get("nodeSpec") or [{}]


def node_names(request: dict) -> list[str]:
    """Return the names of a request's nodes; the spec of several nodes only counts them."""
    names, own = [], request["name"].rpartition("/")[2]
    for spec in node_specs(request):
        many = spec.get("multisliceParams") or spec.get("multiNodeParams") or {}
        prefix = many.get("nodeIdPrefix") or own
        several = [f"{prefix}-{number}" for number in range(many.get("nodeCount", 0))]
        names += several or [spec.get("nodeId") or own]
    return names


def labels_of(resource: dict) -> dict:
    """Return the labels of a node, or of a request's first node."""
    return resource.get("labels") or node_specs(resource)[0].get("node", {}).get("labels", {})


def expiry() -> str:
    return str(int(time.time() + EXPIRES))


def owner() -> str:
    """Return the user's name as a label value."""
    name = os.environ.get("USER", "unknown").lower()
    return "".join(c if c.isalnum() else "-" for c in name)[:63]


def labels(run: str) -> dict[str, str]:
    """Return the labels that mark a machine as created for `run`."""
    return {"managed-by": "vit_scale", "run": run, "owner": owner(), "expires": expiry()}

"""The slice in the cloud: how it is, making it, and deleting it until it is gone.

The answer of `create` is not waited for: it may never come though the machine is there. What counts
is what `describe` says.
"""

import dataclasses
import json
import os
import random
import time
from typing import NamedTuple

from launch.tpu import clock as clocks
from launch.tpu import gcloud
from launch.tpu.clock import Clock
from launch.tpu.exit_codes import AUTH, INFRASTRUCTURE, REFUSED, Stop
from launch.tpu.gcloud import ApiError, Tpu
from launch.tpu.journal import Journal

TERMINAL = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDING", "HIDDEN")
SICK = ("REPAIRING", "RESTARTING", "REIMAGING", "STARTING", "UNKNOWN")
CODES = {"quota": REFUSED, "zone": REFUSED, "invalid": REFUSED, "api": REFUSED}
CODES |= {"auth": AUTH, "permission": AUTH, "agent": AUTH, "key": AUTH}
TRIES, LONGEST = 12, 60  # of an API that doesn't answer; seconds between the last tries
DELETION = 1200  # seconds that a deletion may take
EXPIRES = 24 * 3600  # after which `gc` calls a machine forgotten, unless its launcher renews that


class Status(NamedTuple):
    """`kind`: absent, waiting, ready, unhealthy (READY, and says so), sick (may recover), gone
    (never will), failed, foreign (of this name, and not this run's)."""

    kind: str
    detail: str
    hosts: list[tuple[str, int]] = []  # noqa: RUF012, [(node, number of workers)]
    created: str = ""
    labels: dict = {}  # noqa: RUF012


def refuse(error: ApiError) -> Stop:
    """What ends the launcher for an error that waiting does not mend."""
    remedy = gcloud.REMEDIES.get(error.kind, "")
    return Stop(CODES.get(error.kind, INFRASTRUCTURE), f"{error}; {remedy}".rstrip("; "))


def count_hosts(node: dict) -> int:
    """A node with several network cards lists each of them."""
    ends, cards = node.get("networkEndpoints", []), node.get("networkConfigs", [])
    return len(ends) // max(1, len(cards))


class CloudTpu:
    """The slices of `tpu`. `owned`: made by this program, and so deleted by it."""

    def __init__(self, tpu: Tpu, clock: Clock, journal: Journal, owned: bool = False):
        self.tpu, self.clock, self.journal, self.owned = tpu, clock, journal, owned
        self.missing = 0  # looks in a row that missed a node

    def call(self, argv: list[str], patience: int = TRIES) -> bytes:
        """gcloud's output. Raises ApiError; what may pass is tried again before."""
        delay = 1.0
        while True:
            self.journal.write("gcloud", argv=argv)
            result = gcloud.run(argv, timeout=self.clock.limit(120))
            if result.code == 0:
                return result.out
            if result.code == 127:
                raise Stop(AUTH, "gcloud is not installed: https://cloud.google.com/sdk")
            error = gcloud.error(result.err)
            patience -= 1
            if error.kind != "transient" or patience <= 0:
                raise error
            self.journal.write("retry", error=str(error))
            self.clock.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(2 * delay, LONGEST)

    def read_json(self, argv: list[str], patience: int = TRIES) -> dict | None:
        """What a describe command says; None where there is nothing. Raises Stop for a refusal."""
        try:
            return json.loads(self.call(argv, patience))
        except ApiError as error:
            if error.kind == "absent":
                return None
            raise refuse(error) from None
        except ValueError:
            raise Stop(INFRASTRUCTURE, f"no JSON came from: {gcloud.line(argv)}") from None

    def is_ours(self, labels: dict) -> bool:
        """Whether what has these labels is this run's; of any run where none is known."""
        run = self.tpu.labels.get("run")
        return labels.get("managed-by") == "vit_scale" and run in (None, labels.get("run"))

    def status(self, patience: int = TRIES) -> Status:
        found = self.read_json(gcloud.describe(self.tpu), patience)
        if self.tpu.queue:
            return self._request(found, patience) if found else self._without_request(patience)
        if found is None:
            return Status("absent", "there is none")
        if found.get("queuedResource") and self.is_ours(found.get("labels", {})):
            self.tpu = dataclasses.replace(self.tpu, queue=True)  # it was asked for in another way
            return self.status(patience)
        return self._node(self.tpu.name, found)

    def _without_request(self, patience: int) -> Status:
        """A node may outlive what asked for it; or be made without; or be another's."""
        for name in self.tpu.nodes:
            node = self.read_json(gcloud.describe_node(self.tpu, name), patience)
            if node is None:
                continue
            status = self._node(name, node)
            if self._is_leftover(node):
                return status._replace(kind="gone", detail=f"node {name} is left of its request")
            if self.is_ours(status.labels) and self.tpu.slices == 1:
                self.tpu = dataclasses.replace(self.tpu, queue=False)
                return status
            return status._replace(kind="not_ours", detail=f"a TPU VM {name} that is not of it")
        return Status("absent", "there is none")

    def _is_leftover(self, node: dict) -> bool:
        """Whether the node is of this request, which is no more."""
        labels, request = node.get("labels", {}), node.get("queuedResource", "")
        named = request.rpartition("/")[2] == self.tpu.name and not labels.get("run")
        return bool(request) and (named or self.is_ours(labels))

    def _request(self, found: dict, patience: int) -> Status:
        state = found.get("state", {}).get("state", "")
        spec, labels = node_specs(found), labels_of(found)
        names = [
            entry.get("nodeId") or name for entry, name in zip(spec, self.tpu.nodes, strict=False)
        ]
        if state == "FAILED":
            error = found["state"].get("failedData", {}).get("error", {}).get("message", "")
            return Status("failed", error or "the request FAILED", labels=labels)
        if state in ("SUSPENDING", "SUSPENDED", "DELETING"):
            return Status("gone", f"its request is {state}", labels=labels)
        if state != "ACTIVE":
            return Status("waiting", state or "no state yet", labels=labels)
        status = self._nodes(names, patience)
        return status if status.labels else status._replace(labels=labels)

    def _nodes(self, names: list[str], patience: int) -> Status:
        found = {
            name: self.read_json(gcloud.describe_node(self.tpu, name), patience) for name in names
        }
        # It may not be listed yet, or be gone while its request says nothing.
        self.missing = 0 if all(found.values()) else self.missing + 1
        kind = "gone" if self.missing >= 3 else "waiting"
        statuses = [
            self._node(name, node) if node else Status(kind, f"node {name} is not there")
            for name, node in found.items()
        ]
        hosts = [host for status in statuses for host in status.hosts]
        for kind in ("gone", "recovering", "waiting", "unhealthy"):
            for status in statuses:
                if status.kind == kind:
                    return status._replace(hosts=hosts)
        return statuses[0]._replace(hosts=hosts)

    def _node(self, name: str, node: dict) -> Status:
        state, health = node.get("state", "UNKNOWN"), node.get("health", "")
        known: dict = {"created": node.get("createTime", ""), "labels": node.get("labels", {})}
        known["hosts"] = [(name, count_hosts(node))]
        if state in TERMINAL:
            return Status("gone", f"node {name} is {state}", **known)
        if state in SICK:
            return Status("recovering", f"node {name} is {state}", **known)
        if state != "READY":
            return Status("waiting", f"node {state}", **known)
        if health.startswith("UNHEALTHY"):
            said = node.get("healthDescription") or health
            return Status("unhealthy", f"node {name}: {said}", **known)
        return Status("ready", "node READY", **known)

    def create(self) -> bool:
        """Ask for it; False where there is one, whosever that is. Raises Stop, or ApiError for a
        stockout."""
        self.journal.say("acquire", f"asking for {self.tpu.name} in {self.tpu.zone}")
        labels = {**self.tpu.labels, "expires": expiry()}
        self.tpu = dataclasses.replace(self.tpu, labels=labels)
        try:
            self.call(gcloud.create(self.tpu), patience=5)
        except ApiError as error:
            if error.kind == "exists":
                return False
            if error.kind in CODES:
                raise refuse(error) from None
            raise
        return True

    def delete(self) -> None:
        """Delete it, and return when it is gone. Raises Stop where that does not happen."""
        if not self.owned:
            return
        began, requested_ = self.clock.now(), False
        while self.clock.now() - began < DELETION:
            found = self._exists()
            if found is None:
                self.journal.write("deleted", zone=self.tpu.zone)
                return
            if not requested_ or "DELETING" not in json.dumps(found.get("state", "")):
                requested_ = self._ask_to_delete() or requested_
            self.clock.sleep(10)
        raise Stop(
            INFRASTRUCTURE,
            f"{self.tpu.name} is still there {clocks.text(DELETION)} after its deletion began; "
            f"run: {gcloud.line(gcloud.delete(self.tpu))}",
        )

    def _exists(self) -> dict | None:
        """The request or a node of it, as long as there is any; another's of that name is none."""
        found = self.read_json(gcloud.describe(self.tpu))
        if found is None and self.tpu.queue:  # a node may outlive what asked for it
            for name in self.tpu.nodes:
                node = self.read_json(gcloud.describe_node(self.tpu, name))
                if node and self._is_leftover(node):
                    found = node
                    self._delete_node(name)
            return found
        return found if found and self.is_ours(labels_of(found)) else None

    def _delete_node(self, node: str) -> None:
        one = gcloud.Tpu(node, self.tpu.zone, self.tpu.project, "", "", queue=False)
        try:
            self.call(gcloud.delete(one))
        except ApiError as error:
            self.journal.write("delete", error=str(error))

    def _ask_to_delete(self) -> bool:
        try:
            self.call(gcloud.delete(self.tpu))
        except ApiError as error:
            if error.kind not in ("absent", "transient", "exists"):
                self.journal.write("delete", error=str(error))
            return False
        return True

    def renew(self) -> None:
        """Say that the machine is still wanted; where that can't be said, `gc` asks before."""
        for node in self.tpu.nodes:
            try:
                self.call(gcloud.renew(self.tpu, node, expiry()), patience=1)
            except (ApiError, Stop) as error:
                self.journal.write("renew", error=str(error))


def node_specs(request: dict) -> list[dict]:
    return request.get("tpu", {}).get("nodeSpec") or [{}]


def labels_of(found: dict) -> dict:
    """The labels of a node, or of a request's nodes."""
    return found.get("labels") or node_specs(found)[0].get("node", {}).get("labels", {})


def expiry() -> str:
    return str(int(time.time() + EXPIRES))


def owner() -> str:
    """Who uses this program here, as a label says it."""
    name = os.environ.get("USER", "unknown").lower()
    return "".join(c if c.isalnum() else "-" for c in name)[:63]


def labels(run: str) -> dict[str, str]:
    """What marks a machine as this program's; lower case, digits, - and _."""
    return {"managed-by": "vit_scale", "run": run, "owner": owner(), "expires": expiry()}

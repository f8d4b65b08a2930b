"""launch/tpu_vm.sh with the real gcloud and ssh, against a stand-in of the cloud's APIs.

What the fake gcloud of the other tests can't show: the requests that reach the API, what gcloud
makes of its answers, and the quoting on the way to a worker. Each gcloud process takes most of a
second, so a run takes about a minute.
"""

import json
import shlex
import subprocess

import pytest

from tests.helpers.rest_cloud import MISSING, RealRig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]
REQUEST = r"/queuedResources\?"
NODE = r"/nodes\?"


@pytest.fixture
def rig(tmp_path):
    made = RealRig(tmp_path, timelines=[["WAITING_FOR_RESOURCES", "ACTIVE"]])
    made.profile(FAKE_PATIENCE="120")  # two workers start a few gcloud processes apart
    yield made
    made.close()
    made.check()


def run(rig: RealRig, *more: str):
    return rig.run(*more, timeout=900)


def verb(rig: RealRig, *words: str) -> subprocess.CompletedProcess:
    process = rig.start(*words)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_a_run_and_the_verbs(rig):
    """One machine from its request to `delete`, with what a user asks about it on the way."""
    ended = run(rig, "--on-success", "keep")
    assert (ended.code, ended.result["attempts"]) == (0, 1), ended.err
    assert rig.attempts() == {1: [0, 1]}
    (asked,) = rig.requests("POST", REQUEST)
    (spec,) = asked["tpu"]["nodeSpec"]
    assert asked["spot"] == {} and spec["nodeId"] == "vit"
    assert spec["node"]["acceleratorType"] == "v4-16"
    assert spec["node"]["labels"]["managed-by"] == "vit_scale"
    status = json.loads(verb(rig, "status", "--name", "vit", "--json").stdout)
    assert status["machine"] == "node READY"
    assert [worker["step"] for worker in status["workers"]] == [12, 12]
    line = "for i in 1 2; do echo \"$i  of '2'\"; done; echo $FAKE_WORKER"
    shown = verb(rig, "ssh", "--name", "vit", "--", line).stdout.splitlines()
    assert shown == [
        f"[w{worker:02}] {text}"
        for worker in (0, 1)
        for text in ("1  of '2'", "2  of '2'", str(worker))
    ]
    machines = json.loads(verb(rig, "list", "--zones", "us-a", "--json").stdout)["machines"]
    assert [(machine["name"], machine["state"]) for machine in machines] == [("vit", "ACTIVE")]
    assert verb(rig, "gc", "--zone", "us-a", "--yes").stdout.startswith("in use: ")
    doctor = verb(rig, "doctor", "--zone", "us-a", "--type", "v4-16").stdout
    assert "ok   zone us-a offers v4-16" in doctor and "ok   ssh key" in doctor
    deleted = verb(rig, "delete", "--name", "vit", "--yes")
    assert "vit deleted" in deleted.stderr and rig.is_empty()


def test_gc_deletes_a_forgotten_machine(rig):
    """A suspended request keeps its name and its quota until it is deleted."""
    labels = {"managed-by": "vit_scale", "run": "vit-1", "owner": "tester"}
    rig.api.asked["old"] = [{"nodeId": "old", "node": {"labels": labels}}]
    rig.cloud.allocate("us-a", "old", "v4-16", labels, ["old"])
    rig.cloud.requests["us-a/old"].update(state={"state": "SUSPENDED"}, left=[])
    done = verb(rig, "gc", "--zone", "us-a", "--yes")
    assert "deleted: " in done.stdout and rig.is_empty(), done.stdout + done.stderr


def test_several_slices(tmp_path):
    """The API shows a request of two slices as one spec with their number."""
    rig = RealRig(tmp_path, hosts=1, timelines=[["ACTIVE"]])
    rig.profile(FAKE_PATIENCE="120")
    try:
        ended = run(rig, "--num-slices", "2")
        assert (ended.code, rig.attempts()) == (0, {1: [0, 1]}), ended.err
        (asked,) = rig.requests("POST", REQUEST)
        many = {"nodeCount": 2, "nodeIdPrefix": "vit"}
        assert asked["tpu"]["nodeSpec"][0]["multisliceParams"] == many
        assert rig.is_empty()
    finally:
        rig.close()


def test_without_a_queue(rig):
    ended = run(rig, "--no-queue")
    assert (ended.code, rig.attempts()) == (0, {1: [0, 1]}), ended.err
    (asked,) = rig.requests("POST", NODE)
    assert asked["schedulingConfig"]["spot"] is True and rig.requests("POST", REQUEST) == []
    assert rig.is_empty()


def test_a_preempted_machine_is_replaced(rig):
    rig.profile(FAKE_SECONDS="1")
    process = rig.start(*rig.flags())
    rig.wait_for(lambda: (rig.workdir / "checkpoint").exists(), seconds=600)
    rig.cloud.spoil(["preempt:PREEMPTED"])
    ended = rig.end(process, timeout=900)
    assert ended.code == 0 and "node vit is PREEMPTED" in ended.err, ended.err
    assert rig.attempts() == {1: [0, 1], 2: [0, 1]}
    assert len(rig.requests("POST", REQUEST)) == 2 and rig.is_empty()


LIMIT = (
    "error:RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests' and limit "
    "'Read requests per minute' of service 'tpu.googleapis.com' for consumer 'project_number:1'."
)


def test_a_rate_limit_is_waited_out(rig):
    """Neither a refused quota nor a lost worker, during the creation and on the way to workers."""
    rig.inject(
        {"match": "POST .*/queuedResources", "do": LIMIT, "times": 1},
        {"match": "GET .*/nodes/", "do": LIMIT, "nth": 5, "times": 3},
    )
    ended = run(rig)
    assert (ended.code, ended.result["attempts"]) == (0, 1), ended.err
    assert len(rig.requests("POST", REQUEST)) == 2, "the refused one was repeated"
    assert rig.cloud.faults[1]["seen"] > 7, "gcloud itself repeats nothing"


KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
CASES = {
    "metadata and tags": (
        ["--metadata", "a=b,c=d", "--tags", "web,tpu"],
        lambda node, request: (
            (node["metadata"], node["tags"]) == ({"a": "b", "c": "d"}, ["web", "tpu"])
        ),
    ),
    "account and network": (
        ["--service-account", "me@x", "--network", "n", "--subnetwork", "s", "--internal-ip"],
        lambda node, request: (
            node["serviceAccount"] == {"email": "me@x", "scope": ["cloud-platform"]}
            and node["networkConfig"]
            == {"network": "n", "subnetwork": "s", "enableExternalIps": False}
        ),
    ),
    "a disk": (
        ["--data-disk", "source=projects/p/zones/z/disks/d,mode=read-only"],
        lambda node, request: (
            node["dataDisks"] == [{"mode": "READ_ONLY", "sourceDisk": "projects/p/zones/z/disks/d"}]
        ),
    ),
    "the boot disk": (  # alpha, whose create asks for a standard machine as well as for Spot VMs
        ["--boot-disk", f"kms-key={KEY}"],
        lambda node, request: (
            node["bootDiskConfig"]["customerEncryptionKey"] == {"kmsKeyName": KEY}
        ),
    ),
    "another flag": (
        ["--gcloud-flag=--shielded-secure-boot", "--gcloud-flag=--range=10.0.0.0/29"],
        lambda node, request: (
            node["shieldedInstanceConfig"] == {"enableSecureBoot": True}
            and node["cidrBlock"] == "10.0.0.0/29"
        ),
    ),
}
QUEUED = {
    "best effort": (
        ["--best-effort"],
        lambda node, request: request["bestEffort"] == {} and "spot" not in request,
    ),
    "flex-start": (  # of gcloud alpha alone
        [
            "--on-demand",
            "--gcloud-flag=--provisioning-model=flex-start",
            "--gcloud-flag=--max-run-duration=4h",
        ],
        lambda node, request: (
            request["provisioningModel"] == "FLEX_START"
            and request["runDuration"] == {"maxRunDuration": "14400s"}
        ),
    ),
    "until": (
        ["--valid-until", "6h"],
        lambda node, request: request["queueingPolicy"] == {"validUntilDuration": "21600s"},
    ),
}


@pytest.mark.parametrize("queue", [True, False])
def test_flags_of_create_reach_the_api(rig, queue):
    """The command of a dry run, given to gcloud, becomes the request that the flag stands for."""
    cases = {**CASES, **QUEUED} if queue else CASES
    for name, (more, expected) in cases.items():
        flags = [flag for flag in rig.flags() if flag != "--spot" or name not in QUEUED]
        dry = verb(rig, *flags, "--dry-run", *more, *["--no-queue"] * (not queue))
        (line,) = [line for line in dry.stdout.splitlines() if " create " in line]
        before = len(rig.api.calls)
        done = subprocess.run(
            shlex.split(line), env=rig.environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, (name, done.stderr)
        (request,) = [body for method, _, body in rig.api.calls[before:] if method == "POST"]
        node = request["tpu"]["nodeSpec"][0]["node"] if queue else request
        assert expected(node, request), (name, request)
        if name in CASES and queue:
            assert request["spot"] == {}
            assert request.get("provisioningModel", "SPOT") == "SPOT", (name, request)
        rig.cloud.nodes.clear()
        rig.cloud.requests.clear()

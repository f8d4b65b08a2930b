"""The fake cloud behind the APIs that the real gcloud calls, and behind an SSH server.

The Cloud TPU API (v2 and v2alpha1) and the little of the Compute API that `ssh` asks are served on
loopback, from the state of fakes/gcloud.py: the same nodes, requests and workers, and the same
faults, which match "METHOD PATH" here. A worker's address is one of 127.0.0.0/8. The real ssh
connects to it, on another port than 22, and reaches the processes that the fake gcloud starts.
"""

import asyncio
import http.server
import importlib.util
import json
import pathlib
import re
import shutil
import threading
import urllib.parse
from typing import Any

from tests.helpers.fake_cloud import Rig, script
from tests.helpers.fakes.gcloud import TERMINAL, Cloud, Refusal

GCLOUD = shutil.which("gcloud")
NEEDED = {
    "gcloud": GCLOUD,
    "ssh and ssh-keygen (openssh-client)": all(map(shutil.which, ("ssh", "ssh-keygen"))),
    "asyncssh": importlib.util.find_spec("asyncssh"),
}
MISSING = ", ".join(name for name, there in NEEDED.items() if not there)

HTTP = {
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "PERMISSION_DENIED": 403,
    "UNAVAILABLE": 503,
}
ROUTE = re.compile(
    r"/(?:v2|v2alpha1)/projects/(?P<project>[^/]+)/locations/(?P<zone>[^/]+)"
    r"/(?P<kind>queuedResources|nodes|operations|acceleratorTypes)(?:/(?P<name>[^/:]+))?(?P<verb>:\w+)?"
)
PROJECT = {
    "kind": "compute#project",
    "name": "p",
    "commonInstanceMetadata": {"items": []},
    "defaultServiceAccount": "tester@example.org",
}
ENTRIES = {"queuedResources": "requests", "nodes": "nodes"}


class Api:
    """The Cloud TPU API's answers to (method, path, query, body)."""

    def __init__(self, cloud: Cloud):
        self.cloud = cloud
        self.calls: list[tuple[str, str, dict]] = []  # (method, path with query, body)
        self.asked: dict[str, list] = {}  # the node specs of each request, as they were sent

    def answer(self, method: str, address: str, body: dict) -> dict:
        """Return what the API answers. Raises Refusal."""
        self.calls.append((method, address, body))
        url = urllib.parse.urlparse(address)
        self.cloud.spoil(self.cloud.due(f"{method} {url.path}"))
        if url.path.startswith("/compute/"):
            return PROJECT
        match = ROUTE.fullmatch(url.path)
        if not match:
            raise Refusal(f"NOT_FOUND: there is no method {method} {url.path}")
        zone, kind, name = match["zone"], match["kind"], match["name"]
        if kind == "operations":
            return operation(name.split(".")[0], zone, name.split(".")[1])
        if kind == "acceleratorTypes":
            types = [{"type": kind, "name": f"x/{kind}"} for kind in ("v4-8", "v4-16")]
            return {"acceleratorTypes": types}
        query = dict(urllib.parse.parse_qsl(url.query))
        if method == "POST" and match["verb"]:
            return self.guest_attributes(f"{zone}/{name}", body)
        if method == "POST":
            create = self.create_request if kind == "queuedResources" else self.create_node
            return create(zone, query, body)
        if method == "GET":
            show = self.show_request if kind == "queuedResources" else show_node
            if name:
                return show(self.cloud.describe(ENTRIES[kind], zone, name))
            return {kind: [show(entry) for entry in self.cloud.listing(ENTRIES[kind], zone)]}
        if method == "DELETE":
            force = {"--force": "true"} if query.get("force", "").lower() == "true" else {}
            self.cloud.delete(ENTRIES[kind], {"--zone": zone, **force}, name)
            return operation(kind, zone, name)
        for field in query["updateMask"].split(","):
            self.cloud.nodes[f"{zone}/{name}"][field] = body.get(field, {})
        return operation(kind, zone, name)

    def create_request(self, zone: str, query: dict, body: dict) -> dict:
        name, (spec,) = query["queuedResourceId"], body["tpu"]["nodeSpec"]
        many = spec.get("multisliceParams") or spec.get("multiNodeParams") or {}
        prefix = many.get("nodeIdPrefix", name)
        ids = [f"{prefix}-{number}" for number in range(many.get("nodeCount", 0))]
        node = spec["node"]
        ids = ids or [spec["nodeId"]]
        self.cloud.allocate(zone, name, node["acceleratorType"], node.get("labels", {}), ids)
        self.asked[name] = body["tpu"]["nodeSpec"]
        return operation("queuedResources", zone, name)

    def create_node(self, zone: str, query: dict, body: dict) -> dict:
        name, labels = query["nodeId"], body.get("labels", {})
        self.cloud.allocate(zone, name, body["acceleratorType"], labels, [])
        return operation("nodes", zone, name)

    def show_request(self, request: dict) -> dict:
        """A request of several nodes reads as it was sent: one spec, with their number."""
        asked = self.asked[request["name"].rpartition("/")[2]]
        return {**{k: v for k, v in request.items() if k != "left"}, "tpu": {"nodeSpec": asked}}

    def guest_attributes(self, key: str, body: dict) -> dict:
        """The host keys, by which ssh recognises the workers, and their names."""
        count = len(self.cloud.nodes[key]["networkEndpoints"])
        chosen = [int(worker) for worker in body.get("workerIds", []) if worker]
        hosts = [
            [
                {"namespace": "hostkeys", "key": "ssh-ed25519", "value": f"AAAA{worker:06}"},
                {"namespace": "hostattributes", "key": "hostname", "value": f"host-{worker}"},
            ]
            for worker in chosen or range(count)
        ]
        return {"guestAttributes": [{"queryValue": {"items": items}} for items in hosts]}


def operation(kind: str, zone: str, name: str) -> dict:
    """An operation that has ended, on a resource that gcloud asks for next."""
    target = {"@type": "type.googleapis.com/google.cloud.tpu.v2.Node"}
    target["name"] = f"projects/p/locations/{zone}/{kind}/{name}"
    identity = f"projects/p/locations/{zone}/operations/{kind}.{name}"
    return {"name": identity, "done": True, "response": target}


def show_node(node: dict) -> dict:
    node = {key: value for key, value in node.items() if key not in ("left", "folder")}
    if node["queuedResource"]:
        zone, name = node["queuedResource"].split("/")
        node["queuedResource"] = f"projects/p/locations/{zone}/queuedResources/{name}"
    return {**node, "id": "4711", "apiVersion": "V2", "runtimeVersion": "tpu-ubuntu2204-base"}


class Handler(http.server.BaseHTTPRequestHandler):
    api: Api

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        try:
            code, content = 200, self.api.answer(self.command, self.path, body)
        except Refusal as refusal:
            status, _, message = str(refusal).partition(": ")
            code = HTTP.get(status, 400)
            content = {"error": {"code": code, "status": status, "message": message}}
        except Exception as error:  # noqa: BLE001, gcloud prints it
            code, content = 501, {"error": {"code": 501, "message": repr(error)}}
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, *words):
        pass


class Ssh:
    """An SSH server on every worker's address; who connects chooses the worker by it."""

    def __init__(self, cloud: Cloud):
        self.cloud = cloud
        self.port = 0
        self.commands: list[tuple[str, str]] = []  # (node, command)
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.listen())
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def listen(self) -> None:
        import asyncssh

        find = self.find

        class Login(asyncssh.SSHServer):
            def connection_made(self, connection):
                if not find(connection.get_extra_info("sockname")[0]):
                    connection.abort()

            def begin_auth(self, username):
                return True

            def public_key_auth_supported(self):
                return True

            def validate_public_key(self, username, key):
                return True

        self.server = await asyncssh.listen(
            "0.0.0.0",
            0,
            server_factory=Login,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            process_factory=self.serve,
            encoding=None,
        )
        self.port = self.server.get_port()

    def find(self, address: str) -> tuple[list[str], pathlib.Path] | None:
        """Return the environment and the home of the worker at an address; None if it is gone."""
        for key, entry in list(self.cloud.nodes.items()):
            for index, end in enumerate(entry["networkEndpoints"]):
                if end["ipAddress"] == address and entry["state"] not in TERMINAL:
                    zone, name = key.split("/")
                    node = self.cloud.find_node({"--zone": zone}, name)
                    home = self.cloud.worker_folder(node, index) / "home"
                    return self.cloud.environment(node, index), home
        return None

    async def serve(self, process: Any) -> None:
        address = process.get_extra_info("sockname")[0]
        self.commands.append((address, process.command or ""))
        worker = self.find(address)
        if worker is None:
            process.exit(255)
            return
        environment, home = worker
        words = [
            "env",
            "-i",
            *environment,
            "bash",
            *(["-c", process.command] * bool(process.command)),
        ]
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *words, cwd=home, stdin=pipe, stdout=pipe, stderr=pipe
        )
        # The end of its output would close a session without input before its exit code is sent.
        await process.redirect(child.stdin, child.stdout, child.stderr, send_eof=False)
        code = await child.wait()
        await process.stdout.drain()
        process.exit(255 if code < 0 else code)  # killed with its machine: the connection drops
        await process.wait_closed()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.end(), self.loop).result(timeout=30)
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def end(self) -> None:
        self.server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class RealRig(Rig):
    """A rig whose gcloud and ssh are the real ones."""

    def __init__(self, folder: pathlib.Path, hosts: int = 2, **settings: Any):
        super().__init__(folder, hosts, **settings)
        assert GCLOUD
        self.api = Api(self.cloud)
        handler = type("Served", (Handler,), {"api": self.api})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.ssh = Ssh(self.cloud)
        for where in (self.bin, self.tools):
            (where / "gcloud").unlink()
            (where / "gcloud").symlink_to(GCLOUD)
        real = shutil.which("ssh")
        script(self.bin / "ssh", f'#!/bin/bash\nexec {real} -p {self.ssh.port} "$@"\n')
        (folder / "token").write_text("word\n")
        self.profile(**self.cloud_sdk())

    def cloud_sdk(self) -> dict[str, str]:
        """Return the variables with which gcloud calls the stand-in, as nobody in particular."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        return {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{address}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{address}/compute/v1/",
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(self.folder / "token"),
            "CLOUDSDK_CONFIG": str(self.folder / "sdk"),
            "CLOUDSDK_CORE_ACCOUNT": "tester",
            "CLOUDSDK_CORE_PROJECT": "p",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        }

    def environment(self, **variables: str) -> dict[str, str]:
        same = {"USER": "tester", "LAUNCH_LEAST": "60", **self.cloud_sdk()}
        return super().environment(**{**same, **variables})

    def requests(self, method: str, path: str) -> list[dict]:
        """Return the bodies of the calls of the API with this method and path (a pattern)."""
        calls = self.api.calls
        return [body for verb, where, body in calls if verb == method and re.search(path, where)]

    def close(self) -> None:
        super().close()
        self.server.shutdown()
        self.ssh.close()

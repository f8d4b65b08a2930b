"""A Hugging Face Hub on this machine: the calls that huggingface_hub makes to read and to push."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

import pytest
import yaml

TOKEN = "hf_test"
API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree|preupload|commit)/([^/?]+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """The repositories of a server at `url`, and what was asked of it.

    Attributes:
      commits: {repository: {commit: {file: bytes}}}, oldest first; the newest is `main`.
      private, gated: repositories that need the token; that refuse everybody.
      requests: "METHOD PATH", in order; ranges: the Range headers of downloads.
      cut: {file: bytes after which its next download breaks off}.
      large: files that are uploaded as LFS objects.
    """

    def __init__(self, url: str):
        self.url = url
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.cut: dict[str, int] = {}
        self.objects: dict[str, bytes] = {}
        self.messages: list[str] = []

    def add(self, repository: str, files: Mapping[str, bytes]) -> str:
        """Commit `files`, in place of what was there; return the commit."""
        history = self.commits.setdefault(repository, {})
        content = repr((len(history), sorted(files.items()))).encode()
        commit = hashlib.sha1(content).hexdigest()
        history[commit] = dict(files)
        return commit

    def files(self, repository: str) -> dict[str, bytes]:
        return list(self.commits[repository].values())[-1]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def reply(self, content: object, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, reason: str) -> None:
        self.reply({"error": reason}, code, X_Error_Code=reason, X_Error_Message=reason)

    def opened(self, repository: str, revision: str = "main") -> str | None:
        """The commit of a revision; None after a refusal."""
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        history = self.hub.commits.get(repository, {})
        if repository in self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif not history or (repository in self.hub.private and not authorised):
            self.refuse(401 if not authorised else 404, "RepoNotFound")
        elif revision == "main":
            return list(history)[-1]
        elif revision not in history:
            self.refuse(404, "RevisionNotFound")
        else:
            return revision
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := RESOLVE.fullmatch(path):
            self.send_file(*match.groups())
        elif match := API.fullmatch(path):
            repository, what, revision = match.groups()
            if commit := self.opened(repository, revision or "main"):
                files = self.hub.commits[repository][commit]
                private = repository in self.hub.private
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
                    for name, data in files.items()
                ]
                info = {"id": repository, "sha": commit, "private": private}
                self.reply(tree if what == "tree" else info)
        else:
            self.refuse(404, "NotFound")

    def send_file(self, repository: str, revision: str, name: str) -> None:
        if not (commit := self.opened(repository, revision)):
            return
        if name not in self.hub.commits[repository][commit]:
            self.refuse(404, "EntryNotFound")
            return
        data = self.hub.commits[repository][commit][name]
        headers = {"X_Repo_Commit": commit, "ETag": f'"{git_oid(data)}"'}
        wanted, code = self.headers.get("Range", ""), 200
        if wanted:
            self.hub.ranges.append(wanted)
            start, code = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        if self.command == "GET" and (bytes_sent := self.hub.cut.pop(name, None)):
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:bytes_sent])
            self.close_connection = True
        else:
            self.reply(data, code, **headers)

    def do_PUT(self) -> None:
        body = self.body()
        self.hub.objects[hashlib.sha256(body).hexdigest()] = body
        self.reply(b"")

    def do_POST(self) -> None:
        path, body = urllib.parse.urlsplit(self.path).path, self.body()
        self.hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Unauthorized")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            block = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(block), dict)
            self.reply({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}
            self.reply({"objects": objects, "transfer": "basic"})
        elif match := API.fullmatch(path):
            repository, what, _ = match.groups()
            self.preupload(json.loads(body)) if what == "preupload" else self.commit(
                repository, body
            )
        else:
            self.refuse(404, "NotFound")

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.commits:
            self.reply({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409)
            return
        self.hub.add(name, {})
        if wanted.get("visibility") == "private":
            self.hub.private.add(name)
        self.reply({"url": f"{self.hub.url}/{name}"})

    def preupload(self, wanted: dict) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        self.reply({"files": modes})

    def commit(self, repository: str, body: bytes) -> None:
        files = dict(self.hub.files(repository))
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.add(repository, files)
        url = f"{self.hub.url}/{repository}/commit/{oid}"
        self.reply({"success": True, "commitOid": oid, "commitUrl": url})

    def body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):  # chunked
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def served() -> Iterator[Hub]:
    """A Hub without repositories, in a thread of this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    handler = type("OwnHandler", (Handler,), {})
    server.RequestHandlerClass = handler
    handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()


def use(hub: Hub, cache, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Make huggingface_hub talk to `hub`; return the variables that do so in other processes.

    It reads the variables when it is imported, so they alone would come too late here.
    """
    from huggingface_hub import constants

    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # its servers are others
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return variables

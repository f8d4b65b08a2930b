"""gcloud for tests: the commands that the launcher uses, with the real one's manners.

Each command takes the flags that the real one (SDK 528) has on its track, and no other: exit 2. A
connection that ends with 255 has the command run again, up to ten times, with an empty standard
input. States, their order and the texts of errors are the real ones. What the launcher must never
use is refused: `--worker=all`, whose exit code hides who failed.

The cloud is an object in the test's process. `gcloud` on PATH is CLIENT, a real process, which
hands over its arguments and its standard streams and ends with the code that it is told. `faults`
is a list of {match, nth, times, do}: the nth to (nth + times - 1)th call that the regular
expression finds gets it. A worker is a folder with a home of its own; its processes have FAKE_HOST
in their environment.
"""

import array
import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time

CLIENT = """\
import _socket, os, sys
server = _socket.socket(_socket.AF_UNIX)
server.connect("\\0" + os.environ["FAKE_GCLOUD"])
streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
words = "\\0".join([str(os.getpid()), *sys.argv[1:]]).encode()
server.sendmsg([len(words).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
server.sendall(words)
os._exit(server.recv(1)[0])
"""
COMMON = {"--zone", "--project", "--format", "--quiet"}
CREATE = {"--accelerator-type", "--spot", "--reserved", "--labels", "--internal-ips", "--network"}
CREATE |= {"--subnetwork", "--service-account", "--scopes", "--data-disk", "--async", "--metadata"}
CREATE |= {"--tags", "--shielded-secure-boot"}
ALPHA = {"--boot-disk", "--reservation", "--provisioning-model"}  # of create
SSH = {"--worker", "--internal-ip", "--plain", "--strict-host-key-checking"}
FLAGS = {
    "queued-resources create": CREATE
    | {"--runtime-version", "--node-id", "--node-count", "--node-prefix", "--valid-until-duration"},
    "queued-resources describe": set(),
    "queued-resources list": {"--filter"},
    "queued-resources delete": {"--force", "--async"},
    "tpu-vm accelerator-types": set(),
    "tpu-vm create": CREATE | {"--version"},
    "tpu-vm describe": set(),
    "tpu-vm list": {"--filter"},
    "tpu-vm delete": {"--async"},
    "tpu-vm update": {"--update-labels", "--async"},
    "tpu-vm ssh": SSH | {"--command", "--ssh-flag", "--dry-run"},
    "accelerator-types list": set(),
}
SWITCHES = {"--quiet", "--spot", "--reserved", "--internal-ips", "--async", "--force"}
SWITCHES |= {"--internal-ip", "--tunnel-through-iap", "--plain", "--dry-run"}
TERMINAL = ("PREEMPTED", "TERMINATED")
SWITCHES_OF_CREATE = {"--best-effort", "--shielded-secure-boot"}


class Refusal(Exception):
    def __init__(self, text, code=1):
        super().__init__(text)
        self.code = code


def parse(argv):
    """(command, positional arguments, flags); refuses what the real parser does."""
    words = [word for word in argv if word not in ("compute", "tpus")]
    alpha = words[0] == "alpha"
    words = words[alpha:]
    command, rest = " ".join(words[:2]), words[2:]
    if command not in FLAGS:
        raise Refusal(f"Invalid choice: {command!r}", 2)
    known = COMMON | FLAGS[command]
    if alpha and command == "tpu-vm ssh":
        known |= {"--tunnel-through-iap", "--batch-size"}
    if alpha and command.endswith(" create"):
        known |= ALPHA | ({"--best-effort", "--max-run-duration"} if "queued" in command else set())
    positional, flags = [], {}
    rest = iter(rest)
    for word in rest:
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in known:
            raise Refusal(f"unrecognized arguments: {word}", 2)
        if name in SWITCHES | SWITCHES_OF_CREATE:
            value = "true"
        elif not equals:
            value = next(rest)
        flags.setdefault(name, []).append(value)
    return command, positional, {name: values[-1] for name, values in flags.items()}


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def labels(text):
    return dict(pair.split("=") for pair in text.split(",")) if text else {}


def end_processes(folder):
    """Kill whatever runs on a node's workers."""
    mark = f"FAKE_HOST={folder}".encode()
    for _ in range(3):
        for process in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdigit() and mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)


class Call:
    """One gcloud process: what it was asked, and its standard streams."""

    def __init__(self, connection):
        head, rights, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
        streams = array.array("i")
        streams.frombytes(rights[0][2][:12])
        self.stdin, self.stdout, self.stderr = streams
        words = b""
        while len(words) < int.from_bytes(head, "big"):
            words += connection.recv(1 << 16)
        pid, *self.argv = words.decode().split("\0")
        self.pid = int(pid)

    def print(self, text):
        os.write(self.stdout, f"{text}\n".encode())

    def complain(self, text):
        with contextlib.suppress(OSError):
            os.write(self.stderr, f"{text}\n".encode())

    def close(self):
        for stream in (self.stdin, self.stdout, self.stderr):
            os.close(stream)


class Cloud:
    """What there is, and who is asked about it."""

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings
        self.nodes, self.requests = {}, {}
        self.count = self.created = 0
        self.calls, self.faults = [], []
        self.lock = threading.RLock()
        self.address = f"fake-gcloud-{secrets.token_hex(8)}"  # of an abstract socket
        self.closing = threading.Event()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind("\0" + self.address)
        self.server.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        self.closing.set()
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        end_processes(self.folder)

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        call = Call(connection)
        self.calls.append(call.argv)
        try:
            code = self.run(call)
        except Refusal as refusal:
            group = ".".join(word for word in call.argv[:4] if not word.startswith("-"))
            call.complain(f"ERROR: (gcloud.{group}) {refusal}{self.who(str(refusal))}")
            code = refusal.code
        finally:
            call.close()
        with contextlib.suppress(OSError):
            connection.sendall(bytes([code]))
            connection.close()

    def who(self, text):
        """What the real one adds to each 401, 403 and 404."""
        if not text.startswith(("NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED")):
            return ""
        return (
            f". This command is authenticated as {self.settings['account']} which is the active "
            "account specified by the [core/account] property"
        )

    def due(self, line):
        """What is to go wrong with this call."""
        found = []
        with self.lock:
            for entry in self.faults:
                if re.search(entry["match"], line):
                    entry["seen"] = entry.get("seen", 0) + 1
                    first = entry.get("nth", 1)
                    if first <= entry["seen"] < first + entry.get("times", 1):
                        found.append(entry["do"])
        return found

    def path(self, kind, zone, name):
        return f"projects/{self.settings['project']}/locations/{zone}/{kind}/{name}"

    def new_node(self, zone, name, kind, marks, request=None):
        self.count += 1
        count = self.settings["hosts"]
        self.nodes[f"{zone}/{name}"] = {
            "name": self.path("nodes", zone, name),
            "state": "READY" if request else "CREATING",
            "health": "HEALTHY",
            "acceleratorType": kind,
            "networkEndpoints": [
                {"ipAddress": f"127.{self.count}.0.{i + 1}", "port": 8470} for i in range(count)
            ],
            "labels": marks,
            "createTime": now(),
            "queuedResource": request or "",
            "folder": str(self.folder / "workers" / f"{name}.{self.count}"),
            "left": ["READY"],
        }

    def create(self, flags, name, queued):
        ids = []
        if queued and "--node-count" in flags:
            prefix = flags.get("--node-prefix", name)
            ids = [f"{prefix}-{number}" for number in range(int(flags["--node-count"]))]
        elif queued:
            ids = [flags["--node-id"]]
        marks = labels(flags.get("--labels", ""))
        self.allocate(flags["--zone"], name, flags["--accelerator-type"], marks, ids)

    def allocate(self, zone, name, kind, marks, ids):
        """Create a queued resource of the nodes `ids`, or one node if there are none."""
        if zone in self.settings["no_zone"]:
            raise Refusal(f"NOT_FOUND: Location {zone} is not found or access is unauthorized.")
        with self.lock:
            if f"{zone}/{name}" in (self.requests if ids else self.nodes):
                raise Refusal(f"ALREADY_EXISTS: Resource '{name}' already exists")
            used = (
                len(self.requests)
                + len(self.nodes)
                - sum(bool(node["queuedResource"]) for node in self.nodes.values())
            )
            if used >= self.settings["quota"]:
                raise Refusal("RESOURCE_EXHAUSTED: Quota limit 'TPUS' has been exceeded. Limit: 1")
            if not ids:
                self.new_node(zone, name, kind, marks)
                return
            timelines = self.settings["timelines"]
            order = timelines[min(self.created, len(timelines) - 1)]
            self.created += 1
            node = {"acceleratorType": kind, "labels": marks}
            self.requests[f"{zone}/{name}"] = {
                "name": self.path("queuedResources", zone, name),
                "state": {"state": "ACCEPTED"},
                "tpu": {"nodeSpec": [{"nodeId": node_id, "node": node} for node_id in ids]},
                "createTime": now(),
                "left": list(order),
            }

    def advance_request(self, key):
        """A request goes one state on each time that it is looked at."""
        request = self.requests[key]
        if not request["left"]:
            return
        state, _, text = request["left"].pop(0).partition(":")
        request["state"] = {"state": state}
        zone = key.split("/")[0]
        if state == "FAILED":
            request["state"]["failedData"] = {"error": {"code": 8, "message": text}}
        if state == "ACTIVE":
            for spec in request["tpu"]["nodeSpec"]:
                node = spec["node"]
                marks = dict(node["labels"])
                self.new_node(zone, spec["nodeId"], node["acceleratorType"], marks, key)
        if state == "SUSPENDED":
            self.drop_nodes(key)
        if state == "GONE":
            self.drop_nodes(key)
            del self.requests[key]

    def drop_nodes(self, key):
        for name, node in list(self.nodes.items()):
            if node["queuedResource"] == key:
                end_processes(node["folder"])
                del self.nodes[name]

    def describe(self, kind, zone, name):
        with self.lock:
            entries, key = getattr(self, kind), f"{zone}/{name}"
            if key in entries:
                if kind == "requests":
                    self.advance_request(key)
                elif entries[key]["left"]:
                    entries[key]["state"] = entries[key]["left"].pop(0)
                    if entries[key]["state"] == "GONE":
                        del entries[key]
            if key not in entries:
                what = "queuedResources" if kind == "requests" else "nodes"
                raise Refusal(f"NOT_FOUND: Resource '{self.path(what, zone, name)}' was not found")
            return {k: v for k, v in entries[key].items() if k not in ("left", "folder")}

    def delete(self, kind, flags, name):
        key = f"{flags['--zone']}/{name}"
        with self.lock:
            entries = getattr(self, kind)
            if key not in entries:
                raise Refusal(f"NOT_FOUND: Resource '{name}' was not found")
            entry = entries[key]
            if kind == "nodes":
                if entry["queuedResource"] in self.requests:
                    raise Refusal("FAILED_PRECONDITION: the node belongs to a queued resource")
                end_processes(entry["folder"])
                entry["state"], entry["left"] = "DELETING", ["DELETING", "GONE"]
                return
            state = entry["state"]["state"]
            if "--force" not in flags and state not in ("ACCEPTED", "FAILED", "SUSPENDED"):
                raise Refusal("FAILED_PRECONDITION: it has nodes; use --force")
            self.drop_nodes(key)
            entry["state"], entry["left"] = {"state": "DELETING"}, ["DELETING", "GONE"]

    def find_node(self, flags, name):
        zone = flags["--zone"]
        with self.lock:
            node = self.nodes.get(f"{zone}/{name}")
            if node is None:
                raise Refusal(
                    f"NOT_FOUND: Resource '{self.path('nodes', zone, name)}' was not found"
                )
            state = node["state"]
            if state in TERMINAL:
                raise Refusal(
                    f'This TPU has terminal state "{state}", so it cannot be used anymore.'
                )
            if state in ("STOPPED", "STOPPING", "DELETING"):
                raise Refusal(
                    f'This TPU has state "{state}", so it cannot be currently connected to.'
                )
            request, key = node["queuedResource"], f"{zone}/{name}"
            slices = sorted(k for k, n in self.nodes.items() if n["queuedResource"] == request)
            slices = slices if request else [key]
            return dict(node, number=slices.index(key), slices=len(slices))

    def worker_folder(self, node, index):
        """The home of a worker, made at its first use."""
        folder = pathlib.Path(node["folder"]) / str(index)
        if not (folder / "home").exists():
            for part in ("home", "tmp", "dev", "bin"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            for chip in range(4):
                (folder / "dev" / f"accel{chip}").touch()
            for file in pathlib.Path(self.settings["tools"]).iterdir():
                with contextlib.suppress(FileExistsError):
                    (folder / "bin" / file.name).symlink_to(file)
        return folder

    def environment(self, node, index):
        folder, hosts = self.worker_folder(node, index), self.settings["hosts"]
        variables = {
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "USER": "tester",
            "PATH": f"{folder / 'bin'}:{self.settings['machine']}",
            "VIT_SCALE_DEVICES": str(folder / "dev"),
            "VIT_SCALE_RELEASE": "1",
            "FAKE_HOST": f"{node['folder']}/{index}",
            "FAKE_GCLOUD": self.address,
            "FAKE_WORKER": str(node["number"] * hosts + index),
            "FAKE_WORKERS": str(hosts * node["slices"]),
            **self.settings["profile"],
            **self.settings["profiles"].get(str(index), {}),
        }
        return [f"{name}={value}" for name, value in variables.items()]

    def ssh(self, call, flags, name, due):
        node, index = self.find_node(flags, name), flags.get("--worker", "0")
        if "--dry-run" in flags:
            for number in range(self.settings["hosts"]) if index == "all" else [index]:
                host = f"tester@{name}.{flags['--zone']}.{number}"
                call.print(
                    f"{self.settings['ssh']} -T -i /a key -o IdentitiesOnly=yes {host} -- true"
                )
            return 0
        if not index.isdigit():
            raise Refusal("FAKE: never use --worker=all nor a list", 99)
        index = int(index)
        if index >= self.settings["hosts"]:
            raise Refusal(f"worker {index} does not exist", 1)
        if "agent" in due:
            raise Refusal("SSH Key is not present in the SSH agent")
        command = ["env", "-i", *self.environment(node, index), "bash", "-c", flags["--command"]]
        home = self.worker_folder(node, index) / "home"
        given = call.stdin
        for attempt in range(1 if "--direct" in flags else 10):
            code = 255
            if not ("before" in due and attempt == 0) and "always" not in due:
                streams = {"stdin": given, "stdout": call.stdout, "stderr": call.stderr}
                code = subprocess.run(command, cwd=home, **streams).returncode
                code = 255 if code < 0 else code  # killed with its machine: the connection drops
                self.find_node(flags, name)  # it may have gone meanwhile
            if "after" in due and attempt == 0:
                code = 255
            if code != 255 or "--direct" in flags:
                break
            call.complain("Retrying: SSH command error: [/usr/bin/ssh] exited with code [255].")
            given = subprocess.DEVNULL  # the second try has nothing to read
            self.closing.wait(5 * self.settings["scale"])
        if code and "--direct" not in flags:
            text = f"Command execution on worker {index} failed with exit status {code}."
            call.complain(f"##### {text} Continuing.")
        return code

    def spoil(self, due):
        """Faults of the machine itself."""
        for what in due:
            word, _, rest = what.partition(":")
            if word == "error":
                raise Refusal(rest)
            if word == "hang":
                self.closing.wait(600)
            if word == "preempt":  # preempt:STATE, or GONE, or SUSPENDED of its request
                with self.lock:
                    for node in self.nodes.values():
                        end_processes(node["folder"])
                        node["state"] = rest if rest not in ("GONE", "SUSPENDED") else node["state"]
                    if rest == "GONE":
                        self.nodes = {}
                    if rest == "SUSPENDED":
                        for key, request in self.requests.items():
                            request["state"], request["left"] = (
                                {"state": "SUSPENDING"},
                                ["SUSPENDED"],
                            )
                            self.drop_nodes(key)
            if word == "reboot":  # reboot:WORKER
                with self.lock:
                    for node in self.nodes.values():
                        end_processes(f"{node['folder']}/{rest}")
                        shutil.rmtree(pathlib.Path(node["folder"]) / rest / "tmp")
                        (pathlib.Path(node["folder"]) / rest / "tmp").mkdir()
            if word == "repair":
                with self.lock:
                    for node in self.nodes.values():
                        end_processes(node["folder"])
                        node["state"], node["left"] = "REPAIRING", ["REPAIRING", "READY"]

    def listing(self, kind, zone):
        with self.lock:
            entries = getattr(self, kind).items()
            return [dict(entry) for key, entry in entries if key.startswith(f"{zone}/")]

    def run_ssh(self, call):
        """Run ssh itself, by the command line that `ssh --dry-run` has printed."""
        *_, host, _, line = call.argv
        name, zone, worker = host.partition("@")[2].split(".")
        flags = {"--zone": zone, "--worker": worker, "--command": line, "--direct": "true"}
        due = self.due(f"tpu-vm ssh {name} --zone {zone} --worker {worker} --command {line}")
        try:
            self.spoil(due)
            return self.ssh(call, flags, name, due)
        except Refusal as refusal:
            call.complain(f"ssh: {refusal}")
            return 255

    def run(self, call):
        argv = call.argv
        if argv[0] == "-T":
            return self.run_ssh(call)
        if argv[:2] == ["config", "get-value"]:
            call.print(self.settings["config"].get(argv[2], "(unset)"))
            return 0
        if argv[:2] == ["auth", "list"]:
            call.print(self.settings["account"])
            return 0
        if argv == ["--version"]:
            call.print("Google Cloud SDK 528.0.0")
            return 0
        command, names, flags = parse(argv)
        due = self.due(" ".join(argv))
        if not self.settings["account"]:
            raise Refusal(
                "You do not currently have an active account selected.\n  $ gcloud auth login"
            )
        self.spoil(due)
        kind, verb = command.split()
        entries = "requests" if kind == "queued-resources" else "nodes"
        if verb == "accelerator-types":
            call.print("\n".join(["v4-8", "v4-16", "v4-32"]))
            return 0
        if verb == "create":
            self.create(flags, names[0], kind == "queued-resources")
            if "lost" in due:
                raise Refusal("HTTP 503: The service is currently unavailable.")
        elif verb == "describe":
            call.print(json.dumps(self.describe(entries, flags["--zone"], names[0])))
        elif verb == "list":
            call.print(json.dumps(self.listing(entries, flags["--zone"])))
        elif verb == "delete":
            self.delete(entries, flags, names[0])
        elif verb == "update":
            with self.lock:
                node = self.nodes[f"{flags['--zone']}/{names[0]}"]
                node["labels"].update(labels(flags["--update-labels"]))
        elif verb == "ssh":
            return self.ssh(call, flags, names[0], due)
        return 0

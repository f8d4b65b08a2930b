"""Pack the working tree: tracked files, and new files that git does not ignore, as they are now.

Equal files pack to equal bytes, so the archive's SHA-256 identifies the code on every worker.
"""

import gzip
import hashlib
import io
import pathlib
import re
import subprocess
import tarfile
from typing import NamedTuple

from launch.tpu.exit_codes import Exit, Stop

LARGEST = 50_000_000  # bytes of all files
NEVER = (".git", ".venv", ".data", "tpu.env", "__pycache__")
OUTPUTS = ("runs", "wandb")  # of trainings; the package has a folder of such a name itself
KEYS = (".pem", ".key", ".p12", ".pfx", "id_rsa", "id_ecdsa", "id_ed25519")


class Bundle(NamedTuple):
    sha: str
    data: bytes
    description: str  # such as a630608+changes
    left_out: list[str] = []  # noqa: RUF012, files that hold a key


def git(root: pathlib.Path, *arguments: str) -> bytes | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def files(root: pathlib.Path) -> list[str]:
    """List relative paths, sorted; without git, every file that is not hidden."""
    listing = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listing is None:
        names = [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
        names = [name for name in names if not name.startswith(".") and "/." not in name]
    else:
        names = [name for name in listing.decode().split("\0") if name]
    return sorted({name for name in names if _wanted(root, name)})


def _wanted(root: pathlib.Path, name: str) -> bool:
    parts = pathlib.PurePath(name).parts
    never = any(part in NEVER for part in parts)
    output = parts[0] != "vit_scale" and any(part in OUTPUTS for part in parts)
    return not never and not output and (root / name).is_file()


def holds_key(root: pathlib.Path, name: str) -> bool:
    """Return whether it is a .env file, or a file with a private key that git does not track."""
    if any(part.startswith(".env") for part in pathlib.PurePath(name).parts):
        return True
    account = name.endswith(".json") and b'"private_key"' in (root / name).read_bytes()
    return (account or name.endswith(KEYS)) and not git(root, "ls-files", "--", name)


def make(root: pathlib.Path, redacted: list[str]) -> Bundle:
    """Pack `root`. Raises Stop if it is too large or contains what `redacted` matches."""
    names = files(root)
    left_out = [name for name in names if holds_key(root, name)]
    names = [name for name in names if name not in left_out]
    sizes = {name: (root / name).stat().st_size for name in names}
    if sum(sizes.values()) > LARGEST:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        listed = ", ".join(f"{name} {sizes[name] / 1e6:.0f} MB" for name in largest)
        total = sum(sizes.values()) / 1e6
        limit = f"the limit is {LARGEST / 1e6:.0f} MB"
        raise Stop(Exit.BAD_INPUT, f"code is {total:.0f} MB, {limit}; largest: {listed}")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            content = (root / name).read_bytes()
            if any(re.search(pattern, content.decode(errors="replace")) for pattern in redacted):
                raise Stop(Exit.BAD_INPUT, f"{name} contains the value of a secret: remove it")
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755 if (root / name).stat().st_mode & 0o100 else 0o644
            tar.addfile(entry, io.BytesIO(content))
    data = gzip.compress(packed.getvalue(), mtime=0)
    return Bundle(hashlib.sha256(data).hexdigest()[:16], data, describe(root), left_out)


def describe(root: pathlib.Path) -> str:
    head = git(root, "rev-parse", "--short", "HEAD")
    if head is None:
        return "no git"
    return head.decode().strip() + ("+changes" if git(root, "status", "--porcelain") else "")


def changes(root: pathlib.Path) -> str:
    """Return the diff against the last commit."""
    return (git(root, "diff", "HEAD") or b"").decode(errors="replace")

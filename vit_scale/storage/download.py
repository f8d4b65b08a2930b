"""Getting a data set: resumed where it stopped, checked, unpacked, and only then given its name."""

import base64
import contextlib
import fcntl
import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

from tqdm import tqdm

from vit_scale.errors import UserError
from vit_scale.storage import paths

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3d95e74349a"  # as its page gives it
CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte


def cifar10(folder: str | Path, url: str = CIFAR10, md5: str = CIFAR10_MD5) -> Path:
    """Download and unpack CIFAR-10 into `folder`; the path of its `cifar-10-batches-py`.

    An archive that is already in `folder` is used, and an interrupted download goes on where it
    stopped. Raises UserError, which says what to put where, if the network or the archive fails,
    and for a `folder` in a bucket: nothing can be unpacked there.
    """
    target = paths.path(folder) / "cifar-10-batches-py"
    if paths.in_bucket(target):
        raise UserError(
            f"--out {folder}: a set is unpacked on a disk; download it to one, and copy the folder "
            f"with `gcloud storage cp -r .data/{target.name} {target.parent}/`"
        )
    if not target.exists():
        archive = Path(folder) / url.rpartition("/")[2]
        fetch(url, archive, f"md5={md5}")
        unpack(archive, target)
    return target


class Unreachable(UserError):
    """The network, or the server, doesn't give a file."""


def fetch(url: str, file: Path, checksum: str = "") -> None:
    """Download `url` to `file`. What has come so far is kept beside it as `.partial`.

    `checksum` is ALGORITHM=HEX, such as "md5=..." or "sha256=..."; without one, the server's own is
    taken where it says one, as Google's storage does. Processes of this machine take turns.

    Raises UserError if the checksum differs, removing the part, and its subclass Unreachable if the
    network fails, keeping it.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with _turn(partial):
                if not file.exists():
                    said = _receive(url, partial)
                    _check_part(partial, checksum or said)
                    os.replace(partial, file)
                    return
        _check(file, checksum)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(
            f"{url} could not be downloaded ({reason}); run the same command again, or put that "
            f"file there as {file} and run it then"
        ) from error


def fetch_optional(url: str, file: Path) -> None:
    """`fetch`, and nothing where the server says that there is no such file."""
    try:
        fetch(url, file)
    except Unreachable as error:
        if getattr(error.__cause__, "code", None) not in (403, 404):
            raise


@contextlib.contextmanager
def _turn(partial: Path) -> Iterator[None]:
    """Several processes of one machine may want the same file: one downloads, the others wait."""
    with partial.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()


def _receive(url: str, partial: Path) -> str:
    """Append to `partial` what is missing of `url`; the checksum that the server says, if any."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing after what we have: the checksum decides
            return _said(error.headers)
        raise
    with response:
        if response.status != 206:  # the server doesn't resume: from the beginning
            have = 0
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        with (
            partial.open("ab" if have else "wb") as stream,
            tqdm(
                total=total,
                initial=have,
                desc=partial.stem,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            while chunk := response.read(CHUNK):
                stream.write(chunk)
                bar.update(len(chunk))
            if total is not None and stream.tell() != total:
                raise OSError(f"it broke off at byte {stream.tell()} of {total}")
        return _said(response.headers)


def _said(headers: Message) -> str:
    """ "md5=HEX" of Google's storage: `x-goog-hash: crc32c=...,md5=BASE64`."""
    for header in headers.get_all("x-goog-hash", []):
        for part in header.split(","):
            name, _, value = part.strip().partition("=")
            if name == "md5":
                return f"md5={base64.b64decode(value).hex()}"
    return ""


def _check_part(partial: Path, checksum: str) -> None:
    try:
        _check(partial, checksum)
    except UserError:
        partial.unlink()
        raise


def _check(file: Path, checksum: str) -> None:
    if not checksum:
        return
    algorithm, _, expected = checksum.partition("=")
    if algorithm not in ("md5", "sha256"):
        raise UserError(f"a checksum is md5=HEX or sha256=HEX, not {checksum!r}")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected.lower():
        raise UserError(
            f"{file} has {algorithm.upper()} {found}, not {expected}: it is damaged or another "
            "file; remove it if it is still there, and run the same command again"
        )


def unpack(archive: Path, target: Path) -> None:
    """Unpack the folder of that name in a .tar.gz to `target`, whole or, with a UserError, not."""
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")  # refuses links and paths that lead outside
        os.replace(temporary / target.name, target)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(
            f"{archive} could not be unpacked ({error}); remove it and try again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

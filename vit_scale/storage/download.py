"""Download and unpack files over HTTP: resumable, checksummed, and renamed only when complete."""

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
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

from tqdm import tqdm

from vit_scale.errors import UserError
from vit_scale.storage.errors import exit_code

CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte
UNENCRYPTED = ("http://", "ftp://")


class Unreachable(UserError):
    """The network failed, or the server does not serve the file."""


def fetch(url: str, file: Path, checksum: str = "") -> None:
    """Download `url` to `file`, resuming an interrupted download from `file`.partial.

    `checksum` is ALGORITHM=HEX, such as "md5=..." or "sha256=..."; without one, the MD5 that the
    server sends is checked, as Google Cloud Storage's does. If several processes of this machine
    want a file, one downloads it and the others wait.

    Raises UserError if the checksum differs, and removes the partial file; for http:// without a
    checksum; and Unreachable, a subclass, if the network fails: then the partial file stays.
    """
    _check_encrypted(url, checksum)
    partial = file.with_name(f"{file.name}.partial")
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(partial):
                if not file.exists():
                    sent = _receive(url, partial, checksum)
                    _check_partial(partial, checksum or sent)
                    os.replace(partial, file)
                    return
        _check(file, checksum)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(
            f"cannot download {url}: {reason}; rerun the same command to resume, or download it "
            f"by other means to {file} and rerun",
            exit_code(error),
        ) from error


def fetch_optional(url: str, file: Path) -> None:
    """Download as `fetch` does, or do nothing if the server has no such file (403 or 404)."""
    try:
        fetch(url, file)
    except Unreachable as error:
        if getattr(error.__cause__, "code", None) not in (403, 404):
            raise


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    with partial.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if not partial.exists() or not partial.stat().st_size:
                partial.unlink(missing_ok=True)
                _version_file(partial).unlink(missing_ok=True)


def _check_encrypted(url: str, checksum: str) -> None:
    """Raise UserError for a file that anybody on its way could have changed unnoticed."""
    if url.startswith(UNENCRYPTED) and not checksum:
        raise UserError(
            f"{url} is neither encrypted nor verified: use https://, or add the file's checksum, "
            f"{url}#sha256=HEX"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; without a checksum, each of them must be encrypted."""

    def __init__(self, checksum: str):
        self._checksum = checksum

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_encrypted(newurl, self._checksum)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _version_file(partial: Path) -> Path:
    """Return the file that tells which version of the server's file a partial file is of."""
    return partial.with_name(f"{partial.name}.version")


def _version(headers: Message) -> str:
    """Return what If-Range takes, an ETag or a date; "" if the server sends neither."""
    tag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


def _resumption(partial: Path, checksum: str) -> dict[str, str]:
    """Return the headers that ask for the rest of a partial file, or {} if all of it is needed.

    Without the version that it is of, its end must fit its start by the checksum.
    """
    start, version = partial.stat().st_size, _version_file(partial)
    known = version.read_text().strip() if version.exists() else ""
    if not start or not (known or checksum):
        return {}
    return {"Range": f"bytes={start}-"} | ({"If-Range": known} if known else {})


def _receive(url: str, partial: Path, checksum: str) -> str:
    """Append the rest of `url` to `partial`; return the checksum that the server sends, or ""."""
    headers = _resumption(partial, checksum)
    start = partial.stat().st_size if headers else 0
    request = urllib.request.Request(url, headers=headers)
    try:
        opener = urllib.request.build_opener(_Redirects(checksum))
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing comes after `start`: the checksum decides, or the size.
        if error.headers.get("Content-Range", "").rpartition("/")[2] not in ("", "*", str(start)):
            partial.write_bytes(b"")
            raise OSError("the file has changed on the server") from error
        return _sent_checksum(error.headers)
    with response:
        if response.status != 206:  # the server can't resume, or has another version now
            start = 0
            partial.write_bytes(b"")  # before its version is another
            if version := _version(response.headers):
                _version_file(partial).write_text(version)
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        bar_options = {"desc": partial.stem, "unit": "B", "unit_scale": True, "disable": None}
        with (
            partial.open("ab" if start else "wb") as stream,
            tqdm(total=total, initial=start, **bar_options) as bar,
        ):
            while chunk := response.read(CHUNK):
                stream.write(chunk)
                bar.update(len(chunk))
            if total is not None and stream.tell() != total:
                raise http.client.HTTPException(
                    f"connection closed after {stream.tell()} of {total} bytes"
                )
        return _sent_checksum(response.headers)


def _sent_checksum(headers: Message) -> str:
    """Return "md5=HEX" from Google Cloud Storage's `x-goog-hash: crc32c=...,md5=BASE64`."""
    for header in headers.get_all("x-goog-hash", []):
        for part in header.split(","):
            name, _, value = part.strip().partition("=")
            if name == "md5":
                return f"md5={base64.b64decode(value).hex()}"
    return ""


def _check_partial(partial: Path, checksum: str) -> None:
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
        raise UserError(f"checksum {checksum!r} is neither md5=HEX nor sha256=HEX")
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, algorithm).hexdigest()
    if actual != expected.lower():
        raise UserError(
            f"{file} has {algorithm.upper()} {actual}, not {expected}: it is damaged or a "
            "different file; remove it if it still exists, and rerun the same command"
        )


def unpack(archive: Path, target: Path) -> None:
    """Unpack the folder named `target.name` from a .tar.gz or .zip, completely or not at all.

    Links and paths that lead out of the archive are refused, or ignored in a .zip. Raises
    UserError.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as stored:
                stored.extractall(temporary)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        os.replace(temporary / target.name, target)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot unpack {archive}: {error}; remove it and rerun") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

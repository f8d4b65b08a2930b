"""Getting a data set: resumed where it stopped, checked, unpacked, and only then given its name."""

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from vit_scale import paths
from vit_scale.errors import UserError

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
        fetch(url, archive, md5)
        unpack(archive, target)
    return target


def fetch(url: str, file: Path, md5: str) -> None:
    """Download `url` to `file`. What has come so far is kept beside it as `.partial`.

    Raises UserError if the network fails, keeping the part, or the checksum differs, removing it.
    """
    if file.exists():
        _check(file, md5)
        return
    partial = file.with_name(f"{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _receive(url, partial)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url} could not be downloaded ({reason}); run the same command again, or put that "
            f"file there as {file} and run it then"
        ) from error
    try:
        _check(partial, md5)
    except UserError:
        partial.unlink()
        raise
    os.replace(partial, file)


def _receive(url: str, partial: Path) -> None:
    """Append to `partial` what is missing of `url`."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing after what we have: the checksum decides
            return
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


def _check(file: Path, md5: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    if found != md5:
        raise UserError(
            f"{file} has MD5 {found}, not {md5}: it is damaged or another file; remove it if it is "
            "still there, and run the same command again"
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

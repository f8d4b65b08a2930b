"""Objects in Google Cloud Storage behind pathlib's interface, one request a call.

A bucket has whole objects only: no folders, no append, no rename, no lock.
"""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, cast

import fsspec
from etils.epath.gpath import PosixGPath

from vit_scale.errors import UserError
from vit_scale.storage.errors import exit_code, os_errors

SCHEME = "gs://"
INSTALL = "launch/environment.sh gs in a clone, or pip install gcsfs"


class ObjectPath(PosixGPath):
    """`gs://BUCKET/NAME`: etils.epath's path, whose failures are OSErrors with a `strerror`.

    epath takes a listing that the storage refuses for an empty folder, and prepends the working
    directory to make a path absolute.
    """

    def resolve(self, strict: bool = False) -> "ObjectPath":
        return self

    def _kind(self) -> str | None:
        with os_errors(self):
            try:
                return file_system().info(str(self))["type"]
            except FileNotFoundError:
                return None

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Iterator["ObjectPath"]:
        return (self / name for name in listing(cast(pathlib.Path, self)))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: an object needs no folder."""

    def read_bytes(self) -> bytes:
        with os_errors(self):
            return file_system().cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> int:
        with os_errors(self):
            file_system().pipe_file(str(self), bytes(data))
        return len(data)


@functools.cache
def file_system() -> Any:
    """Return fsspec's file system for gs://, one per process. Raises ImportError without gcsfs.

    The settings are the process's, so that Orbax has them for what it opens itself: no cache of
    listings, because another process may have written since; and no hierarchical namespaces, which
    cost a request for each query and are of use only for renaming folders.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow, where installed, would take over
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")


@functools.cache
def check_bucket(bucket: str) -> None:
    """Raise UserError unless this user can list `bucket`. Sends one request per process."""
    try:
        with os_errors(ObjectPath(SCHEME + bucket)):
            file_system().ls(bucket, detail=False, max_results=1)
    except ImportError as error:
        raise UserError(f"{SCHEME}{bucket} needs the package gcsfs: {INSTALL}") from error
    except FileNotFoundError as error:
        raise UserError(
            f"bucket {SCHEME}{bucket} does not exist: create it, or correct the name"
        ) from error
    except OSError as error:
        line = f"cannot read {SCHEME}{bucket}: {error.strerror}"
        raise UserError(line, exit_code(error)) from error


def listing(folder: pathlib.Path) -> dict[str, dict]:
    """Return {name: metadata} of the objects and folders directly in `folder`, sorted by name."""
    with os_errors(folder):
        objects = file_system().ls(str(folder), detail=True)
    # An empty object "FOLDER/", which the cloud's console makes, is listed as the folder itself.
    itself = str(folder).removeprefix(SCHEME).rstrip("/")
    by_name = sorted((entry["name"].rstrip("/"), entry) for entry in objects)
    return {name.rpartition("/")[2]: entry for name, entry in by_name if name != itself}

"""Turn what a disk, a bucket or a broken file raises into one line for the user."""

import contextlib
import errno
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator

from vit_scale.errors import FAILED, RESUMABLE, STORAGE, UserError

LOGIN = "no credentials: run `gcloud auth application-default login`, or use a service account"
# Object storage's clients. Some of their exceptions are not OSErrors; the others lack `strerror`.
CLIENTS = ("gcsfs", "google", "aiohttp", "requests", "fsspec")
# How Orbax and TensorStore quote the system or the bucket in exceptions of any type.
QUOTED = ("RESOURCE_EXHAUSTED", "gs://", *map(os.strerror, STORAGE))
# What numpy's and json's readers raise for a damaged file.
DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
LONGEST = 300  # characters of a reason


@contextlib.contextmanager
def user_errors(
    failure: str,
    advice: str = "",
    code: int = FAILED,
    also: tuple[type[Exception], ...] = (),
    quoted: bool = False,
) -> Iterator[None]:
    """Turn storage errors into UserError("FAILURE: REASON; ADVICE", code).

    REASON is one line:
      OSError: its strerror, and its filename unless FAILURE has it.
      an exception of object storage's clients: its text, or how to log in.
      a type in `also`, such as DAMAGED for files that are parsed: its text.
      with `quoted`, an exception that quotes one of the above, as Orbax's do: the quoted reason.

    A UserError and every other exception pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = reason(error)
        if quoted and text is None:
            text = _quoted_reason(error)
        if text is None and isinstance(error, also):
            text = one_line(error)
        if text is None:
            raise
        file = str(getattr(error, "filename", None) or "")
        if file not in failure:
            text += f" ({file})"
        raise UserError(f"{failure}: {text}{advice and f'; {advice}'}", code) from error


@contextlib.contextmanager
def os_errors(path: pathlib.PurePath) -> Iterator[None]:
    """Turn what object storage's clients raise about `path` into an OSError like a disk's.

    A missing object is a FileNotFoundError; any other failure an OSError(EIO). Both have a
    `strerror` and a `filename`. Exceptions of other packages pass unchanged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except Exception as error:
        text = reason(error)
        if text is None:
            raise
        raise OSError(errno.EIO, text, str(path)) from error


def reason(error: BaseException) -> str | None:
    """Return in one line why storage failed; None for an exception that storage did not raise."""
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError):
        if error.strerror:
            return error.strerror
    elif package not in CLIENTS:
        return None
    if getattr(error, "code", None) == 401 or "Anonymous caller" in str(error):
        return LOGIN
    return one_line(error)


def exit_code(error: BaseException) -> int:
    """Return RESUMABLE for a disk that is full, read-only or failing, else FAILED."""
    return RESUMABLE if getattr(error, "errno", None) in STORAGE else FAILED


def one_line(error: BaseException) -> str:
    """Return an exception's text on one line, or its type's name if it has none."""
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__


def _quoted_reason(error: Exception) -> str | None:
    text = " ".join(str(error).split())
    if not any(part in text for part in QUOTED):
        return None
    # TensorStore names first what it could not write, and last the system's reason.
    match = re.search(r"([^:\"]+) \[os_error_code", text)
    return match[1].strip() if match else one_line(error)

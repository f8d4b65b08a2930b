"""Turn what a disk, a bucket or a broken file raises into one line for the user."""

import contextlib
import errno
import http.client
import os
import pathlib
import re
import socket
import ssl
import zipfile
import zlib
from collections.abc import Iterator

from vit_scale.errors import FAILED, RESUMABLE, STORAGE, UserError

LOGIN = "no credentials: run `gcloud auth application-default login`, or use a service account"
# Network clients. Some of their exceptions are not OSErrors; the others lack `strerror`.
CLIENTS = ("gcsfs", "google", "aiohttp", "requests", "fsspec", "http", "urllib")
# How Orbax and TensorStore quote the system or the bucket in exceptions of any type.
QUOTED = ("RESOURCE_EXHAUSTED", "gs://", *map(os.strerror, STORAGE))
# What numpy's and json's readers raise for a damaged file.
DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
NETWORK = (  # errors of connections
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT),
    *(errno.ENETUNREACH, errno.EHOSTUNREACH),
)
LONGEST = 300  # characters of a reason


@contextlib.contextmanager
def user_errors(
    failure: str,
    advice: str = "",
    code: int | None = None,
    also: tuple[type[Exception], ...] = (),
    quoted: bool = False,
) -> Iterator[None]:
    """Turn storage errors into UserError("FAILURE: REASON; ADVICE", code).

    Without a `code` it is `exit_code`'s, except that a read-only disk is FAILED: before training
    has begun it is a wrong folder, which another try does not change.

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
        if code is None:
            read_only = getattr(error, "errno", None) == errno.EROFS
            code = FAILED if read_only else exit_code(error)
        raise UserError(f"{failure}: {text}{advice and f'; {advice}'}", code) from error


@contextlib.contextmanager
def os_errors(path: pathlib.PurePath) -> Iterator[None]:
    """Turn what object storage's clients raise about `path` into an OSError like a disk's.

    A missing object is a FileNotFoundError; what the storage refuses is a PermissionError, and
    any other failure an OSError(EIO). All have a `strerror` and a `filename`. Exceptions of other
    packages pass unchanged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except Exception as error:
        text = reason(error)
        if text is None:
            raise
        number = errno.EACCES if _is_refusal(error) else errno.EIO
        raise OSError(number, text, str(path)) from error


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
    """Return RESUMABLE where another try may help, else FAILED.

    It may for a disk that is full, read-only or failing, and for a bucket or network that does not
    answer or answers with an error of its own (5xx, 408, 429).
    """
    if getattr(error, "errno", None) in STORAGE + NETWORK:
        return RESUMABLE
    client = type(error).__module__.partition(".")[0] in CLIENTS
    lost = client or isinstance(error, TimeoutError | socket.gaierror)
    return RESUMABLE if lost and not _is_refusal(error) else FAILED


def _is_refusal(error: BaseException) -> bool:
    """Tell whether a server refused a request that it will refuse again, or can't be meant."""
    if isinstance(cause := getattr(error, "reason", None), BaseException):  # of urllib's URLError
        return _is_refusal(cause)
    if isinstance(error, http.client.InvalidURL | ssl.SSLCertVerificationError):
        return True
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
        return True  # no such host
    status = str(getattr(error, "code", None) or getattr(error, "status", ""))
    permanent = re.fullmatch(r"4\d\d", status) and status not in ("408", "429")
    login = type(error).__name__ in ("DefaultCredentialsError", "RefreshError")
    # gcsfs raises 403 as an OSError with nothing but a text.
    text = reason(error) or ""
    forbidden = isinstance(error, PermissionError) or text.startswith((LOGIN, "Forbidden: "))
    return bool(permanent) or login or forbidden


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

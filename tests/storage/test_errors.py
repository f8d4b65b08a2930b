"""storage.errors: each kind of failure is one line with the path, the reason and what to do."""

import errno
import os
import pathlib
import socket
import ssl
from http.client import InvalidURL
from urllib.error import URLError

import pytest

from vit_scale.errors import FAILED, RESUMABLE, UserError
from vit_scale.storage import paths
from vit_scale.storage.errors import DAMAGED, exit_code, os_errors, reason, user_errors

FULL = os.strerror(errno.ENOSPC)
HttpError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": 503})
Anonymous = type("Anonymous", (OSError,), {"__module__": "gcsfs.retry", "code": 401})


def http_error(code: int) -> Exception:
    """What gcsfs raises for an answer with this status."""
    return type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": code})("refused")


def translated(error: Exception, **opts) -> str:
    with (
        pytest.raises(UserError) as caught,
        user_errors("cannot write /a", "free space", **opts),
    ):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_each_kind_of_failure_has_its_reason():
    full = OSError(errno.ENOSPC, FULL)
    assert translated(full) == f"cannot write /a: {FULL}; free space"
    assert translated(OSError(errno.ENOSPC, FULL, "/a")) == f"cannot write /a: {FULL}; free space"
    assert translated(OSError(errno.ENOSPC, FULL, "/b")).startswith(
        f"cannot write /a: {FULL} (/b); "
    )
    assert translated(HttpError("backend\nerror")) == "cannot write /a: backend error; free space"
    assert "gcloud auth" in translated(Anonymous("Anonymous caller"))
    assert translated(KeyError("x"), also=DAMAGED) == "cannot write /a: 'x'; free space"
    quoted = ValueError(f'Error writing "/a/b": {FULL} [os_error_code=ENOSPC]')
    assert translated(quoted, quoted=True) == f"cannot write /a: {FULL}; free space"


@pytest.mark.parametrize("error", [UserError("x", 2), ValueError("a bug"), KeyboardInterrupt()])
def test_everything_else_passes_unchanged(error):
    with (
        pytest.raises(type(error)) as caught,
        user_errors("cannot write /a", also=(KeyError,), quoted=True),
    ):
        raise error
    assert caught.value is error


def test_errors_of_objects_look_like_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, os_errors(tmp_path):
        raise FileNotFoundError("gs://a/b")
    assert (caught.value.strerror, caught.value.filename) == ("no such object", str(tmp_path))
    with pytest.raises(OSError, match="backend") as caught, os_errors(tmp_path):
        raise HttpError("backend error")
    assert caught.value.errno == errno.EIO
    with pytest.raises(ValueError, match="a bug"), os_errors(tmp_path):
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, FULL), RESUMABLE),
        (PermissionError(errno.EACCES, "Permission denied"), FAILED),
        (FileNotFoundError(errno.ENOENT, "no such object"), FAILED),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), FAILED),
        (HttpError("backend error"), RESUMABLE),
        (http_error(429), RESUMABLE),
        (http_error(403), FAILED),
        (OSError("Forbidden: https://storage/b"), FAILED),
        (Anonymous("Anonymous caller"), FAILED),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), RESUMABLE),
        (TimeoutError("timed out"), RESUMABLE),
        (socket.gaierror(-3, "Temporary failure in name resolution"), RESUMABLE),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), FAILED),
        (URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known")), FAILED),
        (URLError(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")), RESUMABLE),
        (URLError(ssl.SSLCertVerificationError(1, "certificate verify failed")), FAILED),
        (InvalidURL("URL can't contain control characters"), FAILED),
        (ValueError("a bug"), FAILED),
    ],
    ids=repr,
)
def test_what_another_try_may_help_is_resumable(error, code, tmp_path):
    """A bucket's own failures stay so once they look like those of a file."""
    assert exit_code(error) == code
    if reason(error) is None:
        return
    with pytest.raises(UserError) as caught, user_errors("cannot read"):
        raise error
    assert caught.value.code == code
    try:
        with os_errors(tmp_path):
            raise error
    except OSError as translated:
        assert exit_code(translated) == code or isinstance(error, BrokenPipeError)


def test_a_home_folder_is_found_where_the_shell_left_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.parse("~/data") == tmp_path / "data"
    assert paths.parse("a/~b") == pathlib.Path("a/~b")

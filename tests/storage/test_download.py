"""Downloads from a local server: resumed, verified, unpacked completely or not at all."""

import hashlib
import http.server
import io
import re
import tarfile
import threading

import pytest

from vit_scale.data import downloads
from vit_scale.errors import FAILED, RESUMABLE, UserError
from vit_scale.storage import download


def archive(*names: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 50_000
            tar.addfile(member, io.BytesIO(hashlib.shake_128(name.encode()).digest(member.size)))
    return stream.getvalue()


WHOLE = archive("cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch")
MD5 = hashlib.md5(WHOLE).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        header = self.headers["Range"]
        server.ranges.append(header)
        version = self.headers["If-Range"]
        server.versions.append(version)
        resumes = server.resumes and version in (None, server.headers.get("ETag"))
        start = int(re.fullmatch(r"bytes=(\d+)-", header)[1]) if header and resumes else 0
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if target := server.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        self.send_response(206 if start else server.status)
        body = server.content[start:]
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.resumes, server.breaks_after = WHOLE, True, None
        server.ranges, server.status, server.redirects = [], 200, {}
        server.headers, server.versions = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(folder, server, md5=MD5):
    file = downloads.File(server.url, f"md5={md5}", "cifar-10-batches-py")
    return downloads.download("cifar10", folder, [file])


def refused(folder, server, md5=MD5, code=None) -> str:
    with pytest.raises(UserError) as caught:
        get(folder, server, md5)
    assert "\n" not in str(caught.value)
    assert code in (None, caught.value.code)
    assert not (folder / "cifar-10-batches-py").exists()
    return str(caught.value)


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_downloaded_and_unpacked(tmp_path, server):
    folder = get(tmp_path / "new", server)
    assert folder == tmp_path / "new/cifar-10-batches-py"
    assert names(folder) == ["data_batch_1", "test_batch"]
    expected = hashlib.shake_128(b"cifar-10-batches-py/test_batch").digest(50_000)
    assert (folder / "test_batch").read_bytes() == expected
    assert names(tmp_path / "new") == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_a_second_download_does_nothing(tmp_path, server):
    get(tmp_path, server)
    get(tmp_path, server)
    assert server.ranges == [None]


def test_a_broken_download_resumes_where_it_stopped(tmp_path, server):
    server.breaks_after = 30_000
    message = refused(tmp_path, server)
    assert "rerun the same command" in message
    assert names(tmp_path) == ["cifar-10-python.tar.gz.partial"]
    server.breaks_after = None
    get(tmp_path, server)
    assert server.ranges == [None, "bytes=30000-"]


def test_a_download_starts_over_if_the_server_cannot_resume(tmp_path, server):
    (tmp_path / "cifar-10-python.tar.gz.partial").write_bytes(WHOLE[:1000])
    server.resumes = False
    get(tmp_path, server)
    assert server.ranges == ["bytes=1000-"]


TAG = {"ETag": '"one"', "Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}
WEAK = {**TAG, "ETag": 'W/"one"'}


def interrupted(server, file, headers) -> None:
    """Begin a download without a checksum, of a file of this version."""
    server.headers, server.breaks_after = headers, 30_000
    with pytest.raises(download.Unreachable):
        download.fetch(server.url, file)
    server.breaks_after = None


@pytest.mark.parametrize(("headers", "version"), [(TAG, TAG["ETag"]), (WEAK, TAG["Last-Modified"])])
def test_a_resumed_download_is_of_the_version_that_it_began_with(
    tmp_path, server, monkeypatch, headers, version
):
    monkeypatch.setattr(download, "UNENCRYPTED", "none")
    interrupted(server, tmp_path / "file", headers)
    server.headers = {"ETag": version}  # the handler compares it
    download.fetch(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == WHOLE
    assert (server.ranges[-1], server.versions[-1]) == ("bytes=30000-", version)
    assert names(tmp_path) == ["file"]


def test_a_download_starts_over_if_the_file_has_changed(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "UNENCRYPTED", "none")
    interrupted(server, tmp_path / "file", TAG)
    server.content, server.headers = bytes(40_000), {"ETag": '"two"'}
    server.breaks_after = 35_000
    with pytest.raises(download.Unreachable):
        download.fetch(server.url, tmp_path / "file")
    server.breaks_after = None
    download.fetch(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == bytes(40_000)
    assert server.versions == [None, '"one"', '"two"']
    assert server.ranges == [None, "bytes=30000-", "bytes=35000-"]


def test_a_download_of_unknown_version_resumes_only_by_checksum(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "UNENCRYPTED", "none")
    interrupted(server, tmp_path / "file", {})
    download.fetch(server.url, tmp_path / "file")
    assert server.ranges == [None, None] and (tmp_path / "file").read_bytes() == WHOLE


def test_a_file_that_became_shorter_is_not_taken_for_complete(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "UNENCRYPTED", "none")
    interrupted(server, tmp_path / "file", TAG)
    server.content = WHOLE[:20_000]  # of a server that gives it the same version
    with pytest.raises(download.Unreachable, match="the file has changed on the server"):
        download.fetch(server.url, tmp_path / "file")
    assert names(tmp_path) == []
    download.fetch(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == WHOLE[:20_000]


def test_http_needs_a_checksum(tmp_path, server):
    with pytest.raises(UserError) as caught:
        download.fetch(server.url, tmp_path / "file")
    assert str(caught.value) == (
        f"{server.url} is neither encrypted nor verified: use https://, or add the file's "
        f"checksum, {server.url}#sha256=HEX"
    )
    assert server.ranges == [] and not (tmp_path / "file").exists()
    download.fetch(server.url, tmp_path / "file", f"md5={MD5}")
    assert (tmp_path / "file").read_bytes() == WHOLE


def test_https_that_redirects_to_http_needs_a_checksum(tmp_path, server, monkeypatch):
    """The first address stands for an encrypted one."""
    first, second = (server.url.replace("127.0.0.1", host) for host in ("localhost", "127.0.0.1"))
    monkeypatch.setattr(download, "UNENCRYPTED", ("http://127",))
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    server.redirects = {"/moved": second}
    address = first.replace("/cifar-10-python.tar.gz", "/moved")
    with pytest.raises(UserError, match=f"{second} is neither encrypted nor verified"):
        download.fetch(address, tmp_path / "file")
    # Who changes what is not encrypted may redirect to an encrypted address.
    hop = second.replace("/cifar-10-python.tar.gz", "/hop")
    server.redirects = {"/moved": hop, "/hop": first}
    with pytest.raises(UserError, match=f"{hop} is neither encrypted nor verified"):
        download.fetch(address, tmp_path / "file")
    assert names(tmp_path) == []
    download.fetch(address, tmp_path / "file", f"md5={MD5}")
    assert (tmp_path / "file").read_bytes() == WHOLE


def test_a_complete_partial_file_is_used(tmp_path, server):
    (tmp_path / "cifar-10-python.tar.gz.partial").write_bytes(WHOLE)
    get(tmp_path, server)
    assert server.ranges == [f"bytes={len(WHOLE)}-"]


def test_a_wrong_file_is_refused_and_not_resumed(tmp_path, server):
    message = refused(tmp_path, server, md5="0" * 32)
    assert f"has MD5 {MD5}, not {'0' * 32}" in message
    assert names(tmp_path) == []


def test_an_existing_archive_is_used(tmp_path, server):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(WHOLE)
    get(tmp_path, server)
    assert server.ranges == []


def test_a_damaged_existing_archive_is_refused(tmp_path, server):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(WHOLE[:-1])
    assert "it is damaged or a different file; remove it" in refused(tmp_path, server)
    assert server.ranges == []


@pytest.mark.parametrize(("status", "code"), [(404, FAILED), (503, RESUMABLE), (429, RESUMABLE)])
def test_a_server_error_is_a_one_line_error(tmp_path, server, status, code):
    server.status = status
    assert server.url in refused(tmp_path, server, code=code)


def test_without_a_network_the_error_says_where_to_put_the_archive(tmp_path, server):
    server.shutdown()
    server.server_close()
    message = refused(tmp_path, server, code=RESUMABLE)
    assert "cannot download" in message
    assert f"by other means to {tmp_path / 'cifar-10-python.tar.gz'}" in message


def test_an_archive_with_paths_outside_its_folder_is_refused(tmp_path, server):
    server.content = archive("cifar-10-batches-py/a", "../outside")
    message = refused(tmp_path / "in", server, hashlib.md5(server.content).hexdigest())
    assert "cannot unpack" in message
    assert names(tmp_path) == ["in"] and names(tmp_path / "in") == ["cifar-10-python.tar.gz"]


def test_the_official_archive_is_downloaded_securely():
    (file,) = downloads.SETS["cifar10"].files
    assert file.url == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert file.checksum == "md5=c58f30108f718f92721af3d95e74349a"

"""Downloads from a local server: resumed, verified, unpacked completely or not at all."""

import hashlib
import http.server
import io
import re
import tarfile
import threading

import pytest

from vit_scale.data import downloads
from vit_scale.errors import UserError


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
        start = int(re.fullmatch(r"bytes=(\d+)-", header)[1]) if header and server.resumes else 0
        if start and start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if start else server.status)
        body = server.content[start:]
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
        server.ranges, server.status = [], 200
        server.url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(folder, server, md5=MD5):
    file = downloads.File(server.url, f"md5={md5}", "cifar-10-batches-py")
    return downloads.download("cifar10", folder, [file])


def refused(folder, server, md5=MD5) -> str:
    with pytest.raises(UserError) as caught:
        get(folder, server, md5)
    assert "\n" not in str(caught.value)
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


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_error_is_a_one_line_error(tmp_path, server, status):
    server.status = status
    assert server.url in refused(tmp_path, server)


def test_without_a_network_the_error_says_where_to_put_the_archive(tmp_path, server):
    server.shutdown()
    server.server_close()
    message = refused(tmp_path, server)
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

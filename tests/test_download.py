"""pre_process/download.py against a server on this machine, and unpacking what arrives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from raw_folders import make_cub
from scripts import Outcome, failed, run_in_process

from pre_process import download, sources
from pre_process.archives import UnusableError, unpack
from pre_process.sources import Remote
from utils.errors import UserError

NOISE = np.random.default_rng(0).bytes(300_000)  # does not compress


class Server:
    """Serves `files` by path, and announces `longer` bytes more than it sends."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.longer = 0
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                content = server.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content) + server.longer))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, path: str, content: bytes) -> str:
        """Serve a file; returns its address."""
        self.files[path] = content
        return f"http://127.0.0.1:{self.http.server_port}{path}"


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """A server that is the only one in reach."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def archive(tmp_path) -> bytes:
    """CUB_200_2011.tgz as Caltech packs it, with six images and some bytes to send."""
    folder = tmp_path / "packed"
    make_cub(folder / "CUB_200_2011")
    (folder / "CUB_200_2011" / "README").write_bytes(NOISE)
    (folder / "attributes.txt").write_text("1 has_bill\n")
    with tarfile.open(tmp_path / "packed.tgz", "w:gz") as tar:
        for name in ("CUB_200_2011", "attributes.txt"):
            tar.add(folder / name, name)
    return (tmp_path / "packed.tgz").read_bytes()


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()}"


@pytest.fixture
def cub(monkeypatch) -> Callable[..., Outcome]:
    """Run the script for cub200 with these mirrors of CUB_200_2011.tgz."""

    def run(data: Path, urls: list[str], *options: object, checksum: str | None = None) -> Outcome:
        publish(monkeypatch, "cub200", [Remote("CUB_200_2011.tgz", urls, checksum)])
        return run_in_process("download.py", "cub200", "--data_dir", data, "--retries", 0, *options)

    return run


def publish(monkeypatch, name: str, *published: list[Remote]) -> None:
    """Put other sources in the place of those of `name`."""
    target = sources.TARGETS[name]._replace(sources=published)
    monkeypatch.setitem(download.TARGETS, name, target)


def arrived(folder: Path) -> None:
    """Check that the archive's content is all there, and nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == ["CUB_200_2011", "attributes.txt"]
    assert (folder / "CUB_200_2011" / "README").read_bytes() == NOISE


# ------------------------------------------------------------------------------ what goes well


def test_what_is_downloaded_can_be_pre_processed(server, archive, cub, tmp_path):
    url = server.put("/a", archive)
    data = tmp_path / "data"
    done = cub(data, [url], checksum=md5(archive))
    assert (done.code, done.err) == (0, "")
    assert f"checksum {md5(archive)}" in done.out
    arrived(data / "cub200")
    options = ("--data_dir", data, "--image_size", 8, "--workers", 1)
    assert run_in_process("pre_process_cub200.py", *options).code == 0
    assert len(np.load(data / "cub200" / "training_cub200_8resized_img.npy")) == 3
    again = cub(data, [url])
    assert again.code == 0
    assert "nothing to do" in again.out
    assert server.asked == ["/a"]


def test_the_archive_is_left_kept_or_taken_as_it_lies(server, archive, cub, tmp_path):
    folder = tmp_path / "cub200"
    assert cub(folder, [server.put("/a", archive)], "--no_unpack").code == 0
    assert [path.name for path in folder.iterdir()] == ["CUB_200_2011.tgz"]
    gone = server.put("/a", archive)[:-1] + "gone"
    assert cub(folder, [gone], "--keep_archive", checksum=md5(archive)).code == 0
    assert server.asked == ["/a"]
    (folder / "CUB_200_2011.tgz").unlink()
    arrived(folder)


def test_an_own_mirror_comes_first_and_its_checksum_can_be_demanded(server, archive, cub, tmp_path):
    theirs = server.put("/theirs.tgz", archive)
    mirror = server.put("/mirror.tgz", archive)
    sha = hashlib.sha256(archive).hexdigest()
    done = cub(tmp_path / "a", [theirs], "--url", mirror)
    assert server.asked == ["/mirror.tgz"]
    assert f"none published; next time --sha256 {sha}" in done.out
    assert cub(tmp_path / "b", [theirs], "--sha256", sha.upper()).code == 0
    assert cub(tmp_path / "c", [theirs], "--sha256", "0" * 64).code == 2


def test_weights_go_to_the_models(server, monkeypatch, tmp_path):
    file = Remote("googlenet.h5", [server.put("/g", NOISE)], md5(NOISE))
    publish(monkeypatch, "googlenet", [file])
    assert run_in_process("download.py", "googlenet", "--models_dir", tmp_path / "m").code == 0
    assert (tmp_path / "m" / "googlenet.h5").read_bytes() == NOISE


# ----------------------------------------------------------------------------- what goes wrong


def test_the_next_mirror_is_tried(server, archive, cub, tmp_path):
    """After one that is gone and one with other bytes."""
    gone = server.put("/", b"") + "gone"
    urls = [gone, server.put("/wrong", b"<html>please log in</html>"), server.put("/a", archive)]
    done = cub(tmp_path, urls, checksum=md5(archive))
    assert done.code == 0
    assert f"{gone}: 404" in done.out
    assert "hash" in done.out
    assert server.asked == ["/gone", "/wrong", "/a"]
    arrived(tmp_path / "cub200")


def test_a_connection_that_breaks_leaves_nothing(server, archive, cub, tmp_path):
    server.longer = 1000
    url = server.put("/a", archive)
    done = cub(tmp_path, [url])
    failed(done, "cub200: no source gave it; the steps by hand are above")
    assert "IncompleteRead" in done.out
    assert list((tmp_path / "cub200").iterdir()) == []
    assert "CUB-200-2011, by hand:\n  1. open https://data.caltech.edu" in done.out
    assert f"2. put it into {tmp_path / 'cub200'} and run this command again" in done.out


def test_the_next_source_is_tried_and_the_next_name(server, archive, monkeypatch, tmp_path):
    broken = Remote("a.zip", [server.put("/broken", b"PK\x03\x04 no more")])
    good = Remote("b.tgz", [server.put("/good", archive)])
    publish(monkeypatch, "car196", [broken], [good])
    done = run_in_process("download.py", "inshop", "car196", "--data_dir", tmp_path)
    failed(done, "inshop: no source gave it")
    assert "car196" not in done.err
    assert "In-shop Clothes Retrieval (DeepFashion), by hand:" in done.out
    assert "a.zip: cannot be unpacked" in done.out
    assert (tmp_path / "car196" / "CUB_200_2011").is_dir()


def test_a_source_whose_files_are_there_goes_first(server, archive, monkeypatch, tmp_path):
    (tmp_path / "car196").mkdir()
    (tmp_path / "car196" / "b.tgz").write_bytes(archive)
    url = server.put("/a", NOISE)
    publish(monkeypatch, "car196", [Remote("a.tgz", [url])], [Remote("b.tgz", [url])])
    assert run_in_process("download.py", "car196", "--data_dir", tmp_path).code == 0
    assert server.asked == []


def test_too_little_space_is_seen_before_the_download(server, monkeypatch, tmp_path):
    publish(monkeypatch, "sop", [Remote("a.zip", [server.put("/a", b"")], size=10**18)])
    failed(run_in_process("download.py", "sop", "--data_dir", tmp_path), "are free; make room")
    assert server.asked == []


BAD_OPTIONS = [
    ((), "give a NAME"),
    (("cub200", "--url", "ftp://a.org/b"), "http://"),
    (("car196", "--url", "http://a.org/%2e%2e"), "plain name"),
    (("cub200", "sop", "--url", "http://a.org/b.zip"), "one NAME"),
    (("cub200", "--data_dir", "/dev/null/x"), "is not a folder"),
]


@pytest.mark.parametrize(("argv", "words"), BAD_OPTIONS)
def test_bad_options(argv, words):
    failed(run_in_process("download.py", *argv), words, script="download.py")


# ------------------------------------------------------------------------------------ archives


def tar_of(*members: tuple[str, bytes, str]) -> bytes:
    """Pack an empty file `good` and members: name, type, target of a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, kind, link in (("good", tarfile.REGTYPE, ""), *members):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = link
            tar.addfile(info)
    return out.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, content)
    return out.getvalue()


UNUSABLE = {
    "tar up": lambda: tar_of(("../out", tarfile.REGTYPE, "")),
    "tar link": lambda: tar_of(("l", tarfile.SYMTYPE, "/etc")),
    "tar device": lambda: tar_of(("d", tarfile.CHRTYPE, "")),
    "tar cut": lambda: tar_of(("a", tarfile.REGTYPE, ""))[:-40],
    "zip cut": lambda: zip_of("a", NOISE)[:-100],
    "a page": lambda: b"<html>" * 100,
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_archive_leaves_nothing(kind, tmp_path):
    into = tmp_path / "into"
    into.mkdir()
    (into / "a.tgz").write_bytes(UNUSABLE[kind]())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnusableError, match=r"a\.tgz: cannot be unpacked"):
        unpack([into / "a.tgz"], into)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of("a", b"new"))
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match="is there already; move it away"):
        unpack([tmp_path / "a.zip"], tmp_path)
    assert (tmp_path / "a").read_text() == "old"

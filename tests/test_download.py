"""pre_process/download.py against a server on this machine that drops, lies, stalls and sends hostile archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_folders import make_cub
from scripts import ROOT, Outcome, failed, run_in_process
from web_server import Served, Server

from pre_process import download
from utils import fetch as fetching
from utils import unpack as unpacking
from utils.fetch import Alone, Digest, MirrorError, Redirects, Remote
from utils.unpack import UnpackError, unpack

QUICK = ("--pause", 0.01, "--timeout", 0.5, "--retries", 2)
NOISE = np.random.default_rng(0).bytes(300_000)  # does not compress


@pytest.fixture(autouse=True)
def nothing_leaves_this_machine(monkeypatch):
    """A test that asked another server would find none."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def archive(tmp_path) -> bytes:
    """CUB_200_2011.tgz as Caltech packs it, in small, with some bytes to send."""
    folder = tmp_path / "packed"
    make_cub(folder / "CUB_200_2011")
    (folder / "CUB_200_2011" / "README").write_bytes(NOISE)
    (folder / "attributes.txt").write_text("1 has_bill\n")
    with tarfile.open(tmp_path / "packed.tgz", "w:gz") as tar:
        for name in ("CUB_200_2011", "attributes.txt"):
            tar.add(folder / name, name)
    return (tmp_path / "packed.tgz").read_bytes()


def published(content: bytes) -> dict[str, object]:
    return {"size": len(content), "digests": (Digest("md5", hashlib.md5(content).hexdigest()),)}


@pytest.fixture
def cub(monkeypatch) -> Callable[..., Outcome]:
    """Run the script for cub200 with these mirrors of CUB_200_2011.tgz."""

    def run(data: Path, urls: list[str], *options: object, **known: object) -> Outcome:
        file = Remote("CUB_200_2011.tgz", urls, archive=True, **known)
        target = download.TARGETS["cub200"]._replace(sources=(download.Source("a mirror", (file,)),))
        monkeypatch.setitem(download.TARGETS, "cub200", target)
        return run_in_process("download.py", "cub200", "--data_dir", data, *QUICK, *options)

    return run


def arrived(folder: Path) -> None:
    """The archive's content is all there, and nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == ["CUB_200_2011", "attributes.txt"]
    assert (folder / "CUB_200_2011" / "README").read_bytes() == NOISE
    assert (folder / "attributes.txt").read_text() == "1 has_bill\n"
    assert not (folder / "attributes.txt").stat().st_mode & 0o111


# ------------------------------------------------------------------------------------------------ what goes well


def test_what_is_downloaded_can_be_pre_processed(server, archive, cub, tmp_path):
    url = server.put("/a", archive)
    done = cub(tmp_path / "data", [url], **published(archive))
    assert (done.code, done.err) == (0, "")
    assert f"MD5 {hashlib.md5(archive).hexdigest()} as published" in done.out
    arrived(tmp_path / "data" / "cub200")
    done = run_in_process("pre_process_cub200.py", "--data_dir", tmp_path / "data", "--image_size", 8, "--workers", 1)
    assert (done.code, done.err) == (0, "")
    assert len(np.load(tmp_path / "data" / "cub200" / "training_cub200_8resized_img.npy")) == 3
    asked = len(server.asked)
    again = cub(tmp_path / "data", [url])
    assert again.code == 0 and "nothing to do" in again.out and len(server.asked) == asked


def test_the_archive_is_kept_or_left_as_it_is(server, archive, cub, tmp_path):
    url, folder = server.put("/a", archive), tmp_path / "cub200"
    assert cub(folder, [url], "--no_unpack").code == 0
    assert [path.name for path in folder.iterdir()] == ["CUB_200_2011.tgz"]
    done = cub(folder, [], "--keep_archive", **published(archive))  # as if it was put there by hand
    assert done.code == 0 and "is there already" in done.out
    assert (folder / "CUB_200_2011.tgz").read_bytes() == archive
    (folder / "CUB_200_2011.tgz").unlink()
    arrived(folder)


def test_a_checksum_is_told_or_demanded(server, archive, cub, tmp_path):
    url, sha = server.put("/a", archive), hashlib.sha256(archive).hexdigest()
    done = cub(tmp_path / "cub200", [url])
    assert (
        done.code == 0 and f"no checksum of it is published; demand this one the next time: --sha256 {sha}" in done.out
    )
    assert cub(tmp_path / "b" / "cub200", [url], "--sha256", sha.upper()).code == 0
    done = cub(tmp_path / "c", [url], "--sha256", "0" * 64, **published(archive))
    failed(done, sha, "0" * 64)
    assert not list((tmp_path / "c" / "cub200").iterdir())


def test_ones_own_mirror_comes_first(server, archive, cub, tmp_path):
    theirs, own = server.put("/theirs.tgz", archive), server.put("/own.tgz", archive)
    assert cub(tmp_path / "a", [theirs], "--url", own, **published(archive)).code == 0
    assert [path for path, _ in server.asked] == ["/own.tgz"]
    server.put("/own.tgz", archive + b"!")  # what is published of the file is demanded of it, too
    done = cub(tmp_path / "b", [theirs], "--url", own, **published(archive))
    assert done.code == 0 and "announces" in done.out
    arrived(tmp_path / "b" / "cub200")


def test_weights_go_to_the_models(server, monkeypatch, tmp_path):
    file = Remote("googlenet.h5", [server.put("/g", NOISE)], **published(NOISE))
    target = download.TARGETS["googlenet"]._replace(sources=(download.Source("a", (file,)),))
    monkeypatch.setitem(download.TARGETS, "googlenet", target)
    assert run_in_process("download.py", "googlenet", "--models_dir", tmp_path / "m", *QUICK).code == 0
    assert (tmp_path / "m" / "googlenet.h5").read_bytes() == NOISE


# ------------------------------------------------------------------------------------------------ interruptions


def test_dropped_connections_are_resumed(server, archive, cub, tmp_path):
    url = server.put("/a", archive, most=[100_000] * 2)
    assert cub(tmp_path, [url], "--retries", 1, **published(archive)).code == 0
    arrived(tmp_path / "cub200")
    assert server.ranges() == [None, "bytes=100000-", "bytes=200000-"]
    assert [headers.get("If-Range") for _, headers in server.asked] == [None, '"1"', '"1"']


def test_a_server_without_ranges_begins_again(server, archive, cub, tmp_path):
    url = server.put("/a", archive, ranges=False, most=[100_000, 200_000])
    assert cub(tmp_path, [url], **published(archive)).code == 0
    arrived(tmp_path / "cub200")
    assert server.ranges()[1:] == ["bytes=100000-", "bytes=200000-"]


def test_another_mirror_continues_where_the_checksum_decides(server, archive, cub, tmp_path):
    first, second = server.put("/a", archive, most=[100_000, 0, 0, 0]), server.put("/b", archive, etag=None)
    assert cub(tmp_path, [first, second], **published(archive)).code == 0
    arrived(tmp_path / "cub200")
    assert server.asked[-1][0] == "/b" and server.asked[-1][1]["Range"] == "bytes=100000-"
    shutil.rmtree(tmp_path / "cub200")
    server.put("/a", archive, most=[100_000, 0, 0, 0])
    assert cub(tmp_path, [first, second]).code == 0  # where nothing is published, the second begins anew
    assert server.asked[-1][0] == "/b" and "Range" not in server.asked[-1][1]


@pytest.mark.parametrize("etag", ['"2"', None])
def test_a_file_that_changes_between_attempts(server, archive, cub, etag, tmp_path):
    """By its ETag it is known at once; without one the checksum tells, and all is sent again."""
    old = bytes(len(archive))
    then = Served(archive, etag=etag)
    url = server.put("/a", old, most=[100_000], etag='"1"' if etag else None, then=then)
    assert cub(tmp_path, [url], **published(archive)).code == 0
    arrived(tmp_path / "cub200")
    assert server.ranges() == ([None, "bytes=100000-"] if etag else [None, "bytes=100000-", None])


def test_a_file_that_grew_is_known_by_its_length(server, archive, cub, tmp_path):
    url = server.put("/a", bytes(150_000), most=[100_000], etag=None, then=Served(archive, etag=None))
    done = cub(tmp_path, [url], digests=published(archive)["digests"])
    assert done.code == 0 and "another part than was asked for, or of another file" in done.out
    arrived(tmp_path / "cub200")


def test_a_shorter_file_takes_the_place_of_a_longer_one(server, archive, cub, tmp_path):
    url = server.put("/a", archive * 3, most=[2 * len(archive)], then=Served(archive))
    assert cub(tmp_path, [url]).code == 0  # answers 416
    arrived(tmp_path / "cub200")


def test_a_server_that_sends_another_part(server, archive, cub, tmp_path):
    url = server.put("/a", archive, most=[100_000], then=Served(archive, shift=7))
    assert cub(tmp_path, [url], **published(archive)).code == 0
    arrived(tmp_path / "cub200")
    assert server.ranges() == [None, "bytes=100000-", None]


def test_a_silent_server_is_given_up_and_asked_again(server, archive, cub, tmp_path):
    url = server.put("/a", archive, most=[100_000], stall=True)
    done = cub(tmp_path, [url], "--timeout", 0.2, **published(archive))
    assert done.code == 0 and "timed out" in done.out
    assert server.ranges() == [None, "bytes=100000-"]
    arrived(tmp_path / "cub200")


def test_a_busy_server_is_asked_again(server, archive, cub, tmp_path):
    url = server.put("/a", archive, statuses=[503, 429])
    assert cub(tmp_path, [url], **published(archive)).code == 0
    assert len(server.asked) == 3


def start(url: str, data: Path, *options: object) -> subprocess.Popen:
    argv = [sys.executable, ROOT / "pre_process" / "download.py", "car196", "--data_dir", data, "--url", url, *options]
    return subprocess.Popen([str(word) for word in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_bytes(part: Path, count: int) -> None:
    end = time.monotonic() + 30
    while not (part.is_file() and part.stat().st_size >= count):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_resumed(server, archive, number, tmp_path):
    url = server.put("/cars.tgz", archive, most=[100_000], stall=True)
    part = tmp_path / "car196" / "cars.tgz.part"
    process = start(url, tmp_path)
    wait_for_bytes(part, 100_000)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert ("100,000 bytes are kept; the same command goes on" in err) == (number == signal.SIGINT)
    assert part.stat().st_size == 100_000
    done = run_in_process("download.py", "car196", "--data_dir", tmp_path, "--url", url)
    assert (done.code, done.err) == (0, "")
    assert server.ranges() == [None, "bytes=100000-"]
    arrived(tmp_path / "car196")


def test_one_at_a_time(server, archive, cub, tmp_path):
    (tmp_path / "cub200").mkdir()
    with Alone(tmp_path / "cub200"):
        failed(cub(tmp_path, [server.put("/a", archive)]), "another download into it is under way")
    assert not server.asked


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_wrong_bytes_are_thrown_away(server, archive, cub, tmp_path):
    wrong = bytes([archive[0] ^ 1]) + archive[1:]
    bad, good = server.put("/bad", wrong), server.put("/good", archive)
    done = cub(tmp_path / "a", [bad, good], **published(archive))
    assert done.code == 0 and f"its MD5 is {hashlib.md5(wrong).hexdigest()}, not" in done.out
    arrived(tmp_path / "a" / "cub200")
    failed(cub(tmp_path / "b", [bad], **published(archive)), "its MD5 is")
    assert not list((tmp_path / "b" / "cub200").iterdir())
    server.put("/bad", wrong, most=[1000, 10**9] * 3)  # in two pieces: asked for once more, then never again
    asked = len(server.asked)
    failed(cub(tmp_path / "b", [bad], **published(archive)), "its MD5 is")
    assert server.ranges()[asked:] == [None, "bytes=1000-"] * 2


LIES = {
    "longer": ({"length": 400_000}, ["announces 400,000 bytes; published are"], 1),
    "shorter": ({"length": 1000}, ["announces 1,000 bytes; published are"], 1),
    "a page": ({"kind": "text/html; charset=utf-8"}, ["a web page came instead of the file"], 1),
    "not there": ({"statuses": [404]}, ["HTTP 404"], 1),
    "broken": ({"statuses": [500] * 9}, ["HTTP 500", "3 times without getting further"], 3),
    "to a file": ({"redirect": "file:///etc/hostname"}, ["file:///etc/hostname' is not allowed"], 1),
    "to ftp": ({"redirect": "ftp://127.0.0.1/a"}, ["redirects to ftp://127.0.0.1/a, which is not followed"], 1),
    "in a circle": ({"redirect": "/a"}, ["HTTP 302"], None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_cannot_have_the_file(server, archive, cub, lie, tmp_path):
    how, words, asked = LIES[lie]
    url = server.put("/a", archive, **how)
    failed(cub(tmp_path, [url], **published(archive)), url, *words)
    assert asked in (None, len(server.asked))
    assert not list((tmp_path / "cub200").iterdir())


def test_a_length_that_lies_where_none_is_published(server, archive, cub, tmp_path):
    url = server.put("/longer", archive, length=len(archive) + 1000)
    failed(cub(tmp_path / "a", [url]), f"closed at {len(archive):,} of {len(archive) + 1000:,} bytes")
    url = server.put("/shorter", archive, length=len(archive) - 1000)
    failed(cub(tmp_path / "b", [url]), "the archive is damaged")
    assert not list((tmp_path / "b" / "cub200").iterdir())
    url = server.put("/none", archive, length=-1)
    assert cub(tmp_path / "c", [url]).code == 0
    arrived(tmp_path / "c" / "cub200")


def test_a_body_without_end(server, archive, cub, tmp_path, monkeypatch):
    url = server.put("/a", archive + NOISE, length=-1)
    failed(cub(tmp_path, [url], **published(archive)), f"sends more than {len(archive):,} bytes")
    monkeypatch.setattr(fetching, "LARGEST", 100_000)
    failed(cub(tmp_path / "b", [url]), "sends more than 100,000 bytes")


def test_redirections_are_followed_but_not_out_of_https(server, archive, cub, tmp_path):
    server.put("/a", archive)
    url = server.put("/moved", b"", redirect=server.address("/a"))
    assert cub(tmp_path, [url], **published(archive)).code == 0
    arrived(tmp_path / "cub200")
    request = urllib.request.Request("https://a.org/x")
    with pytest.raises(MirrorError, match="not followed"):
        Redirects().redirect_request(request, None, 302, "", {}, "http://a.org/x")
    assert Redirects().redirect_request(request, None, 302, "", {}, "https://b.org/x").full_url == "https://b.org/x"


def test_too_little_space_is_seen_before_the_download(server, archive, cub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * len(archive) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    failed(cub(tmp_path, [server.put("/a", archive)]), "MB are needed", "--data_dir")
    assert not list((tmp_path / "cub200").iterdir())


def test_a_disk_that_fills_up(server, archive, cub, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching, "opened_part", lambda *_: Full())
    failed(cub(tmp_path, [server.put("/a", archive)]), "CUB_200_2011.tgz.part: cannot be written", "No space left")


def test_a_file_put_there_by_hand_that_is_another(archive, cub, tmp_path):
    (tmp_path / "cub200").mkdir()
    path = tmp_path / "cub200" / "CUB_200_2011.tgz"
    path.write_bytes(b"<html>please log in</html>")
    failed(cub(tmp_path, [], **published(archive)), f"{path}: is there, but its MD5 is")
    failed(cub(tmp_path, []), f"{path}: is no .zip and no .tgz archive")
    assert path.exists()


def test_when_all_fail_the_way_by_hand_is_printed(server, cub, tmp_path):
    urls = [server.address("/gone"), server.address("/gone too")[:-4]]
    done = cub(tmp_path, urls)
    failed(done, *urls, "HTTP 404", "by hand", script="download.py")
    assert "CUB-200-2011, by hand:\n  1. open https://data.caltech.edu/records/65de6-vp158 in a browser" in done.out
    assert f"2. put it into {tmp_path / 'cub200'} and run this command again" in done.out


def test_the_next_source_is_tried_and_the_next_name(server, archive, monkeypatch, tmp_path):
    broken = Remote("a.zip", [server.put("/broken", b"PK\x03\x04 no more")], archive=True)
    good = Remote("b.tgz", [server.put("/good", archive)], archive=True)
    target = download.TARGETS["car196"]._replace(
        sources=(download.Source("one", (broken,)), download.Source("two", (good,)))
    )
    monkeypatch.setitem(download.TARGETS, "car196", target)
    done = run_in_process("download.py", "inshop", "car196", "--data_dir", tmp_path, *QUICK)
    failed(done, "inshop: cannot be downloaded by a program")
    assert "car196" not in done.err and "In-shop Clothes Retrieval (DeepFashion), by hand:" in done.out
    arrived(tmp_path / "car196")


@pytest.mark.parametrize(
    "argv, words",
    [
        ((), ("give a NAME",)),
        (("cub",), ("unknown name 'cub'", "did you mean cub200?")),
        (("cub200", "--url", "ftp://a.org/b"), ("--url", "http://")),
        (("cub200", "--url", "file:///etc/passwd"), ("--url", "http://")),
        (("car196", "--url", "http://a.org/%2e%2e"), ("--url", "plain name")),
        (("cub200", "--sha256", "12"), ("--sha256", "64 hexadecimal digits")),
        (("cub200", "sop", "--url", "http://a.org/b.zip"), ("one NAME",)),
        (("cub200", "--timeout", "0"), ("--timeout",)),
        (("cub200", "--data_dir", "/dev/null/x"), ("--data_dir",)),
    ],
)
def test_bad_options(argv, words):
    failed(run_in_process("download.py", *argv), *words, script="download.py")


def test_the_table_of_sources():
    for target in download.TARGETS.values():
        assert target.manual
        for file in (file for source in target.sources for file in source.files):
            assert file.urls and all(url.startswith(("https://", "http://ftp.cs.stanford.edu/")) for url in file.urls)
            assert Path(file.name).name == file.name
            for digest in file.digests:
                assert len(digest.value) == {"md5": 32, "sha256": 64}[digest.kind] and int(digest.value, 16)
            https = all(url.startswith("https://") for url in file.urls)
            assert https or file.digests or file.name == "CARS196.zip"


# ------------------------------------------------------------------------------------------------ hostile archives


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o6777
    return info, b"x" if kind == tarfile.REGTYPE else b""


def zip_of(*members: tuple[str, bytes, int]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return out.getvalue()


def many_names(content: bytes) -> bytes:
    """A zip whose list names the same bytes again and again."""
    out = io.BytesIO(zip_of(("a", content, 0)))
    with zipfile.ZipFile(out, "a") as archive:
        first = archive.filelist[0]
        for n in range(100):
            again = zipfile.ZipInfo(f"b{n}")
            for name in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(again, name, getattr(first, name))
            archive.filelist.append(again)
        archive._didModify = True
    return out.getvalue()


def long_name() -> bytes:
    """A tar whose first entry says that its name has 6 MB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    return tar_of((info, b"a" * 6_000_000), named("b"))


GOOD, LINK, DEVICE = named("top/good"), stat.S_IFLNK | 0o777, stat.S_IFBLK | 0o666
REG = stat.S_IFREG | 0o644
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "tar up": (lambda: tar_of(GOOD, named("../out")), "leads out"),
    "tar up within": (lambda: tar_of(GOOD, named("top/../../out")), "leads out"),
    "tar absolute": (lambda: tar_of(GOOD, named("/tmp/out")), "leads out"),
    "tar drive": (lambda: tar_of(GOOD, named("C:out")), "leads out"),
    "tar backslash": (lambda: tar_of(GOOD, named("..\\out")), "leads out"),
    "tar steering": (lambda: tar_of(GOOD, named("a\x1b[2J")), "leads out"),
    "tar symlink": (lambda: tar_of(GOOD, named("top/l", tarfile.SYMTYPE, "/etc"), named("top/l/x")), "a link or a"),
    "tar link within": (lambda: tar_of(GOOD, named("top/l", tarfile.SYMTYPE, "good")), "a link or a device"),
    "tar hardlink": (lambda: tar_of(GOOD, named("top/l", tarfile.LNKTYPE, "/etc/passwd")), "a link or a device"),
    "tar device": (lambda: tar_of(GOOD, named("top/d", tarfile.CHRTYPE)), "a link or a device"),
    "tar pipe": (lambda: tar_of(GOOD, named("top/p", tarfile.FIFOTYPE)), "a link or a device"),
    "tar twice": (lambda: tar_of(GOOD, named("top/good")), "twice"),
    "tar file as folder": (lambda: tar_of(GOOD, named("top/good/x")), "twice"),
    "tar long path": (lambda: tar_of(GOOD, named("n" * 300)), "too long"),
    "tar bomb": (lambda: tar_of(GOOD, (tarfile.TarInfo("b"), bytes(6_000_000))), "times its size"),
    "tar bomb of a name": (long_name, "times its size"),
    "tar cut": (lambda: tar_of(GOOD, (tarfile.TarInfo("b"), NOISE))[:-2000], "damaged"),
    "tar whose list breaks off": (
        lambda: gzip.compress(gzip.decompress(tar_of(GOOD))[:1024] + b"junk" * 128), "damaged",
    ),
    "tar wrong checksum": (lambda: tar_of(GOOD)[:-8] + bytes(8), "damaged"),
    "tar empty": (lambda: tar_of(), "empty"),
    "zip up": (lambda: zip_of(("good", b"x", REG), ("../out", b"x", REG)), "leads out"),
    "zip absolute": (lambda: zip_of(("good", b"x", REG), ("/tmp/out", b"x", REG)), "leads out"),
    "zip backslash": (lambda: zip_of(("good", b"x", REG), ("..\\out", b"x", REG)), "leads out"),
    "zip symlink": (lambda: zip_of(("good", b"x", REG), ("l", b"/etc/passwd", LINK)), "a link or a device"),
    "zip device": (lambda: zip_of(("good", b"x", REG), ("d", b"", DEVICE)), "a link or a device"),
    "zip twice": (lambda: zip_of(("good", b"x", REG), ("./good", b"y", REG)), "twice"),
    "zip bomb": (lambda: zip_of(("good", b"x", REG), ("b", bytes(6_000_000), REG)), "times its size"),
    "zip bomb of overlaps": (lambda: many_names(bytes(200_000)), "times its size"),
    "zip wrong checksum": (lambda: zip_of(("a", NOISE, REG)).replace(NOISE[5000:5010], bytes(10)), "damaged"),
    "zip cut": (lambda: zip_of(("a", NOISE, REG))[:-100], "damaged"),
    "neither": (lambda: b"<html>" * 100, "no .zip and no .tgz"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_leaves_nothing(kind, tmp_path, monkeypatch):
    make, words = HOSTILE[kind]
    monkeypatch.setattr(unpacking, "ALWAYS_ALLOWED", 2**20)
    (tmp_path / "into").mkdir()
    path = tmp_path / "into" / "a"
    path.write_bytes(make())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnpackError, match=words):
        unpack(path, tmp_path / "into")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/out").exists()


def test_modes_and_too_many_files(tmp_path, monkeypatch):
    """Setuid and the like of an archive are not taken over; leftovers of a killed run go away."""
    path = tmp_path / "a.tgz"
    path.write_bytes(tar_of(named("./a/b"), named("c")))
    (tmp_path / ".a.tgz.1.unpacking").mkdir()
    assert unpack(path, tmp_path) == [tmp_path / "c", tmp_path / "a"]  # folders last
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) & 0o7111 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tgz", "c"]
    with pytest.raises(UnpackError, match=r"which is in .* already"):
        unpack(path, tmp_path)
    monkeypatch.setattr(unpacking, "MOST_ENTRIES", 1)
    (tmp_path / "d").mkdir()
    with pytest.raises(UnpackError, match="more than 1 files"):
        unpack(path, tmp_path / "d")


def test_a_hostile_archive_through_the_script(server, cub, tmp_path):
    url = server.put("/a", HOSTILE["tar symlink"][0]())
    failed(cub(tmp_path / "data", [url]), url, "the archive holds 'top/l', which is a link or a device")
    assert not list((tmp_path / "data" / "cub200").iterdir()) and os.path.isdir("/etc")

"""One file from the web: several mirrors in turn, resumed after an interruption, checked, never half under its name."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import lock_folder, sync_folder, written_whole

LARGEST = 2**36  # bytes; ten times the largest data set of this field: a server that sends more never ends
LONGEST_WAIT = 60.0  # seconds between two attempts
CHUNK = 2**18
AGENT = "Mozilla/5.0 (compatible; CBSwR download.py)"  # some servers turn Python's own name away


class Digest(NamedTuple):
    """A published checksum: `kind` is md5 or sha256, `value` its lower-case hexadecimal digits."""

    kind: str
    value: str


class Remote(NamedTuple):
    """A file on the web: the same bytes at each of `urls`."""

    name: str  # under which it is kept
    urls: Sequence[str]
    size: int | None = None  # published, in bytes
    digests: Sequence[Digest] = ()  # published; the file is taken if one of them fits
    archive: bool = False  # is unpacked, beside itself


class Patience(NamedTuple):
    """How long to wait for a server."""

    timeout: float = 30.0  # seconds without a byte
    retries: int = 5  # further attempts at a mirror, counted anew whenever one got further than all before
    pause: float = 1.0  # seconds before the first of them; doubled for each of the next


class MirrorError(Exception):
    """A mirror does not have the file or sends something else; the text says what."""


class Interruption(Exception):
    """An attempt that broke off and may be repeated, after `pause` seconds if the server named them."""

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause = pause


# ------------------------------------------------------------------------------------------------- the file


def fetch(remote: Remote, folder: Path, patience: Patience) -> Path:
    """Bring a file into `folder`, which exists, and return its path; prints what happens, a line an event.

    What has arrived lies in `<name>.part` until all of it is there and its checksum fits; the next call continues it.
    A file that is there already under its name is checked and taken. Raises `MirrorError` when no mirror gives the
    file, `UserError` for a full disk and for a file of that name that does not fit a published checksum.
    """
    path = folder / remote.name
    if path.exists():
        found = digests_of(path)
        if mismatch(remote, found):
            raise UserError(f"{path}: is there, but {mismatch(remote, found)}; delete it to download it again")
        print(f"{path}: is there already; {checked(remote, found)}")
        return path
    faults = []
    for url in remote.urls:
        try:
            fetch_from(url, remote, Part(path), patience)
            return path
        except MirrorError as fault:
            faults.append(f"{url}: {fault}")
            print(one_line(faults[-1]), flush=True)
    raise MirrorError("; ".join(faults))


class Part:
    """What has arrived of a file: `<name>.part`, and `<name>.part.json`, which says from where and of which version."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(f"{final.name}.part")
        self.notes = final.with_name(f"{final.name}.part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def read_notes(self) -> dict[str, Any]:
        """url, validator and total of what is there; empty where nobody knows."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def begin(self, url: str, validator: str | None, total: int | None) -> None:
        """Nothing is there; what comes now is from `url`."""
        self.discard()
        with written_whole(self.notes) as beside:
            beside.write_text(json.dumps({"url": url, "validator": validator, "total": total}), encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)  # before the notes: bytes without notes are of unknown origin
        self.notes.unlink(missing_ok=True)

    def finish(self) -> None:
        """All is there and right: give it its name."""
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.final)
        self.notes.unlink(missing_ok=True)
        sync_folder(self.final.parent)


def fetch_from(url: str, remote: Remote, part: Part, patience: Patience) -> None:
    """Fill `part` from one mirror, however often the connection breaks, check it and give it its name.

    Raises `MirrorError` when the server will not, or sends other bytes than were published.
    """
    failures, furthest, again = 0, part.size(), False
    while True:
        try:
            continued = attempt(url, remote, part, patience)
        except Interruption as fault:
            failures = 1 if part.size() > furthest else failures + 1
            furthest = max(furthest, part.size())
            if failures > patience.retries:
                raise MirrorError(f"{fault}, {failures} times without getting further") from None
            pause = min(LONGEST_WAIT, fault.pause or patience.pause * 2 ** (failures - 1))
            print(one_line(f"{url}: {fault}; trying again in {pause:.3g} s"), flush=True)
            time.sleep(pause)
            continue
        found = digests_of(part.path)
        wrong = mismatch(remote, found)
        if not wrong:
            size = part.size()
            part.finish()
            print(one_line(f"{part.final}: {size / 1e6:,.1f} MB from {url}; {checked(remote, found)}"), flush=True)
            return
        part.discard()
        if again or not continued:
            raise MirrorError(wrong)
        again = True  # pieces of two versions perhaps: once more, from the start
        print(one_line(f"{url}: {wrong}; it came in pieces: once more from the start"), flush=True)


def attempt(url: str, remote: Remote, part: Part, patience: Patience) -> bool:
    """One request; True if it continued what was there. Raises `Interruption` or `MirrorError`."""
    have, validator = continuable(url, remote, part)
    if have and have == (remote.size or part.read_notes().get("total")):
        return True  # complete: only the check was missing
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    with opened(url, headers, part, patience) as response:
        if have and response.status == 206:
            total = end_of_range(response, have, part)
        elif response.status == 200:  # the whole file: no ranges there, or another version
            have, total = 0, length_of(response)
        else:
            raise MirrorError(f"answers HTTP {response.status} {response.reason}")
        check_announced(response, total, remote)
        check_room(part.path.parent, (total or 0) - have + (total or 0) * remote.archive)
        if not have:
            part.begin(url, validator_of(response), total)
        receive(response, part, have, total, remote.size or total or LARGEST)
    return have > 0


def continuable(url: str, remote: Remote, part: Part) -> tuple[int, str | None]:
    """How many bytes are there that a request may continue, and the version that they must be of.

    Bytes of another mirror, or of a version without a name, are continued only where a checksum decides in the end.
    """
    notes = part.read_notes()
    validator = notes.get("validator") if notes.get("url") == url else None
    have = part.size()
    if not have or not notes or not (isinstance(validator, str) or remote.digests):
        part.discard()
        return 0, None
    return have, validator if isinstance(validator, str) else None


def receive(response: http.client.HTTPResponse, part: Part, have: int, total: int | None, most: int) -> None:
    """Append the body to `part`. Raises `Interruption` where it ends early, `MirrorError` where it does not end."""
    size = have
    bar = tqdm(desc=part.final.name, initial=have, total=total, unit="B", unit_scale=True, leave=False, disable=None)
    with bar, opened_part(part, "ab" if have else "wb") as out:
        while total is None or size < total:
            try:
                chunk = response.read1(CHUNK if total is None else min(CHUNK, total - size))
            except (OSError, http.client.HTTPException) as error:
                raise Interruption(f"the connection broke at {size:,} bytes ({reason_of(error)})") from None
            if not chunk:
                break
            size += len(chunk)
            if size > most:
                raise MirrorError(f"sends more than {most:,} bytes")
            try:
                out.write(chunk)
            except OSError as error:
                raise unwritable(part, error) from None
            bar.update(len(chunk))
    if total is not None and size < total:
        raise Interruption(f"the connection closed at {size:,} of {total:,} bytes")


def opened_part(part: Part, mode: str) -> Any:
    """The open `.part`, unbuffered: what has arrived is there even if the process is killed."""
    try:
        return open(part.path, mode, buffering=0)
    except OSError as error:
        raise unwritable(part, error) from None


def unwritable(part: Part, error: OSError) -> UserError:
    """The error of a disk that does not take more."""
    more = "make room there; the same command goes on" if error.errno == errno.ENOSPC else "see to it and try again"
    return UserError(f"{part.path}: cannot be written ({error.strerror}); {more}")


# ------------------------------------------------------------------------------------------------- the server


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https, and none from https to plain http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        kind = newurl.partition(":")[0].lower()
        if kind not in ("http", "https") or (req.full_url.lower().startswith("https:") and kind == "http"):
            raise MirrorError(f"redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def opened(url: str, headers: dict[str, str], part: Part, patience: Patience) -> http.client.HTTPResponse:
    """The answer to a request that has a body for us; raises `Interruption` or `MirrorError` for any other."""
    opener = urllib.request.build_opener(Redirects)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=patience.timeout)
    except urllib.error.HTTPError as answer:
        with answer:
            if answer.code == 416 and "Range" in headers:  # there is nothing after what is here: another version
                part.discard()
                raise Interruption("the file there has changed") from None
            if answer.code in (408, 425, 429) or answer.code >= 500:
                pause = answer.headers.get("Retry-After", "")
                raise Interruption(
                    f"HTTP {answer.code} {answer.reason}", float(pause) if pause.isdigit() else None
                ) from None
            raise MirrorError(f"HTTP {answer.code} {answer.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise MirrorError(f"its certificate is not valid ({reason_of(reason)})") from None
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise MirrorError(f"no usable address ({error})") from None
        raise Interruption(f"no connection ({reason_of(reason)})") from None


def reason_of(error: object) -> str:
    """What an exception says, in a few words."""
    return " ".join(str(error).split()) or type(error).__name__


def length_of(response: http.client.HTTPResponse) -> int | None:
    """The announced length of the body, if any."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def validator_of(response: http.client.HTTPResponse) -> str | None:
    """What names this version of the file in If-Range: a strong ETag, else the date of its change."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def end_of_range(response: http.client.HTTPResponse, have: int, part: Part) -> int | None:
    """The length of the whole file in an answer of status 206; `Interruption` if it does not continue at `have`."""
    fits = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    total = None if fits is None or fits[3] == "*" else int(fits[3])
    known = part.read_notes().get("total")
    if fits is None or int(fits[1]) != have or (None not in (total, known) and total != known):
        part.discard()
        raise Interruption("the server sends another part than was asked for, or of another file")
    return total


def check_announced(response: http.client.HTTPResponse, total: int | None, remote: Remote) -> None:
    """Raise `MirrorError` for an answer that cannot be the file, before its body is read."""
    if response.headers.get_content_type() == "text/html":
        raise MirrorError("a web page came instead of the file")
    if remote.size is not None and total is not None and total != remote.size:
        raise MirrorError(f"announces {total:,} bytes; published are {remote.size:,}")
    if (total or 0) > LARGEST:
        raise MirrorError(f"announces {total:,} bytes")


def check_room(folder: Path, needed: int) -> None:
    """Raise `UserError` where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room there, or "
            "give another --data_dir"
        )


# ------------------------------------------------------------------------------------------------- the checksum


def digests_of(path: Path) -> dict[str, str]:
    """MD5 and SHA-256 of a file, in hexadecimal digits."""
    sums = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    size = path.stat().st_size
    bar = tqdm(desc=f"checking {path.name}", total=size, unit="B", unit_scale=True, leave=False, disable=None)
    with open(path, "rb") as file, bar:
        while chunk := file.read(2**20):
            for one in sums.values():
                one.update(chunk)
            bar.update(len(chunk))
    return {kind: one.hexdigest() for kind, one in sums.items()}


def mismatch(remote: Remote, found: dict[str, str]) -> str:
    """What is wrong with a file of these checksums; empty if nothing is, or nothing is published to compare with."""
    if not remote.digests or any(found[digest.kind] == digest.value for digest in remote.digests):
        return ""
    digest = remote.digests[0]
    return f"its {digest.kind.upper()} is {found[digest.kind]}, not {digest.value}"


def checked(remote: Remote, found: dict[str, str]) -> str:
    """What the check of a file came to, in words."""
    for digest in remote.digests:
        if found[digest.kind] == digest.value:
            return f"{digest.kind.upper()} {digest.value} as published"
    return f"no checksum of it is published; demand this one the next time: --sha256 {found['sha256']}"


# ------------------------------------------------------------------------------------------------- one at a time


class Alone:
    """A block that no second process is in for the same folder; `UserError` in the later one. Not on Windows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handle: int | None = None

    def __enter__(self) -> None:
        self.handle = lock_folder(self.folder, "another download into it is under way; wait for it")

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.handle is not None:
            os.close(self.handle)  # which gives the lock back
        kept = sorted(self.folder.glob("*.part")) if kind is not None and issubclass(kind, SystemExit) else []
        for path in kept:
            print(f"{path}: {path.stat().st_size:,} bytes are kept; the same command goes on", file=sys.stderr)

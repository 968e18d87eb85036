"""Downloads raw data sets and weights to where the other scripts look for them.

python pre_process/download.py cub200
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import pooch
import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root, if run as a script

from pre_process.archives import UnusableError, unpack
from pre_process.script import folder, home_of
from pre_process.sources import CARS_PARQUET, TARGETS, Remote
from pre_process.writer import check_space
from utils.errors import UserError, one_line, run_script
from utils.files import check_writable
from utils.options import Parser, folder_name, name_of, real, whole
from utils.signals import StopRequest

MODELS = Path(__file__).resolve().parents[1] / "models"  # where train.py looks
HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; CBSwR download.py)",  # some refuse Python's own name
    "Accept-Encoding": "identity",  # or a .tgz could arrive unpacked
}
ARCHIVES = (".tgz", ".tar.gz", ".zip", ".parquet")


def make_parser() -> Parser:
    """Make the parser of this script's options."""
    parser = Parser(__doc__.splitlines()[0])
    names = ", ".join(TARGETS)
    parser.add_argument("names", nargs="*", metavar="NAME", type=name_of(TARGETS), help=names)
    add = parser.add_argument_group("files").add_argument
    add("--data_dir", type=folder, default=Path("data"), help="folder of NAME/, or itself")
    add("--models_dir", type=folder, default=MODELS, help="folder for googlenet.h5")
    add("--no_unpack", action="store_true", help="leave the archive as it is")
    add("--keep_archive", action="store_true", help="do not delete the archive once unpacked")
    add = parser.add_argument_group("web, for one NAME").add_argument
    add("--url", type=address, help="your own mirror, tried before all others")
    add("--sha256", metavar="HEX", help="demanded of the file, whatever is published")
    add = parser.add_argument_group("patience").add_argument
    add("--timeout", type=real(0, above=True), default=30, help="seconds without a byte")
    add("--retries", type=whole(0, 1000), default=2, help="further attempts at each mirror")
    return parser


def address(text: str) -> str:
    """Argparse type: an http or https URL whose path ends in the name of a file."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"expected http://... or https://..., got {text!r}")
    folder_name(last_part(text))
    return text


def last_part(url: str) -> str:
    """Return the name of the file in a URL."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]


def main() -> None:
    """Bring each of the names; print the steps by hand for those that no source gives."""
    parser = make_parser()
    args = parser.parse(sys.argv[1:])
    if not args.names:
        parser.error(f"give a NAME, one or more of {', '.join(TARGETS)}")
    if len(args.names) > 1 and (args.url or args.sha256):
        parser.error("--url and --sha256 are for one NAME")
    pooch.get_logger().setLevel("WARNING")
    with StopRequest() as stop, stop.at_once():
        missing = [name for name in args.names if not bring(name, args)]
    if missing:
        raise UserError(f"{', '.join(missing)}: no source gave it; the steps by hand are above")


def bring(name: str, args: argparse.Namespace) -> bool:
    """Download and unpack `name`, or print the steps by hand and return False."""
    target = TARGETS[name]
    home = home_of(name, args.data_dir)
    if name == "googlenet":
        home = args.models_dir
    for patterns in target.present:
        if all(any(home.glob(pattern)) for pattern in patterns):
            print(f"{name}: is in {home}, nothing to do; move it away to download it again")
            return True
    check_writable(home, "give another folder")
    for source in sources_of(name, home, args):
        home.mkdir(parents=True, exist_ok=True)
        try:
            bring_source(source, home, args)
            return True
        except UnusableError as error:
            print(one_line(f"{name}: {error}"), flush=True)
    print(f"\n{target.title}, by hand:")
    for number, step in enumerate(target.by_hand, 1):
        print(f"  {number}. {step.format(folder=home)}")
    return False


def sources_of(name: str, home: Path, args: argparse.Namespace) -> list[Sequence[Remote]]:
    """List the sources to try: --url first, and before the rest one whose files are there already.

    With --sha256 only sources of one file count.
    """
    sources = list(TARGETS[name].sources)
    sources.sort(key=lambda source: not all((home / file.name).exists() for file in source))
    if args.url:
        mirror = Remote(last_part(args.url), (args.url,))
        if len(sources) == 1:
            mirror = sources[0][0]._replace(urls=(args.url,))  # its checksum holds there, too
        sources.insert(0, [mirror])
    if args.sha256:
        checksum = f"sha256:{args.sha256.lower()}"
        singles = [source[0] for source in sources if len(source) == 1]
        sources = [[file._replace(checksum=checksum)] for file in singles]
    return sources


def bring_source(source: Sequence[Remote], home: Path, args: argparse.Namespace) -> None:
    """Download and unpack all files of a source; raises UnusableError if it does not give them."""
    check_space(home, 2 * sum(file.size for file in source))
    if source == CARS_PARQUET and not importlib.util.find_spec("pyarrow"):
        raise UnusableError("the parquet files need pyarrow: pip install pyarrow")
    paths = [fetch(file, home, args) for file in source]
    archives = [path for path in paths if path.name.endswith(ARCHIVES)]
    if not archives or args.no_unpack:
        return
    print(f"unpacking {', '.join(path.name for path in archives)} ...", flush=True)
    for top in unpack(archives, home):
        print(f"{top}: unpacked")
    if not args.keep_archive:
        for archive in archives:
            archive.unlink()


def fetch(file: Remote, home: Path, args: argparse.Namespace) -> Path:
    """Download a file to the folder `home`, unless it is there, and check it.

    It appears when all of it is there and right. Raises UnusableError if no mirror gives it.
    """
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(), chunk_size=2**18, timeout=args.timeout, headers=HEADERS
    )
    for url in file.urls:
        mirror = pooch.create(
            home,
            base_url="",
            registry={file.name: file.checksum},
            urls={file.name: url},
            retry_if_failed=args.retries,
        )
        try:
            path = Path(mirror.fetch(file.name, downloader=downloader))
        except (requests.RequestException, ValueError) as error:  # ValueError: a wrong checksum
            print(one_line(f"{url}: {error}"), flush=True)
            continue
        checksum = file.checksum or f"none published; next time --sha256 {pooch.file_hash(path)}"
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB, checksum {checksum}", flush=True)
        return path
    raise UnusableError(f"no mirror gave {file.name}")


if __name__ == "__main__":
    run_script(main)

"""Downloads raw data sets and weights, checks and unpacks them where the other scripts look for them.

python pre_process/download.py cub200
"""

from __future__ import annotations

import argparse
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, when this is run as a script

from pre_process import image_arrays
from utils.arguments import Parser, folder_name, name_of, real, whole
from utils.errors import UserError
from utils.fetch import Alone, Digest, MirrorError, Patience, Remote, fetch
from utils.files import check_writable
from utils.unpack import UnpackError, unpack

ROOT = Path(__file__).resolve().parents[1]
HUGGING_FACE = "https://huggingface.co/datasets"
# the commits whose files were described, so that a later upload cannot change what is downloaded
FGVC = f"{HUGGING_FACE}/XiN0919/FGVC/resolve/921e8dce38536cd5982739d85d5e9235d2cb2a76"
PARQUET = f"{HUGGING_FACE}/tanganke/stanford_cars/resolve/9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40/data"


class Source(NamedTuple):
    """One way to a data set: all of its files are needed."""

    what: str
    files: Sequence[Remote]


class Target(NamedTuple):
    """What a name on the command line stands for."""

    what: str
    sources: Sequence[Source]  # in the order they are tried
    present: Sequence[Sequence[str]]  # what to find in its folder when there is nothing to do: all patterns of one
    manual: Sequence[str]  # how to do it by hand; {folder} is its folder


CUB = Remote(
    "CUB_200_2011.tgz",
    (
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
        "https://data.caltech.edu/api/records/65de6-vp158/files/CUB_200_2011.tgz/content",
        "https://s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz",
        f"{HUGGING_FACE}/XiN0919/FGVC/resolve/main/CUB_200_2011.tgz",
    ),
    size=1_150_585_339,
    digests=(
        Digest("sha256", "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"),  # TensorFlow Datasets
        Digest("md5", "97eceeb196236b17998738112f37df78"),
    ),
    archive=True,
)
CARS_OFFICIAL = Source(
    "the original car_ims.tgz and cars_annos.mat, from a copy on Hugging Face",
    (
        Remote(
            "cars_annos.mat",
            (f"{FGVC}/cars_annos.mat",),
            size=394_471,
            digests=(Digest("md5", "b407c6086d669747186bd1d764ff9dbc"),),
        ),
        Remote(
            "car_ims.tgz",
            (f"{FGVC}/car_ims.tgz",),
            size=1_956_628_579,
            digests=(
                Digest("sha256", "4d96e3e3e892c6b7e4a71959325c7de4804037d27ba5aaf1c756100fd94a5342"),  # of that copy
                Digest("md5", "d5c8f0aa497503f355e17dc7886c3f14"),  # of Stanford's file
            ),
            archive=True,
        ),
    ),
)
CARS_STANFORD = Source(
    "the same in one archive, from another server of Stanford",
    (Remote("CARS196.zip", ("http://ftp.cs.stanford.edu/cs/cvgl/CARS196.zip",), archive=True),),
)
CARS_PARQUET = Source(
    "the images in parquet files (reading them needs pyarrow), from Hugging Face",
    tuple(
        Remote(f"{part}-0000{n}-of-00002.parquet", (f"{PARQUET}/{part}-0000{n}-of-00002.parquet",))
        for part in ("train", "test")
        for n in (0, 1)
    ),
)
CARS_KAGGLE = Source(
    "the images in folders of their classes, from Kaggle",
    (
        Remote(
            "stanford-car-dataset-by-classes-folder.zip",
            ("https://www.kaggle.com/api/v1/datasets/download/jutrera/stanford-car-dataset-by-classes-folder",),
            archive=True,
        ),
    ),
)
PRODUCTS = Remote(
    "Stanford_Online_Products.zip",
    (
        "https://drive.usercontent.google.com/download?id=1TclrpQOF_ullUP99wk_gjGN8pKvtErG8&export=download&confirm=t",
        "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
    ),
    size=3_083_860_082,
    digests=(
        Digest("sha256", "b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48"),  # TensorFlow Datasets
        Digest("md5", "7f73d41a2f44250d4779881525aea32e"),
    ),
    archive=True,
)
GOOGLENET = Remote(
    "googlenet.h5",
    ("https://github.com/vadimkantorov/metriclearningbench/releases/download/data/googlenet.h5",
     "https://github.com/aioz-ai/BMVC20_CBSwR/raw/master/models/googlenet.h5"),
    digests=(Digest("md5", "c7d7856bd1ab5cb02618b3f7f564e3c6"),),
)  # fmt: skip

TARGETS = {
    "cub200": Target(
        "CUB-200-2011",
        (Source("the archive of Caltech", (CUB,)),),
        (("images.txt",), ("CUB_200_2011/images.txt",)),
        (
            "open https://data.caltech.edu/records/65de6-vp158 in a browser and download CUB_200_2011.tgz (1.15 GB)",
            "put it into {folder} and run this command again: it checks and unpacks the file",
        ),
    ),
    "car196": Target(
        "Cars196 (Stanford Cars)",
        (CARS_OFFICIAL, CARS_STANFORD, CARS_PARQUET, CARS_KAGGLE),
        (
            ("cars_annos.mat", "car_ims"),
            ("*/cars_annos.mat", "*/car_ims"),
            tuple(file.name for file in CARS_PARQUET.files),
            ("car_data",),
            ("cars_train", "cars_test"),
            ("train", "test"),
        ),
        (
            "get a copy from https://www.kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder (folders "
            "of classes) or https://huggingface.co/datasets/tanganke/stanford_cars (the train and test parquet files "
            "in data/), or wherever cars_annos.mat and car_ims.tgz are",
            "unpack it into {folder}; docs/data_sets.md lists the layouts that pre_process_car196.py takes",
        ),
    ),
    "sop": Target(
        "Stanford Online Products",
        (Source("the archive of Stanford", (PRODUCTS,)),),
        (("Ebay_train.txt",), ("Stanford_Online_Products/Ebay_train.txt",)),
        (
            "follow the link of https://cvgl.stanford.edu/projects/lifted_struct/ or of "
            "https://github.com/rksltnl/Deep-Metric-Learning-CVPR16 to Stanford_Online_Products.zip (3.1 GB)",
            "put it into {folder} and run this command again: it checks and unpacks the file",
        ),
    ),
    "inshop": Target(
        "In-shop Clothes Retrieval (DeepFashion)",
        (),
        (),
        (
            "its authors share it on Google Drive alone, under terms to agree to: follow the link to the In-shop "
            "Clothes Retrieval Benchmark on https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html",
            "download Eval/list_eval_partition.txt and Img/img.zip (not img_highres.zip)",
            "put them into {folder}/Eval and {folder}/Img, and unpack img.zip there: {folder}/Img/img/...",
        ),
    ),
    "googlenet": Target(
        "GoogLeNet's ImageNet weights, as Caffe had them",
        (Source("a file of weights", (GOOGLENET,)),),
        (("googlenet.h5",),),
        (
            "download googlenet.h5 from https://github.com/vadimkantorov/metriclearningbench/releases/tag/data or take "
            "the one of https://github.com/aioz-ai/BMVC20_CBSwR",
            "put it into {folder}",
        ),
    ),
}


def make_parser() -> Parser:
    """The options of this script."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", type=name_of(tuple(TARGETS)),
                        help=f"what to download: {', '.join(TARGETS)}")  # fmt: skip
    files = parser.add_argument_group("files")
    files.add_argument("--data_dir", type=image_arrays.folder, default=Path("data"),
                       help="the folder that holds one for each data set; or, for one NAME, that one")  # fmt: skip
    files.add_argument("--models_dir", type=image_arrays.folder, default=ROOT / "models",
                       help="where googlenet.h5 goes; train.py looks for it in models/ of this repository")  # fmt: skip
    files.add_argument("--no_unpack", action="store_true", help="leave the archive as it is")
    files.add_argument("--keep_archive", action="store_true", help="do not delete the archive once it is unpacked")
    web = parser.add_argument_group("sources")
    web.add_argument("--url", type=address, metavar="URL",
                     help="your own mirror, tried before all others; for one NAME")  # fmt: skip
    web.add_argument("--sha256", type=sha256, metavar="HEX",
                     help="demanded of the file, whatever is published; for one NAME of one file")  # fmt: skip
    patience = parser.add_argument_group("patience")
    patience.add_argument("--timeout", type=real(0, above=True), default=Patience().timeout, metavar="SECONDS",
                          help="without a byte, after which an attempt is given up")  # fmt: skip
    patience.add_argument("--retries", type=whole(0, 1000), default=Patience().retries, metavar="N",
                          help="attempts at each mirror after one that got no further")  # fmt: skip
    patience.add_argument("--pause", type=real(0), default=Patience().pause, metavar="SECONDS",
                          help="before the first of them; doubled for each of the next, up to a minute")  # fmt: skip
    return parser


def address(text: str) -> str:
    """An argparse type: an http or https URL whose path ends in the name of a file."""
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected an address that begins with http:// or https://, got {text!r}")
    folder_name(last_part(text))
    return text


def last_part(url: str) -> str:
    """The name of the file in a URL."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]


def sha256(text: str) -> str:
    """An argparse type: 64 hexadecimal digits."""
    if len(text) != 64 or set(text.lower()) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"expected 64 hexadecimal digits, got {text!r}")
    return text.lower()


def main() -> None:
    """Read the options, bring each of the names; the manual way is printed for those that no source gives."""
    parser = make_parser()
    args = parser.parse(sys.argv[1:])
    if not args.names:
        parser.error(f"give a NAME, one or more of {', '.join(TARGETS)}")
    if len(args.names) > 1 and (args.url or args.sha256):
        parser.error("--url and --sha256 are for one NAME")
    failed = {}
    for name in args.names:
        folder = folder_of(name, args)
        fault = bring(name, folder, args)
        if fault:
            failed[name] = fault
            print(f"\n{TARGETS[name].what}, by hand:")
            for number, step in enumerate(TARGETS[name].manual, 1):
                print(f"  {number}. {step.format(folder=folder)}")
    if failed:
        raise UserError("; ".join(f"{name}: {fault}" for name, fault in failed.items()) + "; the way by hand is above")


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the files of `name` go."""
    if name == "googlenet":
        return args.models_dir
    itself = len(args.names) == 1 and args.data_dir.resolve().name == name
    return args.data_dir if itself else args.data_dir / name


def bring(name: str, folder: Path, args: argparse.Namespace) -> str:
    """Download and unpack `name` into `folder`; why that failed, empty if it did not."""
    target = TARGETS[name]
    if any(all(any(folder.glob(pattern)) for pattern in patterns) for patterns in target.present):
        print(f"{name}: is in {folder} already, nothing to do; move it away to download it again")
        return ""
    sources = sources_of(name, args)
    if not sources:
        return "cannot be downloaded by a program"
    check_writable(folder, f"give another {'--models_dir' if name == 'googlenet' else '--data_dir'}")
    folder.mkdir(parents=True, exist_ok=True)
    faults = []
    with Alone(folder):
        for source in sources:
            print(f"{name}: {source.what}", flush=True)
            try:
                bring_source(source, folder, args)
                return ""
            except MirrorError as fault:
                faults.append(str(fault))
    return f"no source gave it ({'; '.join(faults)})"


def sources_of(name: str, args: argparse.Namespace) -> list[Source]:
    """The sources to try, in order: --url first, and with --sha256 none of several files."""
    sources = list(TARGETS[name].sources)
    if args.url:
        own = last_part(args.url)
        single = len(sources) == 1  # of one file with one content, wherever it is
        file = (
            sources[0].files[0]._replace(urls=(args.url,))
            if single
            else Remote(own, (args.url,), archive=is_archive(own))
        )
        sources.insert(0, Source("your own mirror", (file,)))
    if args.sha256:
        demanded = (Digest("sha256", args.sha256),)
        sources = [
            Source(source.what, tuple(file._replace(digests=demanded, size=None) for file in source.files))
            for source in sources
            if len(source.files) == 1
        ]
    return sources


def is_archive(name: str) -> bool:
    """Whether a file of this name is unpacked."""
    return name.lower().endswith((".zip", ".tgz", ".tar.gz"))


def bring_source(source: Source, folder: Path, args: argparse.Namespace) -> None:
    """Download and unpack all files of a source; `MirrorError` when one cannot be had or is no sound archive."""
    patience = Patience(args.timeout, args.retries, args.pause)
    for file in source.files:
        given = (folder / file.name).exists()  # put there by hand, or kept
        path = fetch(file, folder, patience)
        if not file.archive or args.no_unpack:
            continue
        try:
            tops = unpack(path, folder)
        except UnpackError as fault:
            if given:
                raise UserError(f"{path}: {fault}; delete it, and it is downloaded again") from None
            path.unlink()
            print(f"{path}: {fault}; deleted")
            raise MirrorError(f"{file.urls[0]}: the archive {fault}") from None
        print(f"{path}: unpacked to {', '.join(str(top) for top in tops)}")
        if not args.keep_archive:
            path.unlink()


if __name__ == "__main__":
    image_arrays.run(main)

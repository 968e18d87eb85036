"""Where raw data sets and weights are published, and how to get them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

HUGGING_FACE = "https://huggingface.co/datasets"
# The commits whose files were described: a later upload cannot change what is downloaded.
FGVC = f"{HUGGING_FACE}/XiN0919/FGVC/resolve/921e8dce38536cd5982739d85d5e9235d2cb2a76"
TANGANKE = f"{HUGGING_FACE}/tanganke/stanford_cars/resolve/9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40"


class Remote(NamedTuple):
    """A file on the web: the same bytes at each of `urls`."""

    name: str
    urls: Sequence[str]
    checksum: str | None = None  # published, "md5:..." or "sha256:..."
    size: int = 0  # bytes; 0: not published


class Target(NamedTuple):
    """What a name on the command line stands for."""

    title: str
    sources: Sequence[Sequence[Remote]]  # in the order in which they are tried; all files of one
    present: Sequence[Sequence[str]]  # glob patterns: if all of a row are there, nothing is to do
    by_hand: Sequence[str]  # steps; {folder} is its folder


CUB = Remote(
    "CUB_200_2011.tgz",
    (
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
        "https://data.caltech.edu/api/records/65de6-vp158/files/CUB_200_2011.tgz/content",
        "https://s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz",
        f"{HUGGING_FACE}/XiN0919/FGVC/resolve/main/CUB_200_2011.tgz",
    ),
    # of TensorFlow Datasets; its MD5 is 97eceeb196236b17998738112f37df78
    "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
    1_150_585_339,
)
CARS_ANNOTATIONS = Remote(
    "cars_annos.mat",
    (f"{FGVC}/cars_annos.mat",),
    "md5:b407c6086d669747186bd1d764ff9dbc",
    394_471,
)
CARS_IMAGES = Remote(
    "car_ims.tgz",
    (f"{FGVC}/car_ims.tgz",),
    # of this copy; the MD5 of Stanford's own file was d5c8f0aa497503f355e17dc7886c3f14
    "sha256:4d96e3e3e892c6b7e4a71959325c7de4804037d27ba5aaf1c756100fd94a5342",
    1_956_628_579,
)
CARS_STANFORD = Remote("CARS196.zip", ("http://ftp.cs.stanford.edu/cs/cvgl/CARS196.zip",))
CARS_PARQUET = tuple(
    Remote(name, (f"{TANGANKE}/data/{name}",))
    for name in (
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "test-00000-of-00002.parquet",
        "test-00001-of-00002.parquet",
    )
)
CARS_KAGGLE = Remote(
    "stanford-car-dataset-by-classes-folder.zip",
    (
        "https://www.kaggle.com/api/v1/datasets/download/jutrera/"
        "stanford-car-dataset-by-classes-folder",
    ),
)
PRODUCTS = Remote(
    "Stanford_Online_Products.zip",
    (
        "https://drive.usercontent.google.com/download"
        "?id=1TclrpQOF_ullUP99wk_gjGN8pKvtErG8&export=download&confirm=t",
        "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
    ),
    # of TensorFlow Datasets; its MD5 is 7f73d41a2f44250d4779881525aea32e
    "sha256:b04fa78210e69fab050ce73939550e1cd0f96890bdd98ec9fee732c3b756ef48",
    3_083_860_082,
)
GOOGLENET = Remote(
    "googlenet.h5",
    (
        "https://github.com/vadimkantorov/metriclearningbench/releases/download/data/googlenet.h5",
        "https://github.com/aioz-ai/BMVC20_CBSwR/raw/master/models/googlenet.h5",
    ),
    "md5:c7d7856bd1ab5cb02618b3f7f564e3c6",
)

AGAIN = "put it into {folder} and run this command again: it checks and unpacks the file"
TARGETS = {
    "cub200": Target(
        "CUB-200-2011",
        [[CUB]],
        [["images.txt"], ["CUB_200_2011/images.txt"]],
        [
            "open https://data.caltech.edu/records/65de6-vp158 in a browser and download "
            "CUB_200_2011.tgz (1.15 GB)",
            AGAIN,
        ],
    ),
    "car196": Target(
        "Cars196 (Stanford Cars)",
        # the original files, the same in one archive, and two copies in folders of classes
        [[CARS_ANNOTATIONS, CARS_IMAGES], [CARS_STANFORD], CARS_PARQUET, [CARS_KAGGLE]],
        [
            ["cars_annos.mat", "car_ims"],
            ["*/cars_annos.mat", "*/car_ims"],
            ["car_data"],
            ["train", "test"],
        ],
        [
            "get cars_annos.mat and car_ims.tgz, or the train and test parquet files of "
            "https://huggingface.co/datasets/tanganke/stanford_cars, or the archive of "
            "https://www.kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder",
            AGAIN,
        ],
    ),
    "sop": Target(
        "Stanford Online Products",
        [[PRODUCTS]],
        [["Ebay_train.txt"], ["Stanford_Online_Products/Ebay_train.txt"]],
        [
            "follow the link of https://cvgl.stanford.edu/projects/lifted_struct/ or of "
            "https://github.com/rksltnl/Deep-Metric-Learning-CVPR16 to "
            "Stanford_Online_Products.zip (3.1 GB)",
            AGAIN,
        ],
    ),
    "inshop": Target(
        "In-shop Clothes Retrieval (DeepFashion)",
        [],
        [],
        [
            "its authors share it on Google Drive alone, under terms to agree to: follow the link "
            "to the In-shop Clothes Retrieval Benchmark on "
            "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html",
            "download Eval/list_eval_partition.txt and Img/img.zip (not img_highres.zip)",
            "put them into {folder}/Eval and {folder}/Img, and unpack img.zip there: "
            "{folder}/Img/img/...",
        ],
    ),
    "googlenet": Target(
        "GoogLeNet's ImageNet weights, as Caffe had them",
        [[GOOGLENET]],
        [["googlenet.h5"]],
        [
            "download googlenet.h5 from "
            "https://github.com/vadimkantorov/metriclearningbench/releases/tag/data or take the "
            "one of https://github.com/aioz-ai/BMVC20_CBSwR",
            "put it into {folder}",
        ],
    ),
}

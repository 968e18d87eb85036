"""README.md and docs/: their commands run, their options and links exist, their tables are those of misc/results/."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from raw_folders import make_inshop, make_sop, save_annotations, save_photo
from scripts import ROOT, run_in_process
from synthetic import write_dataset

import models.weights
from models import build_model
from utils.arguments import BACKBONE_NAMES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = ("python ", "torchrun ", "make ", "pip ", "OMP_NUM_THREADS=")
NOT_RUN = {  # by their beginnings, and what does it instead
    "make ": "continuous integration runs them",
    "pip install -r requirements.txt": "make demo runs it",
    "python pre_process/download.py": "tests/test_download.py, against a server of its own",
    "python benchmarks/ablation.py": "tests/test_ablation.py: it trains for minutes",
    "python benchmarks/sensitivity.py": "tests/test_sensitivity.py: it trains for minutes",
    "python test.py --dataset cub200 --backbone timm:": "tests/test_timm_backbones.py: it downloads weights",
    "torchrun --nnodes 2": "needs two machines",
}
# what makes a command small; the last of two equal options counts
FEW = ["--device", "cpu", "--batch_size", "8", "--n_cluster", "4"]
SMALLER = {
    "train.py": [*FEW, "--n_epoch", "1", "--overwrite"],
    "report.py": ["--device", "cpu", "--map_points", "20"],
    "embed.py": ["--device", "cpu", "--image_size", "40"],
    "pre_process_glyphs.py": ["--per_class", "2"],
    "benchmarks/closed_form.py": ["--dims", "8", "--out_dir", ".", "--val_classes", "3"],
    **{f"pre_process_{name}.py": ["--image_size", "40"] for name in ("cub200", "car196", "sop", "inshop", "folder")},
}
OF_OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint", "--kills", "--logdir"}


def commands_of(page: Path) -> list[str]:
    """The command lines in the fenced blocks of a page, without their comments."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if not kind:
            found += [line.partition("  #")[0].strip() for line in block.splitlines() if line.startswith(STARTS)]
    return found


def commands() -> list[str]:
    """Those of all pages in order, each once."""
    return list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Iterator[Path]:
    """A folder as users have it: raw data sets, photos, two runs, weights; scripts run in it."""
    folder = tmp_path_factory.mktemp("workplace")
    make_few_birds(folder / "data" / "cub200")
    make_few_cars(folder / "data" / "car196")
    make_sop(folder / "data" / "sop", 6)
    make_inshop(folder / "data" / "inshop", 6)
    for number in range(12):
        save_photo(folder / "photos" / f"{number:02d}.jpg", number)
    save_photo(folder / "some_photo.jpg", 100)
    save_photo(folder / "more_photos" / "one.jpg", 101)
    (folder / "new_checkpoint").mkdir()
    (folder / "new_checkpoint" / "CBSwR_glyphs.pth").symlink_to(ROOT / "new_checkpoint" / "CBSwR_glyphs.pth")
    torch.manual_seed(0)
    torch.save(build_model("googlenet").base_model.state_dict(), folder / "googlenet.pth")
    hub = folder / "hub" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.save(build_model("resnet18").base_model.state_dict(), hub / "resnet18-f37072fd.pth")
    threads, before = torch.get_num_threads(), os.getcwd()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "hub"))
        patch.setattr(models.weights, "GOOGLENET_FILE", folder / "googlenet.pth")
        os.chdir(folder)
        write_dataset(folder / "data", "toy")
        for name in ("demo", "demo_untrained"):
            run = ["--dataset", "toy", "--backbone", "resnet_small", "--weights", "none", "--model_name", name, *FEW]
            assert run_in_process("train.py", *run, "--n_epoch", "1").code == 0
        yield folder
        os.chdir(before)
    torch.set_num_threads(threads)


def make_few_birds(folder: Path) -> None:
    """The official lists of CUB with three images of 14 training and 5 test classes."""
    listed = [(f"{label:03d}.Bird/{n}.jpg", label) for label in (*range(1, 15), *range(101, 106)) for n in range(3)]
    for number, (name, _) in enumerate(listed):
        save_photo(folder / "images" / name, number)
    (folder / "images.txt").write_text("".join(f"{i} {name}\n" for i, (name, _) in enumerate(listed, 1)))
    (folder / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, (_, c) in enumerate(listed, 1)))


def make_few_cars(folder: Path) -> None:
    """The official layout of Cars196 with three images of 8 training and 4 test classes."""
    classes = (*range(1, 9), *range(99, 103))
    rows = [(f"car_ims/{n:06d}.jpg", label) for n, label in enumerate(classes * 3, 1)]
    for number, (name, _) in enumerate(rows):
        save_photo(folder / name, number)
    save_annotations(folder / "cars_annos.mat", [(name, label) for name, label in rows], ("relative_im_path", "class"))


def test_every_command_of_the_pages_runs(workplace):
    """In the order of the pages, as written but for what SMALLER adds."""
    done = 0
    for command in commands():
        if command.startswith(tuple(NOT_RUN)):
            continue
        words = shlex.split(command)
        script = words[next(place for place, word in enumerate(words) if word.endswith(".py"))]
        argv = words[words.index(script) + 1 :]
        script = script.removeprefix("pre_process/")
        assert words[0] == "python" or script in ("train.py", "test.py"), command
        added = list(SMALLER.get(script, ["--device", "cpu"] if script in ("test.py", "search.py") else []))
        if "--resume" in argv:
            added = ["--device", "cpu", "--n_epoch", "2"]
        elif "--recipe" in argv:
            added += ["--low_dim", "8", *(["--image_size", "40"] if "--image_size" in argv else [])]
        if script == "train.py" and "--val_classes" in argv:
            added += ["--val_classes", "3"]
        if "--dim" in argv:
            added += ["--dim", "4"]
        if script == "embed.py" and "--checkpoint_path" in argv:
            added = ["--device", "cpu"]
        outcome = run_in_process(script, *argv, *added, seconds=120)
        assert outcome.code == 0, (command, outcome)
        done += 1
    assert done > 25
    assert (workplace / "new_checkpoint" / "CBSwR_CUB200" / "report.html").stat().st_size > 10_000
    assert (workplace / "hits.png").is_file() and (workplace / "comparison.html").is_file()


def test_what_is_not_run_is_there():
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in commands()), beginning


def test_options_and_scripts_that_are_named_exist():
    scripts = {path.relative_to(ROOT).as_posix() for place in (".", "pre_process", "benchmarks", "misc", "tests")
               for path in (ROOT / place).glob("*.py")}  # fmt: skip
    known = set(OF_OTHERS)
    for name in scripts:
        known |= set(re.findall(r'"(--\w+)"', (ROOT / name).read_text(encoding="utf-8")))
    known |= set(re.findall(r'"(--\w+)"', (ROOT / "utils" / "arguments.py").read_text(encoding="utf-8")))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for option in re.findall(r"(?<![\w-])--(?:no-)?[a-z]\w+", text):
            option = option.replace("--no-", "--")
            assert option in known | {"--norm", "--cl", "--batch_m"}, (page.name, option)  # gone, and said to be
        for script in re.findall(r"\bpython ([\w/]+\.py)", text):
            assert script in scripts or script.startswith("my_"), (page.name, script)
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [name for name in BACKBONE_NAMES if f"`{name}`" not in readme] == []


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            assert linked.exists(), (page.name, target)
            if anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_tables_are_those_of_the_results():
    """A block between <!-- misc/results/NAME --> and <!-- / --> holds lines of that file alone."""
    blocks = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, block in re.findall(r"<!-- (misc/results/\S+) -->\n(.*?)<!-- / -->", text, re.DOTALL):
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            missing = [line for line in block.splitlines() if line and line not in lines]
            assert missing == [], (page.name, name)
            blocks += 1
    assert blocks >= 2

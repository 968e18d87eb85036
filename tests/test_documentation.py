"""The pages: their commands run, their options, scripts and links exist, their tables are current.

The pages are README.md and docs/.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from raw_folders import make_inshop, make_sop, save_annotations, save_photo
from scripts import ROOT, run_in_process
from synthetic import write_dataset

import models.weights
from models import BACKBONES, build_model
from train import REFUSED

pytestmark = pytest.mark.usefixtures("one_thread")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
SCRIPTS = {path.relative_to(ROOT).as_posix() for path in FILES}
COMMAND = re.compile(r"(?:python|torchrun|OMP_NUM_THREADS=\d+) .*?\b([\w/]+\.py)(.*)")
NOT_RUN = re.compile(
    r"pre_process/download.py"  # tests/test_download.py runs it, against a server of its own
    r"|experiments/|benchmarks/"  # run by tests of theirs, since they train and measure
    r"|timm:"  # downloads weights; see tests/test_timm_backbones.py
    r"|--nnodes"  # needs several machines
)
FAST = re.compile(r"photos|my_set|glyphs")  # commands that need no other commands before them
# What makes a command of a script small; of two equal options the last counts.
SMALLER = {
    "train.py": ["--n_epoch=1", "--overwrite", "--device=cpu"],
    "test.py": ["--device=cpu"],
    "embed.py": ["--device=cpu"],
    "search.py": ["--device=cpu"],
    "cluster.py": [],
    "report.py": ["--device=cpu", "--map_points=20"],
    "pre_process_glyphs.py": ["--per_class=2", "--workers=1"],
}
for name in ("cub200", "car196", "sop", "inshop", "folder"):
    SMALLER[f"pre_process_{name}.py"] = ["--image_size=40", "--workers=1"]
SMALLER_OPTIONS = {"--image_size": "40", "--dim": "4", "--val_classes": "3"}
OF_TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}


def commands() -> list[tuple[str, str, str]]:
    """Return each command line in the fenced blocks of the pages, its script, and what follows."""
    lines = []
    for text in TEXTS.values():
        for block in re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            lines += [line.partition("  #")[0].strip() for line in block.splitlines()]
    matches = (COMMAND.match(line) for line in dict.fromkeys(lines))
    return [(match.group(), *match.groups()) for match in matches if match]


@cache
def options_of(script: str) -> set[str]:
    """Return the options that the help of a script shows."""
    outcome = run_in_process(script.removeprefix("pre_process/"), "--help")
    assert outcome.code == 0, outcome
    return set(re.findall(r"--[a-z]\w*(?:-\w+)?", outcome.out))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Iterator[Path]:
    """Make a folder as users have it: raw data sets, photos, two runs, weights; enter it."""
    folder = tmp_path_factory.mktemp("workplace")
    make_few_birds(folder / "data" / "cub200")
    make_few_cars(folder / "data" / "car196")
    make_sop(folder / "data" / "sop", 6)
    make_inshop(folder / "data" / "inshop", 6)
    photos = [f"photos/{number:02d}.jpg" for number in range(12)]
    for number, name in enumerate([*photos, "some_photo.jpg", "more_photos/a.jpg"]):
        save_photo(folder / name, number)
    (folder / "new_checkpoint").mkdir()
    shipped = "new_checkpoint/CBSwR_glyphs.pth"
    (folder / shipped).symlink_to(ROOT / shipped)
    torch.manual_seed(0)
    torch.save(build_model("googlenet").base_model.state_dict(), folder / "googlenet.pth")
    hub = folder / "hub" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.save(build_model("resnet18").base_model.state_dict(), hub / "resnet18-f37072fd.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "hub"))
        patch.setattr(models.weights, "GOOGLENET_FILE", folder / "googlenet.pth")
        patch.chdir(folder)
        write_dataset(folder / "data", "toy")
        for name in ("demo", "demo_untrained"):
            run_small("train.py", f"--dataset toy --backbone resnet_small --model_name {name}")
        yield folder


def make_few_birds(folder: Path) -> None:
    """Make the official lists of CUB with three images of 14 training and 5 test classes."""
    labels = [label for label in (*range(1, 15), *range(101, 106)) for _ in range(3)]
    names = [f"{label:03d}.Bird/{number}.jpg" for number, label in enumerate(labels)]
    for number, name in enumerate(names):
        save_photo(folder / "images" / name, number)
    for file, values in (("images.txt", names), ("image_class_labels.txt", labels)):
        lines = [f"{number} {value}\n" for number, value in enumerate(values, 1)]
        (folder / file).write_text("".join(lines))


def make_few_cars(folder: Path) -> None:
    """Make the official layout of Cars196 with three images of 8 training and 4 test classes."""
    classes = (*range(1, 9), *range(99, 103)) * 3
    rows = [(f"car_ims/{number:06d}.jpg", label) for number, label in enumerate(classes, 1)]
    for number, (name, _) in enumerate(rows):
        save_photo(folder / name, number)
    save_annotations(folder / "cars_annos.mat", rows, ("relative_im_path", "class"))


def run_small(script: str, words: str) -> None:
    """Run a command in small, in this process, without torchrun; it must end well."""
    name = Path(script).name
    argv = [*shlex.split(words), *SMALLER[name]]
    if "--resume" in argv:
        argv.remove("--overwrite")
        argv.append("--n_epoch=2")
    if "resnet_small" in argv:
        argv.append("--weights=none")
    if "--images" in argv and "--backbone" in argv:
        argv.append("--image_size=40")
    argv += [f"{option}={value}" for option, value in SMALLER_OPTIONS.items() if option in argv]
    outcome = run_in_process(name, *argv, seconds=120)
    assert outcome.code == 0, (script, words, outcome)


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_command_of_the_pages_runs(workplace, fast):
    """The commands run in the order of the pages, as written but for what makes them small."""
    for line, script, words in commands():
        if not NOT_RUN.search(line) and bool(FAST.search(line)) == fast:
            run_small(script, words)
    made = ("photos.npy", "hits.png", "learned.csv", "photos_clusters.csv", "clusters.png")
    if not fast:
        made = ("new_checkpoint/demo/report.html", "comparison.html")
    for name in made:
        assert os.path.getsize(name) > 500


def test_examples_in_python_run(workplace):
    text = TEXTS[ROOT / "docs" / "photos.md"]
    for name in ("python", "hub"):
        (code,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", text, re.DOTALL)
        exec(code.replace("PROJECT", str(ROOT)), {})
    (code,) = re.findall(r"<!-- database -->\n```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    hits = done.stdout.splitlines()
    assert len(hits) == 5 and hits[0].endswith(" 0.0")


def test_options_of_all_commands_exist():
    for line, script, words in commands():
        assert script in SCRIPTS, line
        of_rows = " ".join(re.findall(r'--row "[^":]*: ([^"]*)"', words))
        of_script, _, of_train = re.sub(r'(--row) "[^"]*"', r"\1", words).partition(" -- ")
        for part, reader in ((of_script, script), (f"{of_rows} {of_train}", "train.py")):
            assert set(re.findall(r"--[a-z]\w*", part)) <= options_of(reader), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_scripts_that_are_named_exist(page):
    for script in re.findall(r"\b(?:python|pytest) ([\w/]+\.py)", TEXTS[page]):
        assert script in SCRIPTS or script.startswith("my_")
    options = OF_TORCHRUN.union({"--kills"}, REFUSED)
    options.update(re.findall(r'"(--\w+)"', TEXTS[page]))  # which an example declares
    for script in SCRIPTS:
        if (ROOT / script).read_text(encoding="utf-8").endswith("    run_script(main)\n"):
            options |= options_of(script)
    named = re.findall(r"(?<![\w-])--[a-z]\w*(?:-[a-z]\w+)?", TEXTS[page])
    assert set(named) <= options


def test_backbones_and_recipes_are_in_the_readme():
    recipes = [path.stem for path in (ROOT / "recipes").glob("*.json")]
    missing = [name for name in (*BACKBONES, *recipes) if f"`{name}`" not in TEXTS[PAGES[0]]]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert "://" in target or linked.exists(), target
        if anchor and "://" not in target:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    """A block between <!-- misc/results/NAMES --> and <!-- / --> holds lines of these files.

    All lines of a table may leave out the same columns.
    """
    blocks = re.findall(r"<!-- (misc/results/[^>]+) -->\n(.*?)<!-- / -->", TEXTS[page], re.DOTALL)
    for names, block in blocks:
        heads, *lines = [cells_of(line) for line in block.splitlines() if line]
        allowed = []
        for name in names.split():
            rows = [cells_of(row) for row in (ROOT / name).read_text("utf-8").splitlines() if row]
            columns = [rows[0].index(head) for head in heads]
            tables = [[row[c] for c in columns] if len(row) > 1 else row for row in rows]
            allowed += tables
        assert [line for line in lines if line not in allowed] == []


def cells_of(line: str) -> list[str]:
    """Return the cells of a line of a table, or another line as it is."""
    return [cell.strip() for cell in line.strip("|").split("|")]

"""What several tests share: where the research data is, if it is here at all."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # so starts a shell what runs in its background, and programs started by tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup starts it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))  # tests import golden_state from it


def pytest_addoption(parser: pytest.Parser) -> None:
    """--kills: how often a training run is killed."""
    parser.addoption("--kills", type=int, default=3, metavar="N", help="SIGKILLs of the test that kills training")


def shared_folder() -> Path | None:
    """The folder with the research images and weights: $CBSWR_SHARED, else ../shared beside the checkout."""
    folder = Path(os.environ.get("CBSWR_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "data").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The research data; a test that asks for it is skipped where it is absent."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("needs the research images and weights (set CBSWR_SHARED); they are not part of the project")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, where the README's commands are run."""
    return ROOT


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for a module that asks for it: in work so small, several would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """Runs and the pages about them."""
    from reported import Reported

    return Reported(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Iterator[Forks]:
    """Runs of the scripts in processes of their own."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()

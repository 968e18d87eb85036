"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import utils.threads  # noqa: F401

import pytest
import torch
from forks import Forks
from reported import Reported
from synthetic import write_dataset

for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:  # as a shell's background or nohup starts it
        signal.signal(number, handler)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "golden"))  # tests import golden_state from it


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --kills."""
    parser.addoption(
        "--kills", type=int, default=3, metavar="N", help="how often the test of kills kills"
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the research images and weights: $CBSWR_SHARED, or ../shared.

    A test that asks for it is skipped where it is absent.
    """
    folder = Path(os.environ.get("CBSWR_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("needs the research images and weights, which are not part of the project")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, where the README's commands are run."""
    return ROOT


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread: in work so small, several would only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The --data_dir of the data set `tiny`; no test may change it."""
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """Runs and the pages about them."""
    return Reported(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Forks:
    """Runs of the scripts in processes of their own."""
    return Forks(tmp_path_factory.mktemp("forks"))

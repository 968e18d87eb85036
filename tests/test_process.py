"""Settings of the process: they are made, and what the user set stands."""

from __future__ import annotations

import os
import sys

import pytest

from utils.errors import run_script
from utils.process import keep_freed_memory, share_cores


def test_share_cores_leaves_the_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    share_cores()
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_keep_freed_memory_reports_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert keep_freed_memory() is False


def test_a_missing_package_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    def main() -> None:
        import torch  # noqa: F401

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    assert "the package torch is missing" in (said := capsys.readouterr().err) and "requirements.txt" in said
    with pytest.raises(ModuleNotFoundError):  # a fault of the program, not of the installation
        run_script(lambda: __import__("no_such_module_of_ours"))

"""What a number depends on is collected without a traceback, whatever is missing."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fffexp.environment import environment, git_commit, peak_memory_mb

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    git_commit.cache_clear()
    yield
    git_commit.cache_clear()


def test_the_environment_names_where_a_number_comes_from() -> None:
    found = environment([1, 2], "cpu")
    assert found["threads"] == [1, 2]
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["host"] == platform.node()
    assert found["versions"]["python"] == platform.python_version()
    assert {"cpu", "cores", "compiler", "instruction_set", "huge_pages", "commit", "date"} <= found.keys()


def test_the_commit_is_that_of_the_repository() -> None:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this copy has no repository")
    assert (git_commit() or "").removesuffix("-dirty") == done.stdout.strip()


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_a_package_within_another_repository_has_no_commit(tmp_path: Path) -> None:
    commit = "-c user.name=a -c user.email=a@b commit -qm a --allow-empty"
    for command in ("init -q", commit):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    installed = tmp_path / "site-packages" / "fffexp"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    (installed / "environment.py").write_text((ROOT / "fffexp" / "environment.py").read_text())
    code = "from fffexp.environment import git_commit; print(git_commit())"
    env = {**os.environ, "PYTHONPATH": str(installed.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=tmp_path
    )
    assert done.stdout.strip() == "None"


def test_peak_memory_is_that_of_the_process() -> None:
    peak = peak_memory_mb()
    if peak is None:
        pytest.skip("this system does not say")
    now = psutil.Process().memory_info().rss / 2**20
    assert 0.95 * now <= peak < psutil.virtual_memory().total / 2**20


def test_peak_memory_is_unknown_without_the_module_that_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_mb() is None


def test_peak_memory_of_macos_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = peak_memory_mb()
    if linux is None:
        pytest.skip("this system does not say")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory_mb() == pytest.approx(linux / 1024, rel=0.1)

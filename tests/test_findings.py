"""Every table of the docs is what the command above it prints: `make results` writes them."""

import re
import shutil
from pathlib import Path

import pytest

from fffexp.paper import results

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("**/*.md"))}
BLOCKS = [(name, *found[1:]) for name, page in PAGES.items() for found in results.BLOCK.findall(page)]


def test_every_table_of_the_findings_has_a_command() -> None:
    assert len([name for name, *_ in BLOCKS if name == "findings.md"]) == PAGES["findings.md"].count("```text") >= 20


@pytest.mark.parametrize(("page", "command", "block"), BLOCKS, ids=[f"{i}" for i in range(len(BLOCKS))])
def test_the_block_is_what_the_command_prints(
    page: str, command: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs/results").mkdir(parents=True)
    for path in re.findall(r"docs/results/\S+\.json", command):
        shutil.copy(ROOT / path, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    assert results.printed(command) == block, f"{page} is out of date: make results"

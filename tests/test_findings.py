"""Every table of the docs is what the command above it prints (`make results` writes them), and the summary agrees."""

import re
import shutil
from pathlib import Path

import pytest

from fffexp.paper import figure3, figure_minilm, figure_table1, figure_text, hardening, results

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").glob("**/*.md"))}
BLOCKS = [(name, *found[1:]) for name, page in PAGES.items() for found in results.BLOCK.findall(page)]
SECTIONS = [text for text in re.split(r"^#+ ", PAGES["docs/findings.md"], flags=re.M) if "`fffexp " in text]
INTERVAL = re.compile(r"[-+]?\d+\.\d+ \[[^]]+\](?:, p [\d.]+\d)?")


def test_every_table_has_a_command() -> None:
    for name, page in PAGES.items():
        assert len([block for block in BLOCKS if block[0] == name]) == page.count("```text"), name
    assert len(BLOCKS) >= 30


@pytest.mark.parametrize(("page", "command", "block"), BLOCKS, ids=[f"{i}" for i in range(len(BLOCKS))])
def test_the_block_is_what_the_command_prints(
    page: str, command: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs/results").mkdir(parents=True)
    for path in re.findall(r"docs/results/\S+\.json", command):
        shutil.copy(ROOT / path, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    for figure in (figure3, figure_minilm, figure_table1, figure_text, hardening):
        monkeypatch.setattr(figure, "draw", lambda *_: None)  # takes most of the time, and is tested on its own
    assert results.printed(command) == block, f"{page} is out of date: make results"


@pytest.mark.parametrize("section", SECTIONS, ids=[section.split("\n")[0][:60] for section in SECTIONS])
def test_intervals_of_the_summary_are_printed_by_its_commands(section: str) -> None:
    commands = re.findall(r"^`(fffexp .*)`$", section, re.M)
    blocks = " ".join(block for _, command, block in BLOCKS if command in commands).replace("%", "")
    for interval in INTERVAL.findall(" ".join(section.split())):
        assert interval in " ".join(blocks.split()), "the summary states what its commands do not print"


def test_the_summary_states_intervals() -> None:
    assert len(SECTIONS) >= 9
    assert sum(len(INTERVAL.findall(section)) for section in SECTIONS) >= 20

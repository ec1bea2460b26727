"""The write-up says what the commands print: each line of its tables is one of theirs, from the committed results."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fffexp.reproduce import table1, table2
from fffexp.study import text

ROOT = Path(__file__).parents[1]
PRINTED: dict[str, Callable[[Any], str]] = {"table1": table1.report, "table2": table2.report, "recipe": text.trials}

BLOCKS = re.findall(
    r"`fffexp [^`]*?(docs/results/\w+\.json)[^`]*`.*?```text\n(.*?)```", (ROOT / "docs/findings.md").read_text(), re.S
)


def test_there_are_tables() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize(("path", "block"), BLOCKS)
def test_every_line_is_printed_by_the_command_above_it(path: str, block: str) -> None:
    (report,) = (report for kind, report in PRINTED.items() if Path(path).name.startswith(kind))
    printed = report(json.loads((ROOT / path).read_text())).splitlines()
    lines = block.splitlines()
    assert lines
    assert [line for line in lines if line not in printed] == []

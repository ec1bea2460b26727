"""The write-up says what the commands print: each line of its tables is one of theirs, from the committed results."""

import copy
import json
import re
from pathlib import Path

import pytest

from fffexp.paper import conversion, entropies, runs, table1, table2, table3
from fffexp.report.trials import trials
from fffexp.study.results import Results

ROOT = Path(__file__).parents[1]
FINDINGS = (ROOT / "docs/findings.md").read_text()
BLOCKS = re.findall(r"`(fffexp [^`]*?docs/results/\w+\.json[^`]*)`(?:(?!```).)*```text\n(.*?)```", FINDINGS, re.S)


def test_every_table_has_a_command() -> None:
    assert len(BLOCKS) == FINDINGS.count("```text") >= 2


@pytest.mark.parametrize(("command", "block"), BLOCKS)
def test_every_line_is_printed_by_the_command_above_it(command: str, block: str) -> None:
    words = command.split()
    found = json.loads((ROOT / next(word for word in words if word.startswith("docs/results/"))).read_text())
    if "table" in found:
        table = {"table1": table1, "table2": table2, "table3": table3}[found["table"]]
        again = copy.deepcopy(found)
        runs.summarize(again, lambda cell: table.in_paper(cell, found["data"]))
        assert json.loads(json.dumps(again)) == found, "the command would print other numbers"
        printed = table.report(found).splitlines()
    elif "conversion" in found:
        printed = conversion.report(found).splitlines()
    elif "figure" in found:
        printed = entropies.report(found).splitlines()
    else:
        baseline = int(words[words.index("--baseline") + 1]) if "--baseline" in words else None
        printed = trials(Results.from_json(found), baseline).splitlines()
    lines = block.splitlines()
    assert lines
    assert [line for line in lines if line not in printed] == []

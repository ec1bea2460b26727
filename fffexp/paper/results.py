"""`make results`: every table in docs/ is what the command above it prints, and every picture is drawn again.

All of it comes from the JSON of docs/results/. A table is a ```text block; its command is the last one above it, in
backquotes and with a file of docs/results/.
"""

import io
import os
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

from fffexp.cli import main
from fffexp.errors import UserError

BLOCK = re.compile(r"(`(fffexp [^`]*?docs/results/\w+\.json[^`]*)`(?:(?!```|`fffexp ).)*```text\n)(.*?)(?=```)", re.S)
PICTURES = {"docs/pareto.png": "digits_depth_leaf", "docs/fashion.png": "fashion_depth_leaf"}  # of studies


def printed(command: str) -> str:
    """What a command prints; UserError if it fails."""
    with redirect_stdout(io.StringIO()) as text:
        if status := main(shlex.split(command)[1:]):
            raise UserError(f"{command}: ended with status {status}")
    return text.getvalue().strip("\n") + "\n"


def refresh() -> None:
    """All pages and pictures of docs/."""
    from fffexp.report import figures
    from fffexp.study.results import Results

    os.chdir(Path(__file__).parents[2])
    for page in sorted(Path("docs").glob("**/*.md")):
        page.write_text(BLOCK.sub(lambda found: found[1] + printed(found[2]), page.read_text()))
    printed("fffexp reproduce figure3 --batch_sizes 1 16 256 2048 --ff_depth 6 --json docs/results/figure3.json")
    for picture, study in PICTURES.items():
        Path(picture).write_bytes(figures.png(figures.pareto(Results.load(Path(f"docs/results/{study}.json")))))


if __name__ == "__main__":
    refresh()

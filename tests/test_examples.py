"""Every example runs, and its model learns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


# the shortest stands for all where there is little time
PATHS = [pytest.param(path, marks=[] if path.stem == "plain_pytorch" else pytest.mark.slow) for path in EXAMPLES]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_example(path: Path, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = re.search(r"test accuracy ([\d.]+)%", run.stdout)
    assert found
    assert float(found[1]) > 90

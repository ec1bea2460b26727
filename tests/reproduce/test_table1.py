"""FF against FFF at equal training width: cells, statistics and the command, on small data of the same form."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fffexp.cli import main
from fffexp.reproduce import paper, table1
from fffexp.reproduce.table1 import Cell


def test_cells_are_those_of_the_table() -> None:
    best = table1.cells("best", paper.WIDTHS, paper.LEAF_WIDTHS)
    assert len(best) == 20
    assert len(table1.cells("paper", paper.WIDTHS, paper.LEAF_WIDTHS)) == 4 + 2 * 16
    assert best[0].training_width == 128  # the longest first
    assert {(c.training_width, c.leaf_width): c.depth for c in best}[(128, 8)] == 4
    assert all(table1.printed("fashion_mnist", c.leaf_width, c.training_width) for c in best)
    assert paper.printed("fashion_mnist", 8, 128) == (90.5, 86.1)
    assert paper.printed("fashion_mnist", 8, 256) is None


def cell(values: list[float], printed: float) -> dict[str, Any]:
    runs = [
        {"training_width": 128, "leaf_width": 8, "reduction": None, "seed": i, "train_accuracy": v / 100,
         "test_accuracy": v / 100, "epochs_to_fit": 3, "epochs_to_best": 2 + i, "used_blocks": used,
         "nonfinite_steps": 2 * (i == 3)}
        for i, (v, used) in enumerate(zip(values, [16, 8, 7, 1], strict=False))
    ]  # fmt: skip
    found = {"data": "fashion_mnist", "runs": runs}
    table1._summarize(found)
    (row,) = (c for c in found["cells"] if c["metric"] == "G_A")
    return row | {"paper": printed}


def test_statistics_of_a_cell() -> None:
    row = cell([86.0, 87.0, 88.0, 89.0], 86.1)
    assert row["mean"] == pytest.approx(87.5)
    assert (row["best"], row["worst"], row["n"]) == (pytest.approx(89), pytest.approx(86), 4)
    # t(3) = 3.182, s = 1.291
    assert row["ci95"] == pytest.approx((87.5 - 3.182 * 1.291 / 2, 87.5 + 3.182 * 1.291 / 2), abs=1e-2)
    assert row["diverged"] == 1
    assert row["collapsed"] == 2  # fewer than half of 16 leaves in use: 7 and 1


@pytest.mark.parametrize(
    ("printed", "answer"), [(85.0, "better"), (88.5, "reproduced"), (95.0, "not reproduced"), (89.3, "not told apart")]
)
def test_verdicts(printed: float, answer: str) -> None:
    assert table1.verdict(cell([86.0, 87.0, 88.0, 89.0], printed)).split(":")[0] == answer


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two easy classes as IDX files where the configs look for Fashion-MNIST."""
    generator = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "small"
    root.mkdir()
    for part, rows in (("train", 200), ("t10k", 40)):
        labels = (np.arange(rows) % 2).astype(np.uint8)
        images = (generator.integers(0, 40, (rows, 28, 28)) + 150 * labels[:, None, None]).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
            (root / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    more = [f"--data.root={root}", "--trainer.max_epochs=4", "--data.batch_size=50"]
    monkeypatch.setitem(table1.DATA, "fashion_mnist", [*table1.DATA["fashion_mnist"], *more[:1]])
    arguments = Cell.arguments
    monkeypatch.setattr(Cell, "arguments", lambda self, *args: [*arguments(self, *args), *more[1:]])
    return root


@pytest.mark.usefixtures("fashion")
@pytest.mark.parametrize("protocol", ["paper", "best"])
def test_the_command_trains_and_goes_on_where_it_stopped(
    protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table1.json"
    command = ["reproduce", "table1", "--protocol", protocol, "--training_widths", "16", "--json", str(path)]
    assert main([*command, "--leaf_widths", "8", "--seeds", "2"]) == 0
    first = json.loads(path.read_text())["runs"]
    assert main([*command, "--leaf_widths", "8", "4", "--seeds", "3"]) == 0
    told = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["runs"][: len(first)] == first, "what was trained was trained again"
    readings = ("sum", "mean") if protocol == "paper" else (None,)
    wanted = {(None, None), *((leaf, reading) for leaf in (8, 4) for reading in readings)}
    by_cell = {(c["leaf_width"], c["reduction"]): c for c in found["cells"] if c["metric"] == "G_A"}
    assert by_cell.keys() == wanted
    assert all(c["n"] == 3 and len(c["used_leaves"]) == 3 for c in by_cell.values())
    assert found["seeds"] == [0, 1, 2]
    if protocol == "paper":  # in 16 steps the averaged weights of the other have hardly moved
        assert by_cell[(None, None)]["mean"] > 90, "two classes that anything can tell apart"
    assert "95% interval" in told
    monkeypatch.setattr(table1, "train", None)  # nothing is left to train
    assert main([*command, "--leaf_widths", "8", "4", "--seeds", "3"]) == 0
    assert math.isfinite(by_cell[(8, readings[0])]["mean"])


def test_a_mistake_in_the_data_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f"--data.root={tmp_path}"
    monkeypatch.setitem(table1.DATA, "fashion_mnist", [*table1.DATA["fashion_mnist"], more])
    assert main(["reproduce", "table1", "--training_widths", "16", "--seeds", "1"]) == 2
    told = capsys.readouterr().err.strip()
    assert "no IDX files" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/"], "--json /: name a file that ends in .json"),
        (["--json", "/proc/no/x.json"], "--json /proc/no/x.json: "),
        (["--training_widths", "12", "--leaf_widths", "8"], "12 hidden neurons are not a power of 2 of leaves of 8"),
        (["--data", "letters"], "invalid choice: 'letters'"),
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table1", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told

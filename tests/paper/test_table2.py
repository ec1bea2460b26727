"""FF, MoE and FFF at equal training width: cells, arguments and the command, on small data of the same form."""

import json
from pathlib import Path

import pytest

from fffexp.cli import main
from fffexp.paper import paper, runs, table2
from fffexp.paper.cells import CONFIGS, Cell, Layer
from fffexp.training.experiment import Context, ExperimentCLI


def test_cells_are_those_of_the_table() -> None:
    cells = table2.cells(paper.TABLE2_WIDTHS, ["FF", "NoisyTopKMoE", "FFF"])
    assert len(cells) == 5 * (1 + 1 + 2)  # FFF in both readings
    assert cells[0].training_width == 1024
    assert {c.depth for c in cells if c.layer == "FFF"} == {1, 2, 3, 4, 5}
    assert all(len(paper.printed2(cell.layer, cell.training_width)) == 4 for cell in cells)
    assert paper.printed2("FFF", 128) == {"M_A": 90.1, "ETT_M": 305, "G_A": 45.5, "ETT_G": 22}
    assert paper.printed2("SwitchMoE", 128) == paper.printed2("FF", 100) == {}


@pytest.mark.parametrize("layer", ["FF", "NoisyTopKMoE", "SwitchMoE", "FFF"])
def test_arguments(layer: Layer) -> None:
    (cell, *_) = table2.cells([128], [layer])
    args = [a for a in table2.training(cell, "fashion_mnist").args if "fashion_mnist.yaml" not in a]
    experiment = ExperimentCLI(["fit", f"--config={CONFIGS}/data/digits.yaml", *args], Context(dry=True))
    task = experiment.model
    (made,) = task.layers.values()
    assert (type(made).__name__, made.training_width) == (layer, 128)
    assert experiment.datamodule.batch_size == 4096
    expected = {
        "FF": {},
        "NoisyTopKMoE": {"importance": 0.1, "load": 0.1},
        "SwitchMoE": {"load_balance": 0.3},
        "FFF": {"hardening_sum": 3.0},
    }
    assert task.schedules == expected[layer]
    assert made.inference_width == {"FF": 128, "NoisyTopKMoE": 32, "SwitchMoE": 32, "FFF": 32}[layer]


@pytest.mark.usefixtures("fashion")
def test_the_command_trains_seed_by_seed_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table2.json"
    command = ["reproduce", "table2", "--training_widths", "64", "--json", str(path)]
    assert main([*command, "--layers", "FF", "--seeds", "1"]) == 0
    assert main([*command, "--seeds", "2"]) == 0
    found = json.loads(path.read_text())
    assert found["seeds"] == [0, 1]
    assert [run["seed"] for run in runs.of(found, Cell("FF", 64))] == [0, 1]
    metrics = [c["metric"] for c in found["cells"] if Cell.of(c) == Cell("FFF", 64, 32, "mean")]
    assert metrics == ["M_A", "G_A", "ETT_M", "ETT_G"]
    assert all(c["n"] == 2 and c["paper"] is None for c in found["cells"]), "what is printed is of CIFAR10"
    best = {c["layer"]: c["best"] for c in found["cells"] if c["metric"] == "G_A" and c["layer"] == "FF"}
    assert best["FF"] > 90, "two classes that anything can tell apart"
    told = capsys.readouterr().out
    assert "stability" in told
    assert f"at most {table2.EPOCHS} epochs (the paper: 7000)" in told
    monkeypatch.setattr(runs, "train", None)  # nothing is left to train
    assert main([*command, "--seeds", "2"]) == 0

"""Table 3 of arXiv 2308.14711 and its controls, on data that is quickly learnt."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from scipy import stats

from fffexp.cli import main
from fffexp.paper import runs, table3
from fffexp.paper.cells import Cell
from fffexp.paper.table3 import DENSE, NOTHING
from fffexp.training.experiment import Context, ExperimentCLI


def test_every_tree_has_its_controls() -> None:
    wanted = table3.cells([8, 1])
    assert wanted[:4] == [DENSE, NOTHING, Cell("FFF", 128, 8), Cell("FFF", 128, 1)]
    # d + l = 4 + 8 and 7 + 1
    assert [cell.training_width for cell in wanted if cell.layer == "FF"] == [128, 12, 8, 1]


@pytest.mark.parametrize("cell", table3.cells([8, 1]), ids=lambda cell: f"{cell.layer}-{cell.training_width}")
def test_the_network_is_that_of_the_cell(cell: Cell) -> None:
    args = table3.training(cell, "fashion_mnist", blocks=2, epochs=3).args
    experiment = ExperimentCLI(["fit", *args], Context(quiet=True, dry=True))
    assert experiment.trainer.max_epochs == 3
    task = experiment.model
    layers = list(task.layers.values())
    assert len(layers) == (0 if cell == NOTHING else 2)
    assert {layer.training_width for layer in layers} <= {cell.training_width}
    assert set(task.schedules) == {"FFF": {"inverse_temperature", "importance"}, "NoisyTopKMoE": {"importance"}}.get(
        cell.layer, set()
    )
    assert task.network.positions.shape[1] == 17


def test_what_is_kept() -> None:
    accuracies = {DENSE: [0.9, 0.92], NOTHING: [0.8, 0.82], Cell("FFF", 128, 8): [0.89, 0.9]}
    made = [
        asdict(cell) | {"seed": seed, "test_accuracy": value}
        for cell, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    kept = {Cell.of(each): each for each in table3.kept({"runs": made})}
    nothing, dense, tree = (kept[cell] for cell in (NOTHING, DENSE, Cell("FFF", 128, 8)))
    mean, interval = tree["recovered"]
    assert mean == pytest.approx((0.09 + 0.08) / (0.1 + 0.1))
    assert interval[0] < mean < interval[1]
    assert tree["ratio"][0] == pytest.approx((0.89 + 0.9) / (0.9 + 0.92))
    assert nothing["recovered"][0] == 0
    assert (dense["ratio"][0], dense["recovered"][0]) == (1, 1)
    flat = [run | {"test_accuracy": 0.9} for run in made]
    assert all(each["recovered"] is None for each in table3.kept({"runs": flat})), "no gap to recover"


def test_trees_are_compared_with_their_controls() -> None:
    tree = Cell("FFF", 128, 8)
    accuracies = {
        tree: [0.89, 0.90, 0.91], Cell("FF", 12): [0.88, 0.895, 0.90], NOTHING: [0.8, 0.82], DENSE: [0.9, 0.9, 0.9],
    }  # fmt: skip
    made = [
        asdict(cell) | {"seed": seed, "test_accuracy": value}
        for cell, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    made.append(asdict(Cell("FF", 8)) | {"seed": 7, "test_accuracy": 0.9})  # none in common
    found = {control: test for _, control, test in table3.comparisons({"runs": made})}
    assert {control: test.seeds for control, test in found.items()} == {Cell("FF", 12): 3, NOTHING: 2}
    assert found[Cell("FF", 12)].difference == pytest.approx((0.01 + 0.005 + 0.01) / 3)
    alone = [
        stats.ttest_rel(accuracies[tree][:n], accuracies[of]).pvalue for of, n in ((Cell("FF", 12), 3), (NOTHING, 2))
    ]
    assert [found[of].p for of in (Cell("FF", 12), NOTHING)] == pytest.approx(
        list(stats.false_discovery_control(alone))
    )


def test_what_the_paper_prints_is_of_cifar10() -> None:
    assert table3.in_paper(Cell("FFF", 128, 1), "cifar10") == {"G_A": 79.8}
    assert table3.in_paper(DENSE, "cifar10") == {"G_A": 84.7}
    for cell, data in ((DENSE, "fashion_mnist"), (Cell("FF", 8), "cifar10"), (NOTHING, "cifar10")):
        assert table3.in_paper(cell, data) == {}
    assert table3.in_paper(DENSE, "cifar10", 1) == {}


@pytest.mark.usefixtures("fashion")
def test_the_command_trains_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table3, "TIMING_S", 0.1)
    path = tmp_path / "table3.json"
    command = ["reproduce", "table3", "--json", str(path)]
    assert main([*command, "--leaf_widths", "32", "--seeds", "1"]) == 0
    first = json.loads(path.read_text())["runs"]
    command += ["--leaf_widths", "8"]
    assert main([*command, "--seeds", "1"]) == 0
    found = json.loads(path.read_text())
    assert found["runs"][: len(first)] == first
    assert {Cell.of(run) for run in found["runs"]} == {*table3.cells([8]), *table3.cells([32])}
    assert {run["train_accuracy"] for run in found["runs"]} == {None}
    assert {row["metric"] for row in found["cells"]} == {"G_A", "ETT_G"}
    speeds = {Cell.of(speed): speed for speed in found["speeds"]}
    assert speeds[DENSE]["layer_speedup"] == speeds[DENSE]["model_speedup"] == 1
    assert speeds[Cell("FFF", 128, 8)]["sizes"]["inference_size"] == 12
    told = capsys.readouterr().out
    line = [line for line in told.splitlines() if line.startswith("FFF") and "9.4%" in line][-1]
    assert "6.2%" in line
    monkeypatch.setattr(runs, "train", None)  # nothing is left to train
    assert main([*command, "--seeds", "1"]) == 0
    assert main([*command, "--seeds", "1", "--epochs", "30"]) == 2, "of another length"
    assert json.loads(path.read_text())["speeds"] == found["speeds"], "times are not taken again"


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table3", "--leaf_widths", "3"]) == 2
    assert "128 hidden neurons are not a power of 2 of leaves of 3" in capsys.readouterr().err

"""FF against FFF at equal training width: cells, statistics and the command, on small data of the same form."""

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fffexp.cli import main
from fffexp.errors import UserError
from fffexp.paper import controls, paper, results, runs, stability, table1
from fffexp.paper.cells import CONFIGS, DATA, LAYERS, SIZES, Cell, Layer
from fffexp.training.experiment import Context, ExperimentCLI


def test_cells_are_those_of_the_table() -> None:
    best = table1.cells("best", paper.WIDTHS, paper.LEAF_WIDTHS, ["FF", "FFF"])
    assert len(best) == 20
    assert len(table1.cells("paper", paper.WIDTHS, paper.LEAF_WIDTHS, ["FF", "FFF"])) == 4 + 2 * 16
    assert best[0].training_width == 128  # the longest first
    assert table1.cells("best", [16, 16], [8, 8], ["FF", "FFF"]) == [Cell("FF", 16), Cell("FFF", 16, 8)]
    assert {(c.training_width, c.leaf_width): c.depth for c in best}[(128, 8)] == 4
    assert all(table1.printed("fashion_mnist", c.leaf_width, c.training_width) for c in best)
    assert paper.printed("fashion_mnist", 8, 128) == (90.5, 86.1)
    assert paper.printed("fashion_mnist", 8, 256) is None


# neurons evaluated for a sample: w; 2 * 4 and 8 rows of a gate; 4 and 8 rows; 4 and 3 nodes
INFERENCE_SIZES = {"FF": 32, "NoisyTopKMoE": 16, "SwitchMoE": 12, "FFF": 7}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_sizes_are_those_of_the_layer(layer: Layer) -> None:
    cell = Cell(layer, 32, None if layer == "FF" else 4)
    for protocol in ("best", "paper") if layer in ("FF", "FFF") else ("best",):
        args = [a for a in table1.training(cell, "fashion_mnist", protocol).args if "fashion_mnist.yaml" not in a]
        experiment = ExperimentCLI(["fit", f"--config={CONFIGS}/data/digits.yaml", *args], Context(dry=True))
        (made,) = experiment.model.layers.values()
        assert type(made).__name__ == layer
        assert (made.training_width, made.inference_size) == (32, INFERENCE_SIZES[layer])
        assert made.num_experts == cell.blocks
        optimizer = made_by(experiment.model.optimizer)
        if protocol == "paper":
            assert (type(optimizer).__name__, optimizer.defaults["lr"]) == ("SGD", 0.2)
            assert optimizer.defaults["weight_decay"] == optimizer.defaults["momentum"] == 0
        else:
            assert type(optimizer).__name__ == "AdamW"


def test_narrow_layers_have_recipes_of_their_own() -> None:
    cells = [Cell("FFF", 128, 4), Cell("FFF", 128, 2), Cell("FF", 17), Cell("FF", 16), Cell("NoisyTopKMoE", 16, 1)]
    assert [cell.recipe for cell in cells] == ["fff", "fff_narrow", "ff", "ff_narrow", "moe"]
    for cell in cells:
        assert f"--config={CONFIGS}/recipe/{cell.recipe}.yaml" in cell.best_arguments("fashion_mnist")


def made_by(factory: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = factory([torch.nn.Parameter(torch.zeros(1))])
    return optimizer


@pytest.mark.parametrize(
    ("layer", "leaf_width", "message"),
    [
        ("FFF", 3, "not a power of 2"),
        ("SwitchMoE", 5, "not a number of experts"),
        ("NoisyTopKMoE", 16, "1 expert of 16: 2 are needed"),
    ],
)
def test_leaf_widths_that_do_not_fit(layer: Layer, leaf_width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cell(layer, 16, leaf_width)


def runs_of(cell: Cell, accuracies: list[float], **more: Any) -> list[dict[str, Any]]:
    base = {
        "epochs_to_fit": 3, "epochs": 10, "used_blocks": cell.blocks, "nonfinite_steps": 0, "val_accuracy_std": 0.01,
        "loss_spikes": 1, "dead_blocks": 0,
    }  # fmt: skip
    return [
        asdict(cell) | base | more
        | {"seed": i, "train_accuracy": v / 100, "test_accuracy": v / 100, "epochs_to_best": 2 + i}
        for i, v in enumerate(accuracies)
    ]  # fmt: skip


def row_of(values: list[float], printed: float | None) -> dict[str, Any]:
    made = runs_of(Cell("FFF", 128, 8), values)
    for run, used in zip(made, [16, 8, 7, 1], strict=False):
        run["used_blocks"] = used
    made[-1]["nonfinite_steps"] = 2
    (row,) = (row for row in runs.rows(made, {} if printed is None else {"G_A": printed}) if row["metric"] == "G_A")
    return row


def test_statistics_of_a_cell() -> None:
    row = row_of([86.0, 87.0, 88.0, 89.0], 86.1)
    assert row["mean"] == pytest.approx(87.5)
    assert (row["best"], row["worst"], row["n"]) == (pytest.approx(89), pytest.approx(86), 4)
    # t(3) = 3.182, s = 1.291
    assert row["ci95"] == pytest.approx((87.5 - 3.182 * 1.291 / 2, 87.5 + 3.182 * 1.291 / 2), abs=1e-2)
    assert row["diverged"] == 1
    assert row["collapsed"] == 2  # fewer than half of 16 leaves in use: 7 and 1


def test_epochs_are_those_of_the_best_run() -> None:
    made = runs_of(Cell("FF", 16), [86.0, 89.0, 10.0])
    for run, epochs in zip(made, (40, 90, 1), strict=True):
        run["epochs_to_best"] = epochs
    (row,) = (row for row in runs.rows(made, {}) if row["metric"] == "ETT_G")
    assert (row["best"], row["worst"]) == (90, 1), "a run that learns nothing has not trained fast"


@pytest.mark.parametrize(
    ("printed", "answer"), [(85.0, "better"), (88.5, "reproduced"), (95.0, "not reproduced"), (89.3, "not told apart")]
)
def test_verdicts(printed: float, answer: str) -> None:
    assert runs.verdict(row_of([86.0, 87.0, 88.0, 89.0], printed)) == answer


def test_cells_above_the_paper_are_counted() -> None:
    rows = [row_of([86.0, 87.0, 88.0, 89.0], printed) for printed in (80.0, 87.0)]
    # t = 7.5 / 0.6455 and 0.5 / 0.6455 with 3 degrees of freedom; the larger is not adjusted
    assert "in 1 of 2 cells" in runs.above_paper(rows)
    assert runs.above_paper(rows).endswith("2.5e-01")
    assert runs.above_paper([]) == ""
    assert "in 1 of 1 cells" in runs.above_paper([row_of([88.0, 88.0], 87.0)])
    assert runs.above_paper([row_of([88.0, 88.0], 88.0)]).endswith("1.0e+00"), "no seed is above"


def test_the_difference_to_the_paper_is_told() -> None:
    at = runs.HEADER.index("diff") + len("diff")
    assert runs.line(row_of([86.0, 88.5], 86.1))[:at].split()[-3:] == ["86.1", "88.50", "+2.40"]
    assert runs.line(row_of([86.0, 88.5], None))[:at].split()[-1] == "88.50"


def test_equal_in_time_is_the_widest_that_is_hardly_slower() -> None:
    assert controls.equal_in_time({2: 0.5, 4: 1.2, 8: 1.15, 16: 1.3}) == 8
    assert controls.equal_in_time({2: 1.5, 4: 1.6}) == 2


def test_leaves_in_use_are_told() -> None:
    at = runs.HEADER.index("used") + len("used")
    used = [runs.line(row_of([86.0] * seeds, 86.1))[:at].split()[-1] for seeds in (1, 4)]
    assert used == ["16", "1-16"]


def table(*parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"data": "fashion_mnist", "controls": [], "runs": [run for part in parts for run in part]} | more


def test_controls_are_of_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "TIMING_S", 0.1)
    found = table()
    wanted = [Cell("FFF", 128, 8), Cell("FFF", 16, 8)]
    controls.choose(found, wanted)
    first = found["controls"][0]
    # 15 nodes * 785 + 128 * 785 + 128 * 10 + 16 * 10 = 113,695 parameters; FF: 795 a neuron + 10
    assert (first["parameters"], first["inference_size"]) == (143, 12)
    assert found["controls"][1]["inference_size"] == 9
    assert 1 <= first["inference_time"] <= 512
    ratios = first["time_ratios"]
    assert first["time_ratio"] == ratios[first["inference_time"]]
    assert [width for width, ratio in ratios.items() if ratio <= 1.15][-1:] in ([], [first["inference_time"]])
    before = copy.deepcopy(found["controls"])
    controls.choose(found, wanted)
    assert found["controls"] == before, "times are not taken again"
    dense = [cell.training_width for cell in controls.cells(found, [*wanted, Cell("FF", 12)])]
    assert {143, 9, 128, 16} <= set(dense)
    assert 12 not in dense, "it is wanted anyway"
    assert dense == sorted(dense, reverse=True)


def test_comparisons_with_controls_are_paired() -> None:
    control = Cell("FFF", 128, 8).describe() | {
        "width": 128, "parameters": 143, "inference_size": 12, "inference_time": 24, "time_ratio": 0.9,
    }  # fmt: skip
    ours, ahead, behind = [88.0, 87.0, 88.5], [89.0, 88.1, 89.4], [86.0, 85.0, 86.6]
    found = table(
        runs_of(Cell("FFF", 128, 8), ours), runs_of(Cell("FF", 128), ahead), runs_of(Cell("FF", 12), behind),
        runs_of(Cell("FF", 24), [88.0, 87.5, 88.0]), controls=[control],
    )  # fmt: skip
    made = {kind: c for c in controls.comparisons(found) for kind in c["kinds"]}
    assert set(made) == {"width", "inference_size", "inference_time"}  # no run of 143 neurons
    assert made["width"]["difference"] == pytest.approx(-1.0)
    assert controls.comparisons(
        table(*(runs_of(Cell(*of), ours) for of in (("FFF", 128, 8), ("FF", 12))), controls=[control | {"width": 12}])
    )[0]["kinds"] == ["width", "inference_size"], "tested once"
    ps = [stats.ttest_rel(ours, theirs).pvalue for theirs in (ahead, behind, [88.0, 87.5, 88.0])]
    assert [made[kind]["p"] for kind in ("width", "inference_size", "inference_time")] == pytest.approx(
        list(stats.false_discovery_control(ps))
    )
    told = {line.split()[3] + line.split()[4]: line for line in controls.report(found).splitlines()[1:4]}
    assert told["width128"].endswith("FF is ahead")
    assert next(line for line in told.values() if "inference size" in line).endswith("FFF is ahead")
    assert next(line for line in told.values() if "inference time" in line).endswith("no difference shown")
    assert controls.report(table()) == ""


def test_mixtures_are_compared_with_dense_layers_of_no_more_neurons() -> None:
    noisy, switch = Cell("NoisyTopKMoE", 128, 8), Cell("SwitchMoE", 128, 8)
    assert (noisy.inference_size, switch.inference_size) == (2 * 8 + 16, 8 + 16)
    assert (Cell("FFF", 128, 8).inference_size, Cell("FF", 24).inference_size) == (4 + 8, 24)
    ours, dense, narrow = [88.0, 87.0, 88.5], [89.0, 88.1, 89.4], [86.0, 85.0, 86.6]
    found = table(
        runs_of(noisy, ours), runs_of(switch, ours), runs_of(Cell("FFF", 128, 8), ours),
        runs_of(Cell("FF", 33), narrow), runs_of(Cell("FF", 32), dense), runs_of(Cell("FF", 16), narrow),
    )  # fmt: skip
    made = controls.mixtures(found)
    assert [(cell, of.training_width) for cell, of, _ in made] == [(noisy, 32), (switch, 16)]
    assert made[0][2].difference == pytest.approx(-1.0)
    ps = [stats.ttest_rel(ours, theirs).pvalue for theirs in (dense, narrow)]
    assert [test.p for *_, test in made] == pytest.approx(list(stats.false_discovery_control(ps)))
    told = controls.report(found).splitlines()
    assert told[1].endswith("FF is ahead")
    assert told[2].endswith("MoE is ahead")


def test_stability() -> None:
    a, b = [88.0, 88.1, 87.9, 88.0, 88.05, 87.95], [80.0, 88.0, 70.0, 89.0, 84.0, 60.0]
    steady = runs_of(Cell("FFF", 128, 8), a)
    wild = runs_of(Cell("NoisyTopKMoE", 128, 8), b, val_accuracy_std=0.02)
    wild[0]["used_blocks"] = 7
    found = table(steady, wild)
    rows = {row["layer"]: row for row in stability.table(found)}
    assert rows["NoisyTopKMoE"]["collapsed"] == 1
    assert rows["FFF"]["std"] == pytest.approx(np.std(a, ddof=1))
    assert rows["FFF"]["mean - worst"] == pytest.approx(0.1)
    assert rows["FFF"]["ETT_G std"] == pytest.approx(np.std(range(6), ddof=1))
    tests = {t["measure"]: t for t in stability.tests(found)}
    # the late std differs the same way in all six, spikes and dead leaves in none
    ps = {"test accuracy": stats.ttest_rel(a, b).pvalue, "std of test accuracy": stats.levene(a, b).pvalue}
    ps |= {"late std": 2 / 2**6, "spikes": 1.0, "dead": 1.0}
    expected = dict(zip(ps, stats.false_discovery_control(list(ps.values())), strict=True))
    assert {name: test["p"] for name, test in tests.items()} == pytest.approx(expected)
    assert tests["test accuracy"]["FFF"] > tests["test accuracy"]["rival"]
    assert tests["std of test accuracy"]["FFF"] < tests["std of test accuracy"]["rival"]
    assert "NoisyTopKMoE" in stability.report(found)
    assert stability.report(table()) == ""


def test_runs_that_never_vary_are_no_different() -> None:
    found = table(*(runs_of(Cell(layer, 128, 8), [88.0] * 3) for layer in ("FFF", "NoisyTopKMoE")))
    assert [t["p"] for t in stability.tests(found)] == [1] * 5
    shifted = zip(("FFF", "NoisyTopKMoE"), (0.0, 0.1), strict=True)  # by the same with every seed, but for rounding
    found = table(*(runs_of(Cell(layer, 128, 8), [v - by for v in (86.79, 88.41, 86.83)]) for layer, by in shifted))
    assert stability.tests(found)[0]["p"] == 1


def test_controls_know_the_data() -> None:
    assert SIZES.keys() == DATA.keys()
    found = table(data="usps")
    controls.choose(found, [Cell("FFF", 16, 8)])
    # 257 + 16 * 257 + 16 * 10 + 2 * 10 = 4549 parameters; FF: 267 a neuron + 10
    assert found["controls"][0]["parameters"] == 17
    experiment = ExperimentCLI(["fit", *DATA["fashion_mnist"], *Cell("FF", 8).layer_arguments()], Context(dry=True))
    assert (math.prod(experiment.datamodule.in_shape), experiment.datamodule.num_classes) == SIZES["fashion_mnist"]


def test_a_file_of_an_earlier_version_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table1.json"
    run = {"training_width": 16, "leaf_width": None, "reduction": None, "seed": 0, "diverged": False}
    path.write_text(json.dumps({"table": "table1", "data": "fashion_mnist", "protocol": "paper", "runs": [run]}))
    assert main(["reproduce", "table1", "--json", str(path)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "of an earlier version: give another file, or remove it" in told


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
    (where,) = found["environments"]  # the same twice
    assert where["torch"] == torch.__version__
    if protocol == "paper":  # in 16 steps the averaged weights of the other have hardly moved
        assert by_cell[(None, None)]["mean"] > 90, "two classes that anything can tell apart"
    assert "95% interval" in told
    monkeypatch.setattr(runs, "train", None)  # nothing is left to train
    assert main([*command, "--leaf_widths", "8", "4", "--seeds", "3"]) == 0
    found["runs"][-1]["recipe"] = "another"
    path.write_text(json.dumps(found))
    capsys.readouterr()
    assert main([*command, "--leaf_widths", "8", "4", "--seeds", "3"]) == 2
    assert "FFF of width 16 was trained by another recipe: give another file" in capsys.readouterr().err
    assert math.isfinite(by_cell[(8, readings[0])]["mean"])


def test_a_file_is_one_command_s_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table1.json"
    with results.hold(path):
        assert main(["reproduce", "table1", "--json", str(path)]) == 2
    assert f"--json {path}: another command is at it" in capsys.readouterr().err


@pytest.mark.usefixtures("fashion")
def test_the_command_adds_controls_and_other_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table1.json"
    command = ["reproduce", "table1", "--protocol", "best", "--training_widths", "16", "--leaf_widths", "8"]
    assert main([*command, "--layers", *LAYERS, "--controls", "--seeds", "3", "--json", str(path)]) == 0
    told = capsys.readouterr().out
    found = json.loads(path.read_text())
    trained = {(c["layer"], c["training_width"]) for c in found["cells"]}
    assert {(layer, 16) for layer in LAYERS} < trained
    (control,) = found["controls"]
    assert {("FF", control[kind]) for kind in controls.KINDS} <= trained
    assert all(c["n"] == 3 for c in found["cells"])
    assert len([line for line in told.splitlines() if "  equal " in line]) == 4
    assert "std of test accuracy" in told
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_in_the_data_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f"--data.root={tmp_path}"
    monkeypatch.setitem(table1.DATA, "fashion_mnist", [*table1.DATA["fashion_mnist"], more])
    assert main(["reproduce", "table1", "--training_widths", "16", "--seeds", "1"]) == 2
    told = capsys.readouterr().err.strip()
    assert "no IDX files" in told
    assert "\n" not in told


def test_a_figure_that_has_no_place_is_told_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.png").mkdir()
    assert main(["reproduce", "table1", "--json", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.strip().endswith("x.png: it is a folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/"], "--json /: name a file that ends in .json"),
        (["--json", "/proc/no/x.json"], "--json: figure /proc/no/x.png: "),
        (["--training_widths", "12", "--leaf_widths", "8"], "12 hidden neurons are not a power of 2 of leaves of 8"),
        (["--data", "letters"], "invalid choice: 'letters'"),
        (["--controls"], "--protocol paper has FF and FFF alone"),
        (["--layers", "SwitchMoE"], "--protocol paper has FF and FFF alone"),
        (["--protocol", "best", "--layers", "FF", "--controls"], "--controls stand beside FFF: add it to --layers"),
        (["--figure", "x.foo"], "--figure: figure x.foo: name a file that ends in .png"),
        (["--figure", "/proc/no/x.png"], "--figure: figure /proc/no/x.png: "),
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table1", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told

"""Rows of the paper's tables: statistics, verdicts, and the printed numbers."""

import math

import pytest
from points import table, trial
from scipy import stats

from fffexp.paper import rows
from fffexp.study.results import Results, Trial


def row(values: list[float], metric: str = "G_A") -> rows.Row:
    (found,) = (each for each in rows.cells(table(tree(values))) if each["metric"] == metric)
    return found


def tree(values: list[float]) -> Trial:
    found = trial(0, "FFF", values, training_width=128, leaf_width=8, depth=4)
    for run, used in zip(found.runs, [16, 8, 7, 1], strict=False):
        run["routing/used_leaves"] = used
    found.runs[-1]["stability/nonfinite_steps"] = 2
    return found


def test_the_printed_numbers() -> None:
    # every number of the three tables, as they were typed from arXiv 2308.14711
    sums = {
        name: sum(
            sum(map(sum, of.values())) for data in table.values() if isinstance(data, dict) for of in data.values()
        )
        for name, table in rows.PRINTED.items()
    }
    assert sums == pytest.approx({"table1": 10843.3, "table2": 29836.2, "table3": 575.8})
    assert rows.layers("table1") == ["FF", "FFF"]
    assert rows.layers("table2") == ["FF", "NoisyTopKMoE", "FFF"]
    narrow = trial(0, "FFF", [], training_width=64, leaf_width=1, depth=6)
    assert rows.printed(table(), narrow) == {"M_A": 79.9, "G_A": 79.5}
    assert rows.printed(table(), trial(0, "FF", [], training_width=143)) == {}
    of = {"table": "table2", "data": "cifar10"}
    moe = trial(0, "NoisyTopKMoE", [], training_width=64, leaf_width=16)
    assert rows.printed(table(**of), moe) == {"M_A": 57.8, "ETT_M": 5354, "G_A": 29.4, "ETT_G": 4880}
    assert rows.printed(table(**of | {"data": "fashion_mnist"}), moe) == {}


def test_table_3_was_printed_of_four_blocks() -> None:
    dense = trial(0, "FF", [], training_width=128)
    of = {"table": "table3", "data": "cifar10"}
    assert rows.printed(table(**of, blocks=4), dense) == {"G_A": 84.7}
    assert rows.printed(table(**of, blocks=1), dense) == {}


def test_statistics_of_a_point() -> None:
    values = [86.0, 87.0, 88.0, 89.0]
    found = row(values)
    assert found["mean"] == pytest.approx(87.5)
    assert (found["best"], found["worst"], found["n"]) == (pytest.approx(89), pytest.approx(86), 4)
    logits = [math.log(value / (100 - value)) for value in values]
    low, high = stats.t.interval(0.95, 3, loc=sum(logits) / 4, scale=stats.sem(logits))
    assert found["ci95"] == pytest.approx((100 / (1 + math.exp(-low)), 100 / (1 + math.exp(-high))))
    assert found["diverged"] == 1
    assert found["collapsed"] == 2, "fewer than half of 16 leaves in use: 7 and 1"
    assert {"layer", "training_width", "leaf_width", "depth", "paper", "std", "values", "used_leaves"} <= found.keys()


def test_epochs_are_those_of_the_best_run() -> None:
    dense = trial(0, "FF", [86.0, 89.0, 10.0], training_width=16)
    for run, epochs in zip(dense.runs, (40, 90, 1), strict=True):
        run["epochs_to_best"] = epochs
    (found,) = (each for each in rows.cells(table(dense)) if each["metric"] == "ETT_G")
    assert (found["best"], found["worst"]) == (90, 1), "a run that learns nothing has not trained fast"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([87.0, 87.2, 87.4], "better"),
        ([85.0, 86.0, 86.5], "reproduced"),
        ([80.0, 80.2, 80.4], "not reproduced"),
        ([85.0, 85.9, 86.0], "inconclusive"),
        ([86.0], ""),
    ],
)
def test_verdicts(values: list[float], verdict: str) -> None:
    assert rows.verdict(row(values)) == verdict, "86.1 is printed"


def test_a_train_accuracy_may_still_rise() -> None:
    found = tree([80.0, 80.2, 80.4])
    for run in found.runs:
        run["epochs_to_fit"] = 10
    assert [rows.verdict(each) for each in rows.cells(table(found))][:2] == ["not reproduced", "still rising"]


def test_points_above_the_paper_are_counted() -> None:
    points = [
        trial(0, "FFF", [88.0, 88.2, 88.4], training_width=128, leaf_width=8, depth=4),
        trial(1, "FFF", [84.0, 84.9, 86.0], training_width=64, leaf_width=8, depth=3),
    ]
    found = table(*points)
    p = [
        stats.ttest_1samp([run["test/accuracy"] * 100 for run in each.runs], printed, alternative="greater").pvalue
        for each, printed in zip(points, (86.1, 85.2), strict=True)
    ]
    text = rows.above_paper(found, points)
    assert "in 1 of 2 rows" in text
    assert text.endswith(f"{max(stats.false_discovery_control(p)):.1e}")
    assert rows.above_paper(found, [trial(2, "FF", [80.0, 81.0], training_width=64)]) == ""


def test_the_widest_come_first_and_wide_leaves_before_narrow_ones() -> None:
    found = table(
        trial(0, "FF", [80.0], training_width=16),
        trial(1, "FFF", [80.0], training_width=16, leaf_width=1, depth=4),
        trial(2, "FFF", [80.0], training_width=16, leaf_width=8, depth=1),
        trial(3, "FF", [80.0], training_width=64),
        trial(4, "FFF", [], training_width=64, leaf_width=8, depth=3),
    )
    assert [each.number for each in rows.ordered(found)] == [3, 0, 2, 1]


def test_the_text_has_what_the_row_has() -> None:
    found: Results = table(tree([86.0, 88.5]))
    text = rows.report(found, rows.METRICS[0], found.trials)
    title, header, line = text.splitlines()
    assert title == "test accuracy"
    values = dict(
        zip(header.replace("95% interval", "interval").split(), line.replace(", ", ",").split(), strict=False)
    )
    assert values["paper"] == "86.1"
    assert (values["best"], values["diff"], values["mean"], values["worst"]) == ("88.50", "+2.40", "87.25", "86.00")
    assert values["used"] == "8-16"
    assert rows.report(found, rows.METRICS[0], []) == ""

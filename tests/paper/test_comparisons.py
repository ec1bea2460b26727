"""Trees and mixtures beside dense layers and beside each other."""

import numpy as np
import pytest
from points import table, trial
from scipy import stats

from fffexp.paper import comparisons, rows
from fffexp.paper.comparisons import equal_in_time
from fffexp.statistics import paired_spread

TREE = {"training_width": 128, "leaf_width": 8, "depth": 4}


def test_equal_in_time_is_the_widest_that_is_hardly_slower() -> None:
    assert equal_in_time({2: 0.5, 4: 1.2, 8: 1.15, 16: 1.3}) == 8
    assert equal_in_time({2: 1.5, 4: 1.6}) == 2


def test_equal_in_parameters_is_within_half_a_neuron() -> None:
    sizes = {n: {"training_width": n, "inference_size": n, "parameters": 795 * n + 10} for n in (128, 143, 150)}
    tree = {"training_width": 128, "inference_size": 12, "parameters": 113_695}  # of 15 nodes and 16 leaves of 8
    assert comparisons.equal(tree, sizes) == {"width": 128, "parameters": 143}
    del sizes[143]
    assert comparisons.equal(tree, sizes) == {"width": 128}


def test_comparisons_with_controls_are_paired() -> None:
    ours, ahead, behind, like = [88.0, 87.0, 88.5], [89.0, 88.1, 89.4], [86.0, 85.0, 86.6], [88.0, 87.5, 88.0]
    record = {"layer": "FFF", "training_width": 128, "leaf_width": 8, "time_ratios": {"12": 0.8, "24": 0.9, "64": 1.1}}
    found = table(
        trial(0, "FFF", ours, **TREE),
        trial(1, "FF", ahead, training_width=128),
        trial(2, "FF", behind, training_width=12),
        trial(3, "FF", like, training_width=24),
        controls=[record],
    )
    made = {kind: c for c in comparisons.trees(found) for kind in c.kinds}
    assert {kind: c.control.number for kind, c in made.items()} == {
        "width": 1,
        "inference size": 2,
        "inference time": 3,
    }
    assert made["inference time"].time_ratio == 0.9, "FF of 64 was not trained"
    assert made["width"].test.difference == pytest.approx(-0.01)
    ps = [stats.ttest_rel(ours, theirs).pvalue for theirs in (ahead, like, behind)]
    assert [c.test.p for c in comparisons.trees(found)] == pytest.approx(list(stats.false_discovery_control(ps)))
    text = comparisons.SECTIONS["controls"](found, found.trials)
    assert text.count("not significant") == sum(p > 0.05 for p in stats.false_discovery_control(ps))
    assert comparisons.SECTIONS["controls"](found, found.trials[1:]) == "", "only what is wanted"


def test_a_control_of_two_kinds_is_tested_once() -> None:
    record = {"layer": "FFF", "training_width": 128, "leaf_width": 8, "time_ratios": {"12": 1.0}}
    points = trial(0, "FFF", [88.0, 87.0], **TREE), trial(1, "FF", [87.0, 86.5], training_width=12)
    (only,) = comparisons.trees(table(*points, controls=[record]))
    assert only.kinds == ["inference size", "inference time"]


def test_mixtures_are_compared_with_dense_layers_of_no_more_neurons() -> None:
    ours, dense, narrow = [88.0, 87.0, 88.5], [89.0, 88.1, 89.4], [86.0, 85.0, 86.6]
    found = table(
        trial(0, "MoE", ours, training_width=128, leaf_width=8),  # 2 * 8 and a gate of 16: 32 neurons
        trial(1, "FFF", ours, **TREE),
        trial(2, "FF", narrow, training_width=33),
        trial(3, "FF", dense, training_width=32),
        trial(4, "FF", narrow, training_width=16),
    )
    (made,) = comparisons.mixtures(found)
    assert (made.trial.number, made.control.number) == (0, 3)
    assert made.test.difference == pytest.approx(-0.01)
    assert made.test.p == pytest.approx(stats.ttest_rel(ours, dense).pvalue)


def test_stability() -> None:
    a, b = [88.0, 88.1, 87.9, 88.0, 88.05, 87.95], [80.0, 88.0, 70.0, 89.0, 84.0, 60.0]
    steady = trial(0, "FFF", a, **TREE)
    wild = trial(1, "MoE", b, training_width=128, leaf_width=8)
    for run in wild.runs:
        run["stability/val_monitor_std"] = 0.02
    wild.runs[0]["routing/used_leaves"] = 7
    assert rows.measures(wild)["collapsed"] == 1
    measures = rows.measures(steady)
    assert measures["std"] == pytest.approx(np.std(a, ddof=1))
    assert measures["mean - worst"] == pytest.approx(0.1)
    assert measures["epochs std"] == pytest.approx(np.std(range(6), ddof=1))
    tests = {t.measure: t for t in comparisons.rivals(table(steady, wild))}
    # the late std differs the same way in all six, spikes and dead leaves in none
    ps = {"test accuracy": stats.ttest_rel(a, b).pvalue, "std of test accuracy": paired_spread(a, b)}
    ps |= {"late std": 2 / 2**6, "spikes": 1.0, "dead": 1.0}
    expected = dict(zip(ps, stats.false_discovery_control(list(ps.values())), strict=True))
    assert {name: test.p for name, test in tests.items()} == pytest.approx(expected)
    assert tests["test accuracy"].means[0] > tests["test accuracy"].means[1]
    assert tests["std of test accuracy"].means[0] < tests["std of test accuracy"].means[1]


def test_runs_that_never_vary_do_not_differ_significantly() -> None:
    points = [trial(0, "FFF", [88.0] * 3, **TREE), trial(1, "MoE", [88.0] * 3, training_width=128, leaf_width=8)]
    assert [t.p for t in comparisons.rivals(table(*points))] == [1] * 5


def test_what_is_kept_in_a_vision_transformer() -> None:
    dense = trial(0, "FF", [90.0, 92.0], training_width=128)
    nothing = trial(1, "none", [80.0, 82.0], training_width=0)
    tree = trial(2, "FFF", [89.0, 90.0], **TREE)
    found = table(dense, nothing, tree, table="table3", blocks=1)
    kept, recovered = comparisons.shares(found, tree, dense, nothing)
    share, (low, high) = recovered or (0, (0, 0))
    assert share == pytest.approx((9 + 8) / (10 + 10))
    assert low < share < high
    assert kept
    assert kept[0] == pytest.approx((89 + 90) / (90 + 92))
    assert [each and each[0] for each in comparisons.shares(found, dense, dense, nothing)] == [1, 1]
    for each in (dense, nothing, tree):
        for run in each.runs:
            run["test/accuracy"] = 0.9
    assert comparisons.shares(table(dense, nothing, tree), tree, dense, nothing)[1] is None, "no gap to recover"


def test_trees_of_a_vision_transformer_are_compared_with_their_controls() -> None:
    a, same_size, none = [89.0, 90.0, 91.0], [88.0, 89.5, 90.0], [80.0, 82.0]
    other = trial(4, "FF", [90.0], training_width=8)
    other.runs[0]["seed"] = 7  # none in common
    found = table(
        trial(0, "FFF", a, **TREE),
        trial(1, "FF", same_size, training_width=12),
        trial(2, "none", none, training_width=0),
        trial(3, "FF", [90.0, 90.0, 90.0], training_width=128),
        other,
    )
    compared = {c.control.number: c.test for c in comparisons.in_transformer(found)}
    assert {number: test.seeds for number, test in compared.items()} == {1: 3, 2: 2}
    alone = [stats.ttest_rel(a, same_size).pvalue, stats.ttest_rel(a[:2], none).pvalue]
    assert [compared[number].p for number in (1, 2)] == pytest.approx(list(stats.false_discovery_control(alone)))

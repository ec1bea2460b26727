"""How evenly layers train, across seeds and within a run; and FFF against mixtures of experts, accuracy too."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats

from fffexp.paper import runs
from fffexp.paper.cells import Cell, Layer
from fffexp.statistics import adjusted, paired_p

RIVALS: tuple[Layer, ...] = ("NoisyTopKMoE", "SwitchMoE")
WITHIN: dict[str, Callable[[Mapping[str, Any]], Any]] = {  # None where a layer has no such thing
    "late std": lambda run: 100 * run["val_accuracy_std"],
    "spikes": lambda run: run["loss_spikes"] / run["epochs"],  # some recipes have more epochs than others
    "nonfinite": lambda run: run["nonfinite_steps"],
    "dead": lambda run: run["dead_blocks"],
}
COMPARED = ("late std", "spikes", "dead")


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a cell: measures across seeds, and means over seeds of those within a run."""
    rows = []
    for cell in runs.cells(found):
        of_cell = runs.of(found, cell)
        if len(of_cell) < 2:
            continue
        accuracies = [100 * run["test_accuracy"] for run in of_cell]
        row = {
            **cell.describe(),
            "std": statistics.stdev(accuracies),
            "mean - worst": statistics.mean(accuracies) - min(accuracies),
            "collapsed": runs.collapsed(of_cell),
            "ETT_G": statistics.mean(run["epochs_to_best"] for run in of_cell),
            "ETT_G std": statistics.stdev(run["epochs_to_best"] for run in of_cell),
        }
        for name, measure in WITHIN.items():
            values = [value for run in of_cell if (value := measure(run)) is not None]
            row[name] = statistics.mean(values) if values else None
        rows.append(row)
    return rows


def tests(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Is FFF more accurate, and does it train more evenly, than a MoE of the same training and block width?

    Accuracy by a paired t-test; evenness across seeds by Brown and Forsythe's test of equal variance, within runs by
    Wilcoxon's of paired measures; p adjusted for all by Benjamini and Hochberg.
    """
    made = []
    present = set(runs.cells(found))
    for cell in runs.cells(found):
        if cell.layer != "FFF" or cell.reduction is not None:
            continue
        for other in RIVALS:
            rival = Cell(other, cell.training_width, cell.leaf_width)
            if rival not in present:
                continue
            ours, theirs = ({run["seed"]: run for run in runs.of(found, each)} for each in (cell, rival))
            seeds = sorted(ours.keys() & theirs.keys())
            if len(seeds) < 3:
                continue
            a, b = ([100 * of[seed]["test_accuracy"] for seed in seeds] for of in (ours, theirs))
            p = paired_p([x - y for x, y in zip(a, b, strict=True)])
            made.append(_test(cell, other, "test accuracy", statistics.mean, a, b, p))
            varies = max(statistics.stdev(a), statistics.stdev(b)) > 0
            p = stats.levene(a, b).pvalue if varies else 1.0
            made.append(_test(cell, other, "std of test accuracy", statistics.stdev, a, b, p))
            for name in COMPARED:
                a, b = ([WITHIN[name](of[seed]) for seed in seeds] for of in (ours, theirs))
                p = 1.0 if a == b else stats.wilcoxon(a, b).pvalue
                made.append(_test(cell, other, name, statistics.mean, a, b, p))
    for each, p in zip(made, adjusted([each["p"] for each in made]), strict=True):
        each["p"] = p
    return made


def _test(
    cell: Cell, other: str, measure: str, of: Any, a: Sequence[float], b: Sequence[float], p: float
) -> dict[str, Any]:
    return {**cell.describe(), "other": other, "measure": measure, "FFF": of(a), "rival": of(b), "p": float(p)}


def report(found: Mapping[str, Any]) -> str:
    """Both tables; "" where nothing was trained with several seeds."""
    rows = table(found)
    if not rows:
        return ""
    head = f"{'layer':13}{'w':>5}{'leaf':>5}{'reading':>8}{'std':>7}{'mean-worst':>11}{'collapsed':>10}"
    lines = ["stability", head + f"{'ETT_G':>8}{'std':>6}" + "".join(f"{name:>10}" for name in WITHIN)]
    for r in rows:
        start = f"{r['layer']:13}{r['training_width']:5}{r['leaf_width'] or '':>5}{r['reduction'] or '':>8}"
        across = f"{r['std']:7.2f}{r['mean - worst']:11.2f}{r['collapsed']:10}{r['ETT_G']:8.1f}{r['ETT_G std']:6.1f}"
        lines.append(start + across + "".join(f"{'' if r[n] is None else format(r[n], '.2f'):>10}" for n in WITHIN))
    lines.append(
        "std, worst: test accuracy over seeds in points; late std: of validation accuracy over the last quarter of\n"
        "the epochs; spikes: steps an epoch; nonfinite: steps; dead: leaves or experts that no training sample\n"
        "reaches; means over seeds. ETT_G and late std depend on the recipe's epochs as well."
    )
    compared = tests(found)
    if compared:
        lines += ["", f"{'w':>5}{'leaf':>5}  {'FFF against':14}{'measure':22}{'FFF':>9}{'rival':>9}{'p':>10}"]
    for t in compared:
        start = f"{t['training_width']:5}{t['leaf_width']:5}  {t['other']:14}{t['measure']:22}"
        lines.append(f"{start}{t['FFF']:9.2f}{t['rival']:9.2f}{t['p']:10.1e}")
    if compared:
        lines.append(
            "p: paired t-test (test accuracy), Brown and Forsythe's test of equal variance (std), Wilcoxon's signed\n"
            "rank test, paired (others); adjusted for all lines by Benjamini and Hochberg."
        )
    return "\n".join(lines)

"""How evenly layers train, across seeds and within a run; and trees against mixtures of experts, accuracy too."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from scipy import stats

from fffexp.paper.rows import collapsed, is_tree, leaf_width, note, ordered, point, width
from fffexp.report.tables import table
from fffexp.statistics import adjusted, paired_p, paired_spread
from fffexp.study.results import Results, Trial

# None where a layer has no such thing
WITHIN: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "late std": lambda run: 100 * run["stability/val_monitor_std"],
    "spikes": lambda run: run["stability/loss_spikes"] / run["epochs"],  # some recipes have more epochs than others
    "nonfinite": lambda run: run["stability/nonfinite_steps"],
    "dead": lambda run: run.get("stability/dead_leaves"),
}
FORMATS = dict.fromkeys(("std", "mean - worst", *WITHIN), ".2f") | dict.fromkeys(("epochs", "epochs std"), ".1f")
COMPARED = ("late std", "spikes", "dead")


def measures(trial: Trial) -> dict[str, Any]:
    """Across seeds, and means over seeds of those within a run."""
    accuracies = [100 * run["test/accuracy"] for run in trial.runs]
    epochs = [run["epochs_to_best"] for run in trial.runs]
    found: dict[str, Any] = {
        "std": statistics.stdev(accuracies),
        "mean - worst": statistics.mean(accuracies) - min(accuracies),
        "collapsed": collapsed(trial),
        "epochs": statistics.mean(epochs),
        "epochs std": statistics.stdev(epochs),
    }
    for name, measure in WITHIN.items():
        values = [value for run in trial.runs if (value := measure(run)) is not None]
        found[name] = statistics.mean(values) if values else None
    return found


def tests(results: Results) -> list[dict[str, Any]]:
    """Is a tree more accurate, and does it train more evenly, than a mixture of the same training and leaf width?

    Accuracy by a paired t-test; evenness across seeds by Pitman and Morgan's test of equal variances of paired samples,
    within runs by Wilcoxon's of paired measures; p adjusted for all by Benjamini and Hochberg.
    """
    made: list[dict[str, Any]] = []
    trials = ordered(results)
    for tree in trials:
        for rival in trials:
            same = (width(tree), leaf_width(tree)) == (width(rival), leaf_width(rival))
            if not is_tree(tree) or "reduction" in tree.params or is_tree(rival) or not same:
                continue
            ours, theirs = ({run["seed"]: run for run in each.runs} for each in (tree, rival))
            seeds = sorted(ours.keys() & theirs.keys())
            if len(seeds) < 3:
                continue
            a, b = ([100 * of[seed]["test/accuracy"] for seed in seeds] for of in (ours, theirs))
            pair = {"tree": tree, "rival": rival}
            p = paired_p([x - y for x, y in zip(a, b, strict=True)])
            made.append({**pair, "measure": "test accuracy", "means": (statistics.mean(a), statistics.mean(b)), "p": p})
            spread = (statistics.stdev(a), statistics.stdev(b))
            made.append({**pair, "measure": "std of test accuracy", "means": spread, "p": paired_spread(a, b)})
            for name in COMPARED:
                a, b = ([WITHIN[name](of[seed]) or 0.0 for seed in seeds] for of in (ours, theirs))
                p = 1.0 if a == b else float(stats.wilcoxon(a, b).pvalue)
                made.append({**pair, "measure": name, "means": (statistics.mean(a), statistics.mean(b)), "p": p})
    for each, p in zip(made, adjusted([each["p"] for each in made]), strict=True):
        each["p"] = p
    return made


def report(_: Results, shown: Iterable[Trial]) -> str:
    """The measures; "" where nothing was trained with several seeds."""
    lines = []
    for trial in shown:
        if len(trial.runs) < 2:
            continue
        lines.append(point(trial) | measures(trial))
    if not lines:
        return ""
    return f"stability\n{table(lines, FORMATS)}\n" + note(
        "std, mean - worst: test accuracy over seeds in points; epochs: to the best validation accuracy; late "
        "std: of validation accuracy over the last quarter of the epochs; spikes: steps an epoch; nonfinite: "
        "steps; dead: leaves or experts that no training sample reaches; means over seeds. epochs and late "
        "std depend on the recipe as well."
    )


def report_rivals(results: Results, shown: Iterable[Trial]) -> str:
    """The tests; "" without any."""
    numbers = {trial.number for trial in shown}
    lines = [
        {
            "w": width(t["tree"]),
            "leaf": leaf_width(t["tree"]),
            "tree": t["tree"].layer,
            "rival": t["rival"].layer,
            "measure": t["measure"],
            "tree's": t["means"][0],
            "rival's": t["means"][1],
            "p": t["p"],
        }
        for t in tests(results)
        if {t["tree"].number, t["rival"].number} <= numbers
    ]
    if not lines:
        return ""
    formats = {"tree's": ".2f", "rival's": ".2f", "p": ".1e"}
    return f"trees beside mixtures\n{table(lines, formats)}\n" + note(
        "p: paired t-test (test accuracy), Pitman and Morgan's test of equal variances of paired samples "
        "(std), Wilcoxon's signed rank test, paired (others); adjusted for all comparisons of the file by "
        "Benjamini and Hochberg."
    )

"""Layers beside dense ones that a sceptic would hold against them: of equal width, parameters, size or time.

For a vision transformer (arXiv 2308.14711, section 4.4) also what a layer keeps of the dense layer's accuracy, and
recovers of the gap between none and that.
"""

import itertools
import statistics
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from scipy import stats

from fffexp.paper import rows
from fffexp.statistics import Interval, adjusted, format_difference, p_of_mean, paired_spread, paired_tests, ratio
from fffexp.study.results import Results, Trial

BATCH_SIZE = 256  # of what is timed
TOLERANCE = 1.15  # times that are equal: medians of layers this small differ by a tenth from run to run
KINDS = ("width", "parameters", "inference size", "inference time")
Share = tuple[float, Interval] | None

# Test accuracy of a trial minus that of its control, paired by seed, the test adjusted for all that were made together;
# in what they are equal; time of the control over that of the trial, None where it is not why they are compared
Comparison = namedtuple("Comparison", "trial control test kinds time_ratio", defaults=((), None))


def compare(results: Results, pairs: Iterable[tuple[Any, ...]]) -> list[Comparison]:
    """All pairs with a seed in common; a pair is trial and control, and may have kinds and a time ratio."""
    accuracies = {trial.number: trial.by_seed(results.test_monitor) for trial in results.trials}
    sampled = [(pair, tuple(accuracies[trial.number] for trial in pair[:2])) for pair in pairs]
    shared = [(pair, (a, b)) for pair, (a, b) in sampled if a.keys() & b.keys()]
    tests = paired_tests([samples for _, samples in shared])
    return [Comparison(pair[0], pair[1], test, *pair[2:]) for (pair, _), test in zip(shared, tests, strict=True)]


def equal(tree: Mapping[str, Any], sizes: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """Width of the dense layer that equals a tree in each respect, by their sizes, those of dense ones by width."""
    keys = {"width": "training_width", "inference size": "inference_size"}
    found = {kind: of for kind, key in keys.items() for of, each in sizes.items() if each[key] == tree[key]}
    apart = {of: abs(each["parameters"] - tree["parameters"]) for of, each in sizes.items()}
    nearest = min(apart, key=lambda of: apart[of], default=0)
    if nearest and apart[nearest] <= sizes[nearest]["parameters"] / nearest / 2:  # within half a neuron
        found["parameters"] = nearest
    return found


def equal_in_time(time_ratios: Mapping[int, float]) -> int:
    """The widest at no more than TOLERANCE, of ratios to the tree's time by width; the narrowest without one."""
    return max((width for width, ratio in time_ratios.items() if ratio <= TOLERANCE), default=min(time_ratios))


def trees(results: Results) -> list[Comparison]:
    """Each tree and each of its controls; a control of two kinds is tested once."""
    trials, pairs = rows.ordered(results), []
    dense = {rows.width(trial): trial for trial in trials if rows.is_dense(trial)}
    times = {rows.point_of(record): record["time_ratios"] for record in results.extra.get("controls", [])}
    for tree in (trial for trial in trials if "depth" in trial.params):
        widths = equal(tree.sizes or {}, {of: trial.sizes or {} for of, trial in dense.items()})
        timed = times.get(rows.point_of(rows.describe(tree)), {})
        if ratios := {int(of): ratio for of, ratio in timed.items() if int(of) in dense}:
            widths["inference time"] = equal_in_time(ratios)
        for of in sorted({*widths.values()}, reverse=True):
            kinds = [kind for kind in KINDS if widths.get(kind) == of]
            pairs.append((tree, dense[of], kinds, ratios[of] if "inference time" in kinds else None))
    return compare(results, pairs)


def mixtures(results: Results) -> list[Comparison]:
    """Each mixture of experts, and the widest dense layer of the table that evaluates no more neurons."""
    trials = rows.ordered(results)
    mixed = [trial for trial in trials if "leaf_width" in trial.params and "depth" not in trial.params]
    dense = [(trial, [t for t in trials if rows.is_dense(t) and rows.width(t) <= rows.size(trial)]) for trial in mixed]
    return compare(results, [(trial, max(fitting, key=rows.width)) for trial, fitting in dense if fitting])


def in_transformer(results: Results) -> list[Comparison]:
    """Each tree and dense layers of its inference size and of the width of its leaves, and none."""
    trials, pairs = rows.ordered(results), []
    dense = list(filter(rows.is_dense, trials))
    for tree in (trial for trial in trials if "depth" in trial.params):
        of_size = [t for t in dense if rows.size(t) == rows.size(tree)]
        of_leaf = [t for t in dense if rows.width(t) == tree.params["leaf_width"] and t not in of_size]
        pairs += [(tree, t) for t in (*of_size, *of_leaf, *(t for t in trials if not rows.width(t)))]
    return [comparison for comparison in compare(results, pairs) if comparison.test.seeds > 1]


def dense_of(results: Results) -> Trial | None:
    """The widest dense layer, the baseline in a vision transformer."""
    return max(filter(rows.is_dense, results.trials), key=rows.width, default=None)


def shares(results: Results, trial: Trial, dense: Trial, nothing: Trial) -> tuple[Share, Share]:
    """Accuracy over the dense layer's, and recovered share of the gap between nothing and it, paired by seed."""
    a, b, c = (each.by_seed(results.test_monitor) for each in (trial, dense, nothing))
    seeds = sorted(a.keys() & b.keys() & c.keys())
    of_dense = ratio([a[seed] for seed in seeds], [b[seed] for seed in seeds])
    return of_dense, ratio([a[seed] - c[seed] for seed in seeds], [b[seed] - c[seed] for seed in seeds])


def percent(share: Share) -> str | None:
    """A share and its interval as text."""
    return share and f"{100 * share[0]:.1f} {rows.bounds(share[1], 1, 100)}"


def in_words(c: Comparison) -> dict[str, Any]:
    """A comparison as a row of text."""
    return {"tree": rows.name(c.trial), "control": rows.name(c.control), "difference": format_difference(c.test, 100)}


def _kept(results: Results, shown: Iterable[Trial]) -> str:
    nothing, dense = next((trial for trial in results.trials if not rows.width(trial)), None), dense_of(results)
    if nothing is None or dense is None:
        return ""
    speeds = {rows.point_of(speed): speed for speed in results.extra.get("speeds", [])}
    lines = []
    for trial in (trial for trial in shown if trial.runs):
        speed = speeds.get(rows.point_of(rows.describe(trial)), {})
        of_dense, recovered = map(percent, shares(results, trial, dense, nothing))
        width, size = (100 * rows.size(trial, k) / rows.size(dense, k) for k in ("inference_width", "inference_size"))
        lines.append(
            {"layer": trial.layer, "w": rows.width(trial), "leaf": trial.params.get("leaf_width"), "width, %": width}
            | {"size, %": size, "of dense, %": of_dense, "recovered, %": recovered}
            | {f"{part} x": speed.get(f"{part}_speedup") for part in ("layer", "model")}
        )
    return rows.section(
        "accuracy kept",
        lines,
        {"width, %": ".1f", "size, %": ".1f", "layer x": ".2f", "model x": ".2f"},
        f"width, size: neurons at inference over the {rows.width(dense)} of the dense layer, without and with those "
        "that route. of dense: accuracy over that of the dense layer; recovered: share of the gap between no "
        "feedforward layers and it, empty where there is none to speak of; 95% intervals by Fieller, paired "
        f"by seed. layer x, model x: speedup over the dense layer, of a layer on the tokens of {BATCH_SIZE} "
        f"images and of the model ({results.extra['blocks']} blocks, the last with one row an image), one "
        "thread.",
    )


def _accuracy(run: Mapping[str, Any]) -> float:
    return 100 * run["test/accuracy"]


def _ranks(a: Sequence[float], b: Sequence[float]) -> float:
    return 1.0 if a == b else float(stats.wilcoxon(a, b).pvalue)


Rival = namedtuple("Rival", "trial rival measure means p")
# what is compared: of a run, over the seeds, and by which paired test
COMPARED: dict[str, tuple[Callable[..., float | None], Callable[..., float], Callable[..., float]]] = {
    "test accuracy": (_accuracy, statistics.mean, lambda a, b: p_of_mean(np.subtract(a, b).tolist())),
    "std of test accuracy": (_accuracy, statistics.stdev, paired_spread),
    **{name: (rows.WITHIN[name], statistics.mean, _ranks) for name in ("late std", "spikes", "dead")},
}


def rivals(results: Results) -> list[Rival]:
    """Is a tree more accurate, and does it train more evenly, than a mixture of the same training and leaf width?

    Accuracy by a paired t-test; evenness across seeds by Pitman and Morgan's test of equal variances of paired samples,
    within runs by Wilcoxon's of paired measures; p adjusted for all by Benjamini and Hochberg.
    """
    made: list[Rival] = []
    for tree, rival in itertools.product(rows.ordered(results), repeat=2):
        same = all(tree.params.get(key) == rival.params.get(key) for key in ("training_width", "leaf_width"))
        same &= "depth" in tree.params.keys() - rival.params.keys() and "reduction" not in tree.params
        runs = [{run["seed"]: run for run in each.runs} for each in (tree, rival)]
        seeds = sorted(runs[0].keys() & runs[1].keys())
        for measure, (value, over, p) in COMPARED.items() if same and len(seeds) > 2 else ():
            a, b = ([value(of[seed]) or 0.0 for seed in seeds] for of in runs)
            made.append(Rival(tree, rival, measure, (over(a), over(b)), p(a, b)))
    return [each._replace(p=p) for each, p in zip(made, adjusted([each.p for each in made]), strict=True)]


def _section(
    title: str,
    found: Callable[[Results], Iterable[Any]],
    row: Callable[[Any], rows.Row],
    text: str,
    formats: Mapping[str, str] | None = None,
    other: Callable[[Any], Trial] | None = None,
) -> rows.Section:
    # a table of what is found of the trials that are shown, where `other` is given with another that is shown too
    def report(results: Results, shown: Iterable[Trial]) -> str:
        numbers = {trial.number for trial in shown}
        mine = [c for c in found(results) if c.trial.number in numbers]
        mine = [c for c in mine if other is None or other(c).number in numbers]
        return rows.section(title, [*map(row, mine)], formats, text)

    return report


_TREES = _section(
    "controls",
    trees,
    lambda c: (
        rows.point(c.trial)
        | {"dense layer of equal": ", ".join(c.kinds), "its width": rows.width(c.control), "its time": c.time_ratio}
        | {"difference": format_difference(c.test, 100)}
    ),
    "Test accuracy in points, tree minus dense layer, paired by seed; 95% interval; p of a paired t-test, "
    "adjusted for all comparisons of the file by Benjamini and Hochberg. its time: of the widest dense "
    f"layer that takes no more than {TOLERANCE} of the tree's time, over it, computed in the fastest of "
    f"its forms, batch {BATCH_SIZE}, one thread.",
    {"its time": ".2f"},
)
_TRANSFORMER = _section(
    "controls",
    in_transformer,
    lambda c: in_words(c) | {"n": c.test.seeds},
    "Test accuracy in points, tree minus control, paired by seed. p: paired t-test, adjusted for the file.",
    other=attrgetter("control"),
)
SECTIONS: dict[str, rows.Section] = {
    "kept": _kept,
    "controls": lambda results, shown: (_TRANSFORMER if "blocks" in results.extra else _TREES)(results, shown),
    "mixtures": _section(
        "mixtures beside dense layers",
        mixtures,
        lambda c: (
            rows.point(c.trial)
            | {"neurons": rows.size(c.trial), "dense width": rows.width(c.control)}
            | {"difference": format_difference(c.test, 100)}
        ),
        "Test accuracy in points, mixture minus dense layer, paired by seed; p adjusted for all mixtures of "
        "the file. neurons: evaluated for one sample, the gate's included; the dense layer is the widest here "
        "that evaluates no more.",
    ),
    "rivals": _section(
        "trees beside mixtures",
        rivals,
        lambda r: (
            {"w": rows.width(r.trial), "leaf": r.trial.params["leaf_width"], "tree": r.trial.layer}
            | {"rival": r.rival.layer, "measure": r.measure, "tree's": r.means[0], "rival's": r.means[1], "p": r.p}
        ),
        "p: paired t-test (test accuracy), Pitman and Morgan's test of equal variances of paired samples "
        "(std), Wilcoxon's signed rank test, paired (others); adjusted for all comparisons of the file by "
        "Benjamini and Hochberg.",
        {"tree's": ".2f", "rival's": ".2f", "p": ".1e"},
        attrgetter("rival"),
    ),
}

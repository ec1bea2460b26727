"""Results in words and tables."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fffexp.report.tables import COLUMNS, table
from fffexp.statistics import Interval, format_difference, paired_tests
from fffexp.study.results import Answer, Results, Trial, answer

DIFFERENCE = "difference to the best"


def label(trial: Trial) -> str:
    """Sizes of a trial's layer in a few characters: `d4 lw8`; without whole numbers, `#12`."""
    sizes = [initials(n) + str(v) for n, v in trial.params.items() if isinstance(v, int) and not isinstance(v, bool)]
    return " ".join(sizes) or f"#{trial.number}"


def initials(name: str) -> str:
    """`lw` of leaf_width."""
    return "".join(word[0] for word in name.split("_") if word)


def finalists(results: Results) -> str:
    """The finalists, fastest first, for a terminal of 120 columns."""
    trials = results.finalist_trials()
    if not trials:
        return f"study {results.study} has no finalists: no trial was completed"
    differences = to_best(results, trials)
    rows = [
        {
            "trial": f"{trial.number}{'*' if trial.number in results.pareto else ''}",
            "layer": trial.layer,
            "hyperparameters": describe(trial),
            title(results.monitor): value(trial.mean, trial.ci95, results.unit),
            title(results.test_monitor): value(trial.test_mean, trial.test_ci95, results.unit),
            "latency": latency(trial),
            DIFFERENCE: differences.get(trial.number, ""),
        }
        for trial in trials
    ]
    notes = [how_measured(results), "*: on the Pareto front of the search."]
    return "\n".join(
        [
            table(rows, width=COLUMNS, wrap=("hyperparameters", DIFFERENCE)),
            "",
            *(line for n in notes for line in textwrap.wrap(n, COLUMNS)),
        ]
    )


def listed(results: Results) -> str:
    """All trials of a study that only lists points."""
    rows = [
        {
            "trial": trial.number,
            "layer": trial.layer,
            "hyperparameters": describe(trial),
            title(results.monitor): value(trial.mean, trial.ci95, results.unit),
            title(results.test_monitor): value(trial.test_mean, trial.test_ci95, results.unit),
            "error": trial.error,
        }
        for trial in results.trials
    ]
    return table(rows, width=COLUMNS, wrap=("hyperparameters", "error"))


def to_best(results: Results, trials: Sequence[Trial]) -> dict[int, str]:
    """Paired difference of each to the best of them, in the monitored metric; p is adjusted for all together."""
    measured = [trial for trial in trials if trial.mean is not None]
    if not measured:
        return {}
    best = results.best_of(measured)
    others = [t for t in measured if t is not best and t.by_seed(results.monitor).keys() & {*best.seeds}]
    tests = paired_tests([(t.by_seed(results.monitor), best.by_seed(results.monitor)) for t in others])
    texts = {t.number: format_difference(test, results.scale) for t, test in zip(others, tests, strict=True)}
    return texts | {best.number: "best"}


def how_measured(results: Results) -> str:
    """A sentence on intervals, seeds and the test set."""
    counts = sorted({len(trial.seeds) for trial in results.finalist_trials() if trial.evaluation})
    if not counts:
        return "No finalist has been trained on fresh seeds yet."
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " fresh seed" + "s" * (counts != [1])
    scale = " on the logit scale" * results.unit
    return (
        f"Brackets: 95% t interval{scale} of the mean over {seeds}, unseen by the search (none for one seed). "
        "Differences: paired by seed, p of a t-test adjusted for all lines (Benjamini and Hochberg). "
        "The test set was read once a training, after selection on validation."
        + f" Latencies come from {results.machines} machines, and compare only within one."
        * (results.machines > 1)
    )


def show(results: Results, max_latency_ms: float | None = None) -> str:
    """Which layer to use within a latency budget, in a few lines.

    Raises:
        UserError: no finalist was retrained, or none fits the budget.
    """
    found = answer(results, max_latency_ms)
    best, rival = found.best, found.rival
    within = "with any latency" if max_latency_ms is None else f"within {max_latency_ms:g} ms"
    lines = [
        f"study {results.study}: best finalist {within}, by {title(results.monitor)} on fresh seeds",
        "",
        f"  {best.layer} (trial {best.number}): {describe(best)}",
        *measured(results, best),
    ]
    if best.run_id:
        lines.append(f"  MLflow run: {best.run_id} (its config.yaml reruns it)")
    if equal := not_worse(results, found):
        lines.append(f"  not significantly worse: {', '.join(f'{t.layer} (trial {t.number})' for t in equal)}")
    other = results.baseline if best.layer != results.baseline else "other layer"
    if rival is None:
        why = "was retrained" if max_latency_ms is None else f"fits {max_latency_ms:g} ms"
        return "\n".join([*lines, "", f"No {other} among the finalists {why}."])
    lines += [
        "",
        f"best {other} {within}: {rival.layer} (trial {rival.number}): {describe(rival)}",
        *measured(results, rival),
        "",
        verdict(results, found),
        "",
        how_measured(results),
    ]
    return "\n".join(line for long in lines for line in textwrap.wrap(long, COLUMNS, subsequent_indent="  ") or [""])


def measured(results: Results, trial: Trial) -> list[str]:
    """The metrics of a finalist, a line each."""
    return [
        f"  {title(results.test_monitor)}: {value(trial.test_mean, trial.test_ci95, results.unit)}",
        f"  {title(results.monitor)}: {value(trial.mean, trial.ci95, results.unit)}",
        f"  latency: {latency(trial)} for a batch of 256",
    ]


def not_worse(results: Results, found: Answer) -> list[Trial]:
    """Finalists within the budget that are not significantly worse than the best, by paired tests on validation."""
    texts = to_best(results, found.fitting)
    return [t for t in found.fitting if "not significant" in texts.get(t.number, "")]


def verdict(results: Results, found: Answer) -> str:
    """The paired difference of the best to its rival on the test set, in words."""
    if found.rival is None:
        return ""
    a, b, test = found.best.layer, found.rival.layer, found.test
    if test is None:
        return f"{a} and {b} share no seed: no difference can be given"
    seeds = f"{test.seeds} seed{'s' * (test.seeds != 1)}"
    text = (
        f"{title(results.test_monitor)}, {a} minus {b}, paired over {seeds}: {format_difference(test, results.scale)}"
    )
    return f"{text}: {a} is {'better' if results.sign * test.difference > 0 else 'worse'}" * test.significant or text


def title(metric: str) -> str:
    """`val accuracy` of val/accuracy."""
    return metric.replace("/", " ")


def describe(trial: Trial) -> str:
    """Hyperparameters: `depth=4 leaf_width=8 lr=0.0123`."""
    return settings({name: value for name, value in trial.params.items() if name != "layer"})


def settings(values: Mapping[str, Any]) -> str:
    """`depth=4 lr=0.0123`."""
    return " ".join(f"{n}={v:.3g}" if isinstance(v, float) else f"{n}={v}" for n, v in values.items())


def value(mean: float | None, interval: Interval | None = None, unit: bool = True) -> str:
    """`97.21% [96.80, 97.62]` of a share, `0.123 [0.119, 0.127]` of anything else, `-` of nothing."""
    if mean is None or not math.isfinite(mean):
        return "-"
    numbers = [f"{100 * x:.2f}" if unit else f"{x:.4g}" for x in (mean, *(interval or ()))]
    return numbers[0] + "%" * unit + (f" [{numbers[1]}, {numbers[2]}]" if interval else "")


def count(number: float | None) -> str:
    """`812`, `12.3k`, `1.23M`."""
    if number is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:g}"


def latency(trial: Trial) -> str:
    """Median latency of a batch of 256 with its unit."""
    return "-" if trial.latency_ms is None else f"{trial.latency_ms:#.3g} ms"

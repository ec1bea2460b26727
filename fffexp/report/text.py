"""Results in words and tables."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fffexp.errors import UserError
from fffexp.report.tables import COLUMNS, table
from fffexp.statistics import Interval, format_difference, paired_tests
from fffexp.study.results import Answer, Results, Trial, answer


def summary(results: Results) -> str:
    """The finalists, fastest first, or all trials where there is none, for a terminal of 120 columns."""
    finalists = results.finalist_trials()
    differences = to_best(results, finalists)
    rows = [
        {
            "trial": f"{trial.number}{'*' * (bool(finalists) and trial.number in results.pareto)}",
            "layer": trial.layer,
            "hyperparameters": textwrap.fill(
                settings(trial.params), 24, break_long_words=False, break_on_hyphens=False
            ),
            title(results.monitor): value(trial.mean, trial.ci95, results.unit),
            title(results.test_monitor): value(trial.test_mean, trial.test_ci95, results.unit),
            "latency": latency(trial) if finalists else None,
            "difference to the best": differences.get(trial.number),
            "error": trial.error,
        }
        for trial in finalists or results.trials
    ]
    text = table(rows, width=COLUMNS, wrap=("difference to the best", "error"))
    note = f"\n\n{textwrap.fill(how_measured(results), COLUMNS)}\n*: on the Pareto front of the search."
    return text + note * bool(finalists)


def to_best(results: Results, trials: Sequence[Trial]) -> dict[int, str]:
    """Paired difference of each to the best of them, in the monitored metric; p is adjusted for all together."""
    measured = [trial for trial in trials if trial.mean is not None]
    if not measured:
        return {}
    best = results.best_of(measured)
    values = {t.number: (t.by_seed(results.monitor), best.by_seed(results.monitor)) for t in measured if t is not best}
    return _differences(values, results.scale) | {best.number: "best"}


def _differences(values: Mapping[int, tuple[dict[int, float], dict[int, float]]], scale: float) -> dict[int, str]:
    shared = {number: (a, b) for number, (a, b) in values.items() if a.keys() & b.keys()}
    tests = paired_tests([*shared.values()])
    return {number: format_difference(test, scale) for number, test in zip(shared, tests, strict=True)}


def how_measured(results: Results) -> str:
    """A sentence on intervals, seeds and the test set."""
    counts = sorted({len(trial.seeds) for trial in results.finalist_trials() if trial.evaluation})
    if not counts:
        return "No finalist has been trained on fresh seeds yet."
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " fresh seed" + "s" * (counts != [1])
    return (
        f"Brackets: 95% t interval{' on the logit scale' * results.unit} of the mean over {seeds}, unseen by the "
        "search (none for one seed). "
        "Differences: paired by seed, p of a t-test adjusted for all lines (Benjamini and Hochberg). "
        "The test set was read once a training, after selection on validation. "
        "Latencies: ratio to a dense layer timed in turn, times that layer's median over the study."
        + f" Latencies come from {results.machines} machines, whose ratios may differ."
        * (results.machines > 1)
    )


def show(results: Results, max_latency_ms: float | None = None) -> str:
    """Which layer to use within a latency budget, in a few lines; UserError if no retrained finalist fits it."""
    found = answer(results, max_latency_ms)
    best, rival = found.best, found.rival
    within = "with any latency" if max_latency_ms is None else f"within {max_latency_ms:g} ms"
    other = results.baseline if best.layer != results.baseline else "other layer"
    texts = to_best(results, found.fitting)
    equal = [f"{t.layer} (trial {t.number})" for t in found.fitting if "not significant" in texts.get(t.number, "")]
    lines = [
        f"study {results.study}: best finalist {within}, by {title(results.monitor)} on fresh seeds",
        "",
        *_measured(results, best, "  "),
        *([f"  MLflow run: {best.run_id} (its config.yaml reruns it)"] if best.run_id else []),
        *([f"  not significantly worse: {', '.join(equal)}"] if equal else []),
        "",
    ]
    if rival is None:
        lines.append(f"No {other} is among the finalists {within}.")
    else:
        lines += _measured(results, rival, f"best {other} {within}: ")
        lines += ["", verdict(results, found), "", how_measured(results)]
    return "\n".join(line for long in lines for line in textwrap.wrap(long, COLUMNS, subsequent_indent="  ") or [""])


def _measured(results: Results, trial: Trial, heading: str) -> list[str]:
    return [
        f"{heading}{trial.layer} (trial {trial.number}): {settings(trial.params)}",
        f"  {title(results.test_monitor)}: {value(trial.test_mean, trial.test_ci95, results.unit)}",
        f"  {title(results.monitor)}: {value(trial.mean, trial.ci95, results.unit)}",
        f"  latency: {latency(trial)} for a batch of 256",
    ]


def verdict(results: Results, found: Answer) -> str:
    """The paired difference of the best to its rival on the test set, in words."""
    if found.rival is None:
        return ""
    a, b, test = found.best.layer, found.rival.layer, found.test
    if test is None:
        return f"{a} and {b} share no seed: no difference can be given"
    text = (
        f"{title(results.test_monitor)}, {a} minus {b}, paired over {test.seeds} seed{'s' * (test.seeds != 1)}: "
        f"{format_difference(test, results.scale)}"
    )
    return f"{text}: {a} is {'better' if results.sign * test.difference > 0 else 'worse'}" if test.significant else text


def trials(results: Results, baseline: int | None = None) -> str:
    """Every trial, the best first: its monitored metric, and the difference to the best of its layer or to a baseline.

    What all trials of a layer have in common is said once; with a baseline, trials of its layer say what differs.
    UserError if no trial has the number of the baseline and values by seed.
    """
    means = {t.number: mean for t in results.trials if (mean := results.selected_by(t)) is not None}
    done = sorted((t for t in results.trials if t.number in means), key=lambda t: -results.sign * means[t.number])
    layers = {layer: [t for t in done if t.layer == layer] for layer in dict.fromkeys(t.layer for t in done)}
    if baseline is None:
        others = {layer: own[0] for layer, own in layers.items()}
        common = {
            layer: {n: v for n, v in own[0].params.items() if all((n, v) in t.params.items() for t in own)}
            for layer, own in layers.items()
        }
    elif baseline in means:
        others = dict.fromkeys(layers, results.trial(baseline))
        common = {t.layer: t.params for t in others.values()}
    else:
        known = ", ".join(map(str, sorted(means))) or "none"
        raise UserError(f"--baseline {baseline}: no such trial with a {results.monitor}; there are {known}")
    seen = {t.number: t.by_seed(results.monitor, t.runs) for t in done}
    pairs = {n: (seen[n], seen[b.number]) for n, b in ((t.number, others[t.layer]) for t in done) if n != b.number}
    differences = _differences(pairs, results.scale)
    column = "difference to " + ("the best of its layer" if baseline is None else f"trial {baseline}")
    rows: list[dict[str, Any]] = [
        {
            "trial": t.number,
            "layer": t.layer,
            "hyperparameters": settings(t.params, common.get(t.layer)),
            title(results.monitor): results.scale * means[t.number],
            column: differences.get(t.number),
        }
        for t in done
    ]
    shared = {f"every {n}" if baseline is None else f"trial {baseline}": settings(p) for n, p in sorted(common.items())}
    note = (
        f"{'In percent, m' if results.unit else 'M'}ean over seeds {', '.join(map(str, results.seeds))}. "
        "Differences are paired by seed, brackets are 95% t intervals of one difference each; "
        "p: paired t-test, adjusted for all lines by Benjamini and Hochberg"
        f"{'; small by chance too, for the best is the best of these trials' if baseline is None else ''}."
    )
    lines = [
        *([table(rows, {title(results.monitor): ".2f" if results.unit else ".4g"})] if rows else []),
        *(f"{name}: {rest}" for name, rest in shared.items() if rest),
        *(
            f"trial {t.number} {t.layer} {settings(t.params)}: {t.error or t.state.lower()}, "
            f"started {t.attempts} time{'s' * (t.attempts != 1)}"
            for t in results.trials
            if t.number not in means
        ),
        "",
        textwrap.fill(note, COLUMNS),
    ]
    return "\n".join(lines)


def label(trial: Trial) -> str:
    """Sizes of a trial's layer in a few characters: `d4 lw8`; without whole numbers, `#12`."""
    sizes = {name: size for name, size in trial.params.items() if type(size) is int}
    return " ".join("".join(w[:1] for w in n.split("_")) + str(v) for n, v in sizes.items()) or f"#{trial.number}"


def title(metric: str) -> str:
    """`val accuracy` of val/accuracy."""
    return metric.replace("/", " ")


def settings(params: Mapping[str, Any], common: Mapping[str, Any] | None = None) -> str:
    """Hyperparameters, as `depth=4 lr=0.0123`, but for those in common; `-` for what only the others have."""
    others = common or {}
    names = [n for n in {**others, **params} if n not in params or (n, params[n]) not in others.items()]
    own = [(n, params.get(n, "-")) for n in names if n != "layer"]
    return " ".join(f"{n}={v:.3g}" if isinstance(v, float) else f"{n}={v}" for n, v in own)


def value(mean: float | None, interval: Interval | None = None, unit: bool = True) -> str:
    """`97.21% [96.80, 97.62]` of a share, `0.123 [0.119, 0.127]` of anything else, `-` of nothing."""
    if mean is None or not math.isfinite(mean):
        return "-"
    numbers = [f"{100 * x:.2f}" if unit else f"{x:.4g}" for x in (mean, *(interval or ()))]
    return numbers[0] + "%" * unit + (f" [{numbers[1]}, {numbers[2]}]" if interval else "")


def latency(trial: Trial) -> str:
    """Median latency of a batch of 256 with its unit."""
    return "-" if trial.latency_ms is None else f"{trial.latency_ms:#.3g} ms"

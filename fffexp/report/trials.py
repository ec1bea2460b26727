"""All trials of a study as a terminal shows them, each compared with another."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from fffexp.errors import UserError
from fffexp.report.tables import COLUMNS, table
from fffexp.report.text import settings, title
from fffexp.statistics import format_difference, paired_tests
from fffexp.study.results import Results, Trial


def trials(results: Results, baseline: int | None = None) -> str:
    """Every trial, the best first: its monitored metric, and the difference to the best of its layer.

    What all trials of a layer have in common is said once; with a baseline, trials of its layer say what differs.

    Args:
        results: of a study.
        baseline: number of the trial, of whatever layer, that the others are compared with instead.

    Raises:
        UserError: no such trial with values by seed.
    """
    means = {t.number: mean for t in results.trials if (mean := results.selected_by(t)) is not None}
    done = sorted((t for t in results.trials if t.number in means), key=lambda t: -results.sign * means[t.number])
    layers = dict.fromkeys(t.layer for t in done)
    if baseline is None:
        others = {t.layer: t for t in reversed(done)}
        common = {layer: _shared(t.params for t in done if t.layer == layer) for layer in layers}
    elif baseline not in means:
        known = ", ".join(map(str, sorted(means))) or "none"
        raise UserError(f"--baseline {baseline}: no such trial with a {results.monitor}; there are {known}")
    else:
        other = results.trial(baseline)
        others, common = dict.fromkeys(layers, other), {other.layer: other.params}
    against = {t.number: others[t.layer] for t in done}
    differences = _differences(results, done, against)
    column = "difference to " + ("the best of its layer" if baseline is None else f"trial {baseline}")
    rows: list[dict[str, Any]] = [
        {
            "trial": t.number,
            "layer": t.layer,
            "hyperparameters": _own(t.params, common.get(t.layer, {})),
            title(results.monitor): results.scale * means[t.number],
            column: differences.get(t.number),
        }
        for t in done
    ]
    lines = [table(rows, {title(results.monitor): ".2f" if results.unit else ".4g"})] if rows else []
    for layer, params in sorted(common.items()):
        if rest := _own(params, {}):
            lines.append(f"{f'every {layer}' if baseline is None else f'trial {baseline}'}: {rest}")
    for t in results.trials:
        if t.number not in means:
            started = f"started {t.attempts} time{'s' * (t.attempts != 1)}"
            lines.append(f"trial {t.number} {t.layer} {_own(t.params, {})}: {t.error or t.state.lower()}, {started}")
    note = (
        f"{'In percent, m' if results.unit else 'M'}ean over seeds {', '.join(map(str, results.seeds))}. "
        "Differences are paired by seed, brackets are 95% t intervals of one difference each; "
        "p: paired t-test, adjusted for all lines by Benjamini and Hochberg"
    )
    note += "; small by chance too, for the best is the best of these trials." if baseline is None else "."
    lines += ["", *textwrap.wrap(note, COLUMNS)]
    return "\n".join(lines)


def _by_seed(results: Results, trial: Trial) -> dict[int, float]:
    return trial.by_seed(results.monitor, trial.runs)


def _differences(results: Results, done: list[Trial], against: Mapping[int, Trial]) -> dict[int, str]:
    pairs = [(t, against[t.number]) for t in done if t is not against[t.number]]
    values = [(_by_seed(results, t), _by_seed(results, other)) for t, other in pairs]
    known = [(t, a, b) for (t, _), (a, b) in zip(pairs, values, strict=True) if a.keys() & b.keys()]
    tests = paired_tests([(a, b) for _, a, b in known])
    return {t.number: format_difference(test, results.scale) for (t, _, _), test in zip(known, tests, strict=True)}


def _own(params: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """What is not in common; `-` for what it does not have."""
    names = [n for n in {**common, **params} if n != "layer"]
    return settings({n: params.get(n, "-") for n in names if n not in params or (n, params[n]) not in common.items()})


def _shared(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all."""
    first, *others = found
    return {n: v for n, v in first.items() if all((n, v) in other.items() for other in others)}

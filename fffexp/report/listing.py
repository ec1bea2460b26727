"""All trials of a search as a terminal shows them, each compared with another."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fffexp.errors import UserError
from fffexp.report.text import settings
from fffexp.statistics import Paired, paired_tests
from fffexp.study.summary import Summary, Trial


def trials(summary: Summary, against: int | None = None) -> str:
    """Every trial of the search, the best first: its validation accuracy, and the difference to another.

    Paired t-tests, adjusted for all lines: many trials make large differences by chance. What all trials of a layer
    have in common is told once; with `against`, trials of that trial's layer tell what differs from it.

    Args:
        summary: of a study.
        against: number of the trial that the others are compared with; each with the best of its layer if None.

    Raises:
        UserError: the summary does not hold the accuracies of single seeds, or of that trial.
    """
    if "seeds" not in summary:
        name = summary["study"]
        raise UserError(
            f"the summary of {name} is of an earlier version and holds no single seeds: leave out --trials, or let "
            f"`fffexp study resume {name}`, where it was run, write it again"
        )
    seeds = summary["seeds"]
    # an accuracy that was not finite is null once it has been through JSON
    found = [(t, t["values"][0]) for t in summary["trials"] if t["values"] and t["values"][0] is not None]
    found.sort(key=lambda pair: -pair[1])
    done = [trial for trial, _ in found]
    best = {trial["params"]["layer"]: trial for trial in reversed(done)}
    if against is None:
        title, others = "to the best of its layer", best
        common = {layer: _shared(t["params"] for t in done if t["params"]["layer"] == layer) for layer in best}
    else:
        other = _find(done, seeds, against)
        title, others = f"to trial {against}", dict.fromkeys(best, other)
        common = {other["params"]["layer"]: other["params"]}
    told = [_own(trial["params"], common.get(trial["params"]["layer"], {})) for trial in done]
    wide = max(map(len, [*told, "hyperparameters"]))
    lines = [f"{'trial':>5}  {'layer':12}  {'hyperparameters':{wide}}  {'val acc':>7}  {title:24}{'p':>10}"]
    differences = _differences([(trial, others[trial["params"]["layer"]]) for trial in done], seeds)
    for (trial, accuracy), own, difference in zip(found, told, differences, strict=True):
        start = f"{trial['number']:5}  {trial['params']['layer']:12}  {own:{wide}}  {100 * accuracy:7.2f}"
        lines.append(f"{start}  {difference}".rstrip())
    for layer, values in sorted(common.items()):
        if rest := _own(values, {}):
            lines.append(f"{f'every {layer}' if against is None else f'trial {against}'}: {rest}")
    lines += [
        "",
        f"In percent, mean over seeds {', '.join(map(str, seeds))}; differences are paired by seed, brackets are their",
        "95% t intervals, of one difference each. p: paired t-test, adjusted for all lines by Benjamini and Hochberg"
        + ("; small\nby chance too, for the best is the best of these trials." if against is None else "."),
    ]
    return "\n".join(lines)


def _own(params: dict[str, Any], common: dict[str, Any]) -> str:
    """What is not in common; `-` for what it does not have."""
    names = [n for n in {**common, **params} if n != "layer"]
    return settings({n: params.get(n, "-") for n in names if n not in params or (n, params[n]) not in common.items()})


def _shared(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What is the same in all."""
    first, *others = found
    return {n: v for n, v in first.items() if all((n, v) in other.items() for other in others)}


def _find(done: Sequence[Trial], seeds: Sequence[int], number: int) -> Trial:
    complete = {trial["number"]: trial for trial in done if _complete(trial, seeds)}
    if number not in complete:
        known = ", ".join(map(str, sorted(complete))) or "none"
        raise UserError(f"--against {number}: no such trial with an accuracy by each seed; there are {known}")
    return complete[number]


def _differences(pairs: Sequence[tuple[Trial, Trial]], seeds: Sequence[int]) -> list[str]:
    """Difference, interval and p; "" of a trial to itself and of trials of an earlier version."""
    compared = [(a, b) for a, b in pairs if a is not b and _complete(a, seeds) and _complete(b, seeds)]

    def by_seed(trial: Trial) -> dict[int, float]:
        return dict(zip(seeds, trial["val_accuracies"], strict=True))

    tests = paired_tests([(by_seed(a), by_seed(b)) for a, b in compared])
    told = {a["number"]: _told(test) for (a, _), test in zip(compared, tests, strict=True)}
    return [told.get(trial["number"], "") for trial, _ in pairs]


def _complete(trial: Trial, seeds: Sequence[int]) -> bool:
    """Whether it has a finite accuracy by each seed; one that was not finite is null once it has been through JSON."""
    values = trial["val_accuracies"]
    return len(values) == len(seeds) and all(value is not None and math.isfinite(value) for value in values)


def _told(test: Paired) -> str:
    if test.interval is None:
        return f"{100 * test.difference:+.2f}"
    low, high = test.interval
    return f"{f'{100 * test.difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]':24}{test.p:10.1e}"

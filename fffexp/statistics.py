"""Intervals, paired tests and their one form as text.

One convention throughout: t intervals of 95% over seeds, on the logit scale for shares such as accuracies; a paired
t-test of two layers trained with the same seeds, adjusted for all tests made together (Benjamini and Hochberg). Fewer
than two values, or values that never vary, say nothing of the spread: no interval, and p = 1.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special, stats

Interval = tuple[float, float]

LEVEL = 0.05


def mean_interval(values: Sequence[float], unit: bool = False) -> tuple[float, Interval | None]:
    """Arithmetic mean of one value a seed and its t interval, which is None where no spread was seen.

    Of `unit` values, shares in [0, 1], it is the interval of the mean logit, transformed back, and lies within (0, 1);
    where a value is 0 or 1 exactly, the plain one, cut at 0 and 1. No values are a ValueError.
    """
    if not values:
        raise ValueError("no values to take a mean of")
    mean = sum(values) / len(values)
    if not _varies(values):
        return mean, None
    inside = unit and min(values) > 0 and max(values) < 1
    x = special.logit(values) if inside else np.asarray(values)
    bounds = stats.t.interval(1 - LEVEL, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    low, high = special.expit(bounds) if inside else np.clip(bounds, 0, 1) if unit else bounds
    return mean, (float(low), float(high))


class Paired(NamedTuple):
    """A mean difference over the seeds that two share, with p of a two-sided t-test, adjusted for all made together."""

    difference: float
    interval: Interval | None
    seeds: int
    p: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0 and the adjusted p is below 0.05."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1] and self.p < LEVEL


def paired_tests(pairs: Sequence[tuple[Mapping[int, float], Mapping[int, float]]]) -> list[Paired]:
    """Paired t-tests of values by seed, for each pair (a, b) of a minus b over the seeds in common.

    Each interval is of one difference alone. A pair without a seed in common is a ValueError.
    """
    tests = []
    for a, b in pairs:
        differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
        if not differences:
            raise ValueError("no seed in common")
        tests.append(Paired(*mean_interval(differences), len(differences), p_of_mean(differences)))
    # a pair with one seed was not tested
    ps = iter(adjusted([test.p for test in tests if test.seeds > 1]))
    return [test._replace(p=next(ps)) if test.seeds > 1 else test for test in tests]


def p_of_mean(
    values: Sequence[float], bound: float = 0.0, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> float:
    """p of a one-sample t-test that the mean is the bound, not adjusted."""
    return float(stats.ttest_1samp(values, bound, alternative=alternative).pvalue) if _varies(values) else 1.0


def paired_spread(a: Sequence[float], b: Sequence[float]) -> float:
    """p of Pitman and Morgan's test that two paired samples have equal variances.

    Sums and differences are uncorrelated if they have. 1 where one of the samples never varies.
    """
    sums, differences = np.add(a, b).tolist(), np.subtract(a, b).tolist()
    if len(a) < 3 or not all(map(_varies, (a, b, sums, differences))):
        return 1.0
    return float(stats.pearsonr(sums, differences).pvalue)


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, Interval] | None:
    """Mean of a over mean of b, paired, and its interval by Fieller's theorem (a t interval of mean(a) - r mean(b)).

    None with fewer than two pairs, or if the mean of b does not differ from 0 significantly: no ratio is bounded then.
    """
    n = len(a)
    if n < 2:
        return None
    mean_a, mean_b = sum(a) / n, sum(b) / n
    (var_a, cov), (_, var_b) = np.cov(a, b)
    t2 = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) ** 2 / n
    # (mean_a - r mean_b)^2 <= t2 (var_a - 2 r cov + r^2 var_b) between the roots of p r^2 - 2 q r + c
    p, q, c = mean_b**2 - t2 * var_b, mean_a * mean_b - t2 * cov, mean_a**2 - t2 * var_a
    half = max(0.0, q * q - p * c) ** 0.5
    return (mean_a / mean_b, (float((q - half) / p), float((q + half) / p))) if p > 0 else None


def adjusted(ps: Sequence[float]) -> list[float]:
    """P values for which the false discovery rate is controlled (Benjamini and Hochberg)."""
    return [float(p) for p in stats.false_discovery_control(ps)] if ps else []


def format_difference(test: Paired, scale: float = 1.0, digits: int = 2) -> str:
    """`+1.93 [+1.75, +2.11], p 1.2e-05`, or `+0.10 [-0.20, +0.40], p 0.45, not significant`, of scaled values.

    One pair is not tested: `+1.93`.
    """
    difference, *bounds = (f"{scale * x:+.{digits}f}" for x in (test.difference, *(test.interval or ())))
    interval = f" [{', '.join(bounds)}], p {test.p:.2g}" if bounds else ""
    return f"{difference}{interval}{'' if test.significant or test.seeds == 1 else ', not significant'}"


def _varies(values: Sequence[float]) -> bool:
    return len(values) > 1 and max(values) - min(values) >= 1e-12  # less is rounding

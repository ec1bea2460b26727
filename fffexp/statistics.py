"""Intervals of means and of paired differences over seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Interval = tuple[float, float]

# accuracies that differ by less are equal but for rounding
_ROUNDING = 1e-12


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, Interval | None]:
    """Mean, and its t interval; None in place of the interval of fewer than two values.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to take a mean of")
    mean = sum(values) / n
    if n < 2:
        return mean, None
    if max(values) - min(values) < _ROUNDING:
        return mean, (mean, mean)
    low, high = stats.t.interval(confidence, n - 1, loc=mean, scale=stats.sem(values))
    return mean, (float(low), float(high))


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95
) -> tuple[float, Interval | None, int]:
    """Mean of a minus b over the seeds that both have, its t interval, and the number of those seeds.

    Args:
        a: value by seed.
        b: value by seed.
        confidence: of the interval; it is None with fewer than two seeds.

    Raises:
        ValueError: no seed in common.
    """
    seeds = sorted(a.keys() & b.keys())
    n = len(seeds)
    if n == 0:
        raise ValueError("no seed in common")
    differences = [a[seed] - b[seed] for seed in seeds]
    mean = sum(differences) / n
    if n < 2:
        return mean, None, n
    if max(differences) - min(differences) < _ROUNDING:
        return mean, (mean, mean), n
    result = stats.ttest_rel([a[seed] for seed in seeds], [b[seed] for seed in seeds])
    low, high = result.confidence_interval(confidence)
    return mean, (float(low), float(high)), n


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> tuple[float, Interval] | None:
    """Mean of a over mean of b, paired, and its interval by Fieller's theorem (a t interval of mean(a) - r mean(b)).

    None with fewer than two pairs, or if the mean of b is not told apart from 0: no ratio is bounded then.
    """
    n = len(a)
    if n < 2:
        return None
    mean_a, mean_b = sum(a) / n, sum(b) / n
    (var_a, cov), (_, var_b) = np.cov(a, b)
    t2 = float(stats.t.ppf((1 + confidence) / 2, n - 1)) ** 2 / n
    # (mean_a - r mean_b)^2 <= t2 (var_a - 2 r cov + r^2 var_b) between the roots of p r^2 - 2 q r + c
    p, q, c = mean_b**2 - t2 * var_b, mean_a * mean_b - t2 * cov, mean_a**2 - t2 * var_a
    if p <= 0:
        return None
    half = max(0.0, q * q - p * c) ** 0.5
    return mean_a / mean_b, (float((q - half) / p), float((q + half) / p))


class Paired(NamedTuple):
    """A difference of means paired by seed; `p` of a two-sided t-test, adjusted for the tests made beside it."""

    difference: float
    interval: Interval | None
    seeds: int
    p: float | None


def paired_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Of a two-sided paired t-test; 1 where all pairs differ by the same, which tells nothing of the variance."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if max(differences) - min(differences) < _ROUNDING:
        return 1.0
    return float(stats.ttest_rel(a, b).pvalue)


def paired_tests(pairs: Sequence[tuple[Mapping[int, float], Mapping[int, float]]]) -> list[Paired]:
    """Paired t-tests (scipy.stats.ttest_rel) of values by seed; the false discovery rate is that of all together."""
    found, ps = [], []
    for a, b in pairs:
        mean, interval, n = paired_difference(a, b)
        found.append((mean, interval, n))
        seeds = sorted(a.keys() & b.keys())
        if interval is not None:
            ps.append(paired_p([a[seed] for seed in seeds], [b[seed] for seed in seeds]))
    left = iter(adjusted(ps))
    return [Paired(mean, interval, n, None if interval is None else next(left)) for mean, interval, n in found]


def above(values: Sequence[Sequence[float]], bounds: Sequence[float]) -> list[float]:
    """p of one-sided one-sample t-tests: is the mean above the bound? Adjusted for all together."""
    ps = []
    for sample, bound in zip(values, bounds, strict=True):
        if max(sample) - min(sample) < _ROUNDING:  # the same value with every seed tells nothing of the variance
            ps.append(1.0)
        else:
            ps.append(float(stats.ttest_1samp(sample, bound, alternative="greater").pvalue))
    return adjusted(ps)


def adjusted(ps: Sequence[float]) -> list[float]:
    """P values for which the false discovery rate is controlled (Benjamini and Hochberg)."""
    return [float(p) for p in stats.false_discovery_control(ps)] if ps else []


def overlap(a: Interval, b: Interval) -> bool:
    """Whether two intervals have a point in common."""
    return a[0] <= b[1] and b[0] <= a[1]

"""Intervals of means and of paired differences over seeds."""

from collections.abc import Mapping, Sequence

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


def overlap(a: Interval, b: Interval) -> bool:
    """Whether two intervals have a point in common."""
    return a[0] <= b[1] and b[0] <= a[1]

import math

import numpy as np
import pytest
from scipy import special, stats

from fffexp.statistics import (
    Paired,
    adjusted,
    format_difference,
    mean_interval,
    p_of_mean,
    paired_spread,
    paired_tests,
    ratio,
)

# 97.5% quantiles of Student's t, from a printed table
T_2, T_3 = 4.302653, 3.182446


def test_mean_interval() -> None:
    # mean 0.2, standard deviation sqrt((0.01 + 0 + 0.01) / 2) = 0.1, standard error 0.1 / sqrt(3)
    mean, interval = mean_interval([0.1, 0.2, 0.3])
    half = T_2 * 0.1 / math.sqrt(3)
    assert mean == pytest.approx(0.2)
    assert interval == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5], [0.3, 0.1 + 0.2]], ids=["one", "equal", "rounding"])
def test_no_interval_where_no_spread_was_seen(values: list[float], unit: bool) -> None:
    mean, interval = mean_interval(values, unit)
    assert mean == pytest.approx(values[0])
    assert interval is None


def test_no_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_interval_of_shares_is_that_of_logits() -> None:
    values = [0.97, 0.99, 0.995]
    x = special.logit(values)
    half = T_2 * x.std(ddof=1) / math.sqrt(3)
    mean, interval = mean_interval(values, unit=True)
    assert mean == pytest.approx(sum(values) / 3), "the mean is that of the values"
    assert interval == pytest.approx(special.expit([x.mean() - half, x.mean() + half]), rel=1e-6)
    plain = mean_interval(values)[1]
    assert interval is not None
    assert plain is not None
    assert interval[1] < 1 < plain[1]


def test_interval_of_shares_near_a_half_is_close_to_the_plain_one() -> None:
    values = [0.49, 0.5, 0.51]
    assert mean_interval(values, unit=True)[1] == pytest.approx(mean_interval(values)[1], abs=1e-4)


@pytest.mark.parametrize(("values", "bounds"), [([0.9, 0.95, 1.0], (None, 1.0)), ([0.0, 0.05, 0.1], (0.0, None))])
def test_interval_of_shares_at_the_ends_is_the_plain_one_cut(
    values: list[float], bounds: tuple[float | None, float | None]
) -> None:
    cut, plain = mean_interval(values, unit=True)[1], mean_interval(values)[1]
    assert cut is not None
    assert plain is not None
    for found, end, uncut in zip(cut, bounds, plain, strict=True):
        assert found == pytest.approx(uncut if end is None else end)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    true = 0.97
    covered = {False: 0, True: 0}
    for _ in range(2000):
        # seeds whose logits are normal; the mean of the shares is a little off that of the logits
        values = special.expit(random.normal(special.logit(true), 0.2, 5)).tolist()
        for unit in covered:
            interval = mean_interval(values, unit)[1]
            covered[unit] += interval is not None and interval[0] <= true <= interval[1]
    assert covered[True] / 2000 == pytest.approx(0.95, abs=0.015)


def test_paired_test_over_common_seeds() -> None:
    # seeds 1 to 4 are common; differences 0.01, 0.02, 0.03, 0.02: mean 0.02,
    # standard deviation sqrt(2e-4 / 3), standard error sqrt(2e-4 / 3) / 2
    a = {1: 0.91, 2: 0.82, 3: 0.73, 4: 0.64, 9: 0.1}
    b = {0: 0.5, 4: 0.62, 3: 0.70, 2: 0.80, 1: 0.90}
    (test,), (back,) = paired_tests([(a, b)]), paired_tests([(b, a)])
    half = T_3 * math.sqrt(2e-4 / 3) / 2
    assert (test.difference, test.seeds) == (pytest.approx(0.02), 4)
    assert test.interval == pytest.approx((0.02 - half, 0.02 + half), rel=1e-6)
    assert test.p == pytest.approx(stats.ttest_rel([a[s] for s in range(1, 5)], [b[s] for s in range(1, 5)]).pvalue)
    assert test.significant
    assert (back.difference, back.p) == (pytest.approx(-0.02), pytest.approx(test.p))
    assert back.interval == pytest.approx((-0.02 - half, -0.02 + half), rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "difference", "seeds"),
    [
        ({0: 0.9, 1: 0.8}, {0: 0.8, 1: 0.7}, 0.1, 2),  # the same with each seed, but for rounding
        ({0: 0.75, 1: 0.5}, {0: 0.5, 2: 0.5}, 0.25, 1),
        ({0: 0.75, 1: 0.5}, {0: 0.75, 1: 0.5}, 0, 2),
    ],
    ids=["equal differences", "one seed", "the same"],
)
def test_differences_that_never_vary_show_nothing(
    a: dict[int, float], b: dict[int, float], difference: float, seeds: int
) -> None:
    (test,) = paired_tests([(a, b)])
    assert test.difference == pytest.approx(difference)
    assert (test.interval, test.seeds, test.p) == (None, seeds, 1.0)
    assert not test.significant


def test_no_common_seed() -> None:
    with pytest.raises(ValueError, match="no seed"):
        paired_tests([({0: 0.5}, {1: 0.5})])


def test_adjusted_p_values() -> None:
    # Benjamini and Hochberg by hand: 0.01 * 4 / 1, 0.02 * 4 / 2, 0.03 * 4 / 3, 0.5
    assert adjusted([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.04, 0.04, 0.5, 0.04])
    assert adjusted([]) == []


def test_paired_tests_are_adjusted_together() -> None:
    a = {1: 0.91, 2: 0.82, 3: 0.73, 4: 0.64}
    shifted = {seed: value - difference for (seed, value), difference in zip(a.items(), (1, 2, 3, 2), strict=True)}
    first, second, third = paired_tests([(a, shifted), (a, a), (a, {1: 0.5})])
    # t = 2 / (sqrt(2 / 3) / 2) = 4.899; two-sided p with 3 degrees of freedom is 0.01628, the smaller of two
    assert first.difference == pytest.approx(2)
    assert first.p == pytest.approx(2 * 0.01628, rel=1e-3)
    assert (second.difference, second.p) == (0, 1)
    assert (third.interval, third.seeds, third.p) == (None, 1, 1), "one seed is no test, and adjusts no other"


def test_a_large_p_is_not_significant_whatever_the_interval_says() -> None:
    assert not Paired(1.0, (0.5, 1.5), 5, 0.06).significant, "adjusted for many tests"
    assert not Paired(1.0, (-0.5, 2.5), 5, 0.04).significant
    assert Paired(-1.0, (-1.5, -0.5), 5, 0.04).significant


@pytest.mark.parametrize(
    ("test", "text"),
    [
        (Paired(0.0193, (0.0175, 0.0211), 10, 1.2e-5), "+1.93 [+1.75, +2.11], p 1.2e-05"),
        (Paired(-0.001, (-0.005, 0.003), 10, 0.45), "-0.10 [-0.50, +0.30], p 0.45, not significant"),
        (Paired(0.01, (0.001, 0.019), 10, 0.08), "+1.00 [+0.10, +1.90], p 0.08, not significant"),
        (Paired(0.05, None, 1, 1.0), "+5.00"),
    ],
)
def test_format_difference(test: Paired, text: str) -> None:
    assert format_difference(test, 100) == text


def test_format_difference_of_other_units() -> None:
    assert format_difference(Paired(1.25, (1.0, 1.5), 3, 0.01)) == "+1.25 [+1.00, +1.50], p 0.01"


def test_paired_spread() -> None:
    a, b = [0.1, 0.9, 0.4, 0.7, 0.2], [0.51, 0.52, 0.49, 0.55, 0.5]
    sums, differences = np.add(a, b), np.subtract(a, b)
    r = np.corrcoef(sums, differences)[0, 1]
    t = r * math.sqrt(3 / (1 - r * r))  # n - 2 = 3 degrees of freedom
    assert paired_spread(a, b) == pytest.approx(2 * stats.t.sf(abs(t), 3))
    assert paired_spread(b, a) == pytest.approx(paired_spread(a, b))
    assert paired_spread(a, [x + 5 for x in a]) == 1
    assert paired_spread(a, [-x for x in a]) == 1
    assert paired_spread(a, [0.5] * 5) == 1, "no spread was seen, so none can be compared"
    assert paired_spread(a[:2], b[:2]) == 1


def test_paired_spread_rejects_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    rejected = {1.0: 0, 3.0: 0}
    for _ in range(1000):
        shared = random.normal(0, 1, 10)
        for scale in rejected:
            a, b = shared + random.normal(0, 0.5, 10), scale * (shared + random.normal(0, 0.5, 10))
            rejected[scale] += paired_spread(a.tolist(), b.tolist()) < 0.05
    assert rejected[1.0] / 1000 == pytest.approx(0.05, abs=0.02)
    assert rejected[3.0] / 1000 > 0.9


def test_ratio() -> None:
    # with b fixed at 2 it is the t interval of a, over 2
    a = [1.0, 1.2, 1.1, 0.9]
    mean, interval = mean_interval(a)
    found = ratio(a, [2.0] * 4)
    assert found is not None
    assert interval is not None
    assert found[0] == pytest.approx(mean / 2)
    assert found[1] == pytest.approx([bound / 2 for bound in interval])
    assert ratio(a, [0.1, -0.1, 0.05, -0.02]) is None, "nothing to be a share of"
    assert ratio([1.0], [2.0]) is None


def test_ratio_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        shared = random.normal(0, 0.3, 5)
        a, b = 1 + shared + random.normal(0, 0.2, 5), 2 + shared + random.normal(0, 0.2, 5)
        found = ratio(a.tolist(), b.tolist())
        covered += found is not None and found[1][0] <= 0.5 <= found[1][1]
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_p_of_mean() -> None:
    # t = 0.02 / (sqrt(2e-4 / 3) / 2) = 4.899; one-sided p with 3 degrees of freedom is 0.00814
    sample = [0.01, 0.02, 0.03, 0.02]
    assert p_of_mean(sample) == pytest.approx(2 * 0.00814, rel=1e-3)
    assert p_of_mean(sample, 0.0, "greater") == pytest.approx(0.00814, rel=1e-3)
    assert p_of_mean(sample, 0.04, "greater") > 0.99
    assert p_of_mean([2.0, 2.0], 1.0, "greater") == 1, "nothing is known of how it varies"

import math

import numpy as np
import pytest

from fffexp.statistics import above, adjusted, mean_interval, overlap, paired_difference, paired_tests, ratio

# 97.5% quantiles of Student's t, from a printed table
T_2, T_3 = 4.302653, 3.182446


def test_mean_interval() -> None:
    # mean 0.2, standard deviation sqrt((0.01 + 0 + 0.01) / 2) = 0.1, standard error 0.1 / sqrt(3)
    mean, interval = mean_interval([0.1, 0.2, 0.3])
    half = T_2 * 0.1 / math.sqrt(3)
    assert mean == pytest.approx(0.2)
    assert interval == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)


def test_confidence_widens_the_interval() -> None:
    # 95% quantile of t with 2 degrees of freedom: 2.919986
    half = 2.919986 * 0.1 / math.sqrt(3)
    assert mean_interval([0.1, 0.2, 0.3], 0.9)[1] == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.5]) == (0.5, None)


def test_equal_values_have_an_interval_without_width() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, (0.5, 0.5))


def test_values_that_differ_by_rounding_only() -> None:
    mean, interval = mean_interval([0.3, 0.1 + 0.2])
    assert interval == (mean, mean)


def test_no_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_paired_difference_over_common_seeds() -> None:
    # seeds 1 to 4 are common; differences 0.01, 0.02, 0.03, 0.02: mean 0.02,
    # standard deviation sqrt(2e-4 / 3), standard error sqrt(2e-4 / 3) / 2
    a = {1: 0.91, 2: 0.82, 3: 0.73, 4: 0.64, 9: 0.1}
    b = {0: 0.5, 4: 0.62, 3: 0.70, 2: 0.80, 1: 0.90}
    mean, interval, n = paired_difference(a, b)
    half = T_3 * math.sqrt(2e-4 / 3) / 2
    assert (mean, n) == (pytest.approx(0.02), 4)
    assert interval == pytest.approx((0.02 - half, 0.02 + half), rel=1e-6)


def test_paired_difference_is_antisymmetric() -> None:
    a, b = {0: 0.9, 1: 0.8, 2: 0.85}, {0: 0.7, 1: 0.8, 2: 0.9}
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert back[0] == pytest.approx(-forth[0])
    assert forth[1] is not None
    assert back[1] == pytest.approx((-forth[1][1], -forth[1][0]))


def test_equal_differences_have_an_interval_without_width() -> None:
    # 0.9 - 0.8 and 0.8 - 0.7 differ by rounding
    mean, interval, n = paired_difference({0: 0.9, 1: 0.8}, {0: 0.8, 1: 0.7})
    assert (mean, n) == (pytest.approx(0.1), 2)
    assert interval == (mean, mean)


def test_one_common_seed_has_no_interval() -> None:
    assert paired_difference({0: 0.75, 1: 0.5}, {0: 0.5, 2: 0.5}) == (0.25, None, 1)


def test_no_common_seed() -> None:
    with pytest.raises(ValueError, match="no seed"):
        paired_difference({0: 0.5}, {1: 0.5})


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 1), (2, 3), False),
        ((0, 2), (1, 3), True),
        ((0, 3), (1, 2), True),
        ((0, 1), (1, 2), True),
        ((-1, 1), (0, 0), True),
        ((0.1, 1), (0, 0), False),
    ],
)
def test_overlap(a: tuple[float, float], b: tuple[float, float], expected: bool) -> None:
    assert overlap(a, b) is overlap(b, a) is expected


def test_adjusted_p_values() -> None:
    # Benjamini and Hochberg by hand: 0.01 * 4 / 1, 0.02 * 4 / 2, 0.03 * 4 / 3, 0.5
    assert adjusted([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.04, 0.04, 0.5, 0.04])
    assert adjusted([]) == []


def test_paired_tests() -> None:
    a = {1: 0.91, 2: 0.82, 3: 0.73, 4: 0.64}
    shifted = {seed: value - difference for (seed, value), difference in zip(a.items(), (1, 2, 3, 2), strict=True)}
    first, second, third = paired_tests([(a, shifted), (a, a), (a, {1: 0.5})])
    # t = 2 / (sqrt(2 / 3) / 2) = 4.899; two-sided p with 3 degrees of freedom is 0.01628, the smaller of two
    assert first.difference == pytest.approx(2)
    assert first.p == pytest.approx(2 * 0.01628, rel=1e-3)
    assert (second.difference, second.p) == (0, 1)
    assert (third.interval, third.seeds, third.p) == (None, 1, None)


def test_a_difference_that_never_varies() -> None:
    (found,) = paired_tests([({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})])
    assert (found.difference, found.p) == (1, 1), "nothing is known of how it varies"
    assert above([[2.0, 2.0]], [1.0]) == [1]


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


def test_above() -> None:
    # t = 0.02 / (sqrt(2e-4 / 3) / 2) = 4.899; one-sided p with 3 degrees of freedom is 0.00814
    sample = [0.01, 0.02, 0.03, 0.02]
    assert above([sample], [0.0]) == pytest.approx([0.00814], rel=1e-3)
    assert above([sample], [0.04])[0] > 0.99

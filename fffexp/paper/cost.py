"""What inference should cost: the larger of operations and distinct bytes at a machine's rates, plus a call.

Source: the layers of arXiv 2308.14711, section 3; block counts for samples that spread evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares


@dataclass(frozen=True)
class Fit:
    """Seconds of a call, operations and bytes per second that fit best, and how well: R^2 of the log times."""

    call_s: float
    flops_per_s: float
    bytes_per_s: float
    r_squared: float
    predicted_s: list[float]


def distinct(blocks: float, draws: float) -> float:
    """Expected number of blocks that are hit when each of so many draws picks one at random."""
    return float(blocks * -np.expm1(draws * np.log1p(-1 / blocks))) if blocks > 1 else 1.0


def fit(seconds: ArrayLike, flops: ArrayLike, size: ArrayLike, most_flops_per_s: float) -> Fit:
    """Rates under which max(flops / rate, bytes / rate) + call comes closest to the measured times.

    Operations are not faster than most_flops_per_s, what the machine was measured to reach.

    Raises:
        ValueError: fewer than 4 points, for there are 3 unknowns.
    """
    if np.size(seconds) < 4:
        raise ValueError(f"{np.size(seconds)} points cannot fit 3 rates: measure at least 4 depths")
    measured, ops, read = (np.asarray(values, float) for values in (seconds, flops, size))
    log_s = np.log(measured)

    def model(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        call, compute, memory = np.exp(parameters)
        return np.log(call + np.maximum(ops / compute, read / memory))

    fastest = measured.min()
    starts = [
        np.log([share * fastest, min(np.median(ops / measured), 0.9 * most_flops_per_s), np.median(read / measured)])
        for share in (0.9, 0.1, 1e-3)
    ]
    bounds = -np.inf, [np.inf, np.log(most_flops_per_s), np.inf]
    solutions = (least_squares(lambda p: model(p) - log_s, start, bounds=bounds) for start in starts)
    solved = min(solutions, key=lambda solution: solution.cost)
    predicted = model(solved.x)
    total = float(((log_s - log_s.mean()) ** 2).sum())
    left = float(((log_s - predicted) ** 2).sum())
    call, compute, memory = np.exp(solved.x)
    r_squared = 1 - left / total if total else float("nan")
    return Fit(float(call), float(compute), float(memory), r_squared, np.exp(predicted).tolist())


def local_slopes(blocks: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """d log time / d log blocks between neighbours: 1 is linear, 0 is constant."""
    return (np.diff(np.log(seconds)) / np.diff(np.log(blocks))).tolist()

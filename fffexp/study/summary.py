"""What a study found: its records, their statistics, and the answer to a latency budget."""

import math
import statistics as basic
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from fffexp.errors import UserError
from fffexp.statistics import Interval, mean_interval, paired_test

LATENCY = "speed/latency_b256_ms"


class Sizes(TypedDict):
    """What a layer costs, as the layer counts it."""

    training_width: int
    training_size: int
    inference_width: int
    inference_size: int
    parameters: int
    flops_per_sample: int


Final = TypedDict("Final", {"val/accuracy": list[float], "test/accuracy": list[float], "latency_ms": list[float]})


class Trial(TypedDict):
    """One trial of the search, and if it became a finalist its trainings on fresh seeds."""

    number: int
    state: str
    params: dict[str, Any]
    values: list[float] | None
    val_accuracies: list[float]  # of the search, one a seed
    run_id: str | None
    seeds: list[int]
    mean: float | None
    ci95: list[float] | None
    sizes: Sizes | None
    final: Final | None
    test_mean: float | None
    test_ci95: list[float] | None
    ties: list[int]


class Summary(TypedDict):
    """What summary.json says."""

    study: str
    directions: list[str]
    metrics: list[str]
    seeds: list[int]  # of the search
    trials: list[Trial]
    pareto: list[int]
    finalists: list[int]
    best: int | None
    machines: int
    wall_s: float


def pareto_front(values: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Indices of the points that no other dominates; equal points all stay.

    Args:
        values: one point a row, one objective a column.
        directions: "maximize" or "minimize", one an objective.
    """
    signs = [{"maximize": 1.0, "minimize": -1.0}[direction] for direction in directions]
    points = [tuple(s * v for s, v in zip(signs, row, strict=True)) for row in values]

    def dominated(point: tuple[float, ...]) -> bool:
        return any(o != point and all(x >= y for x, y in zip(o, point, strict=True)) for o in points)

    return [i for i, point in enumerate(points) if not dominated(point)]


def fill_statistics(summary: Summary) -> None:
    """Compute means, intervals and ties from each trial's `final`, in place."""
    for trial in summary["trials"]:
        trial["mean"], trial["ci95"] = _interval(trial, "val/accuracy")
        trial["test_mean"], trial["test_ci95"] = _interval(trial, "test/accuracy")
        trial["ties"] = []
    finalists = finalist_trials(summary)
    for trial in finalists:
        trial["ties"] = sorted(
            other["number"]
            for other in finalists
            if other is not trial
            and (a := _pair(trial["ci95"])) is not None
            and (b := _pair(other["ci95"])) is not None
            and a[0] <= b[1]
            and b[0] <= a[1]
        )


def finalist_trials(summary: Summary) -> list[Trial]:
    """The finalists, fastest first; those not measured yet come last."""
    by_number = {trial["number"]: trial for trial in summary["trials"]}
    trials = [by_number[number] for number in summary["finalists"]]
    return sorted(trials, key=lambda t: math.inf if (ms := latency_ms(t)) is None else ms)


def latency_ms(trial: Trial) -> float | None:
    """Median latency of a finalist over its fresh seeds, in milliseconds a batch of 256."""
    found = list(_by_seed(trial, "latency_ms").values())
    return basic.median(found) if found else None


@dataclass(frozen=True)
class Answer:
    """The best finalist within a budget, and what it is compared with: the best FF, or another layer if it is FF."""

    best: Trial
    rival: Trial | None
    difference: float | None
    interval: Interval | None
    seeds: int

    @property
    def shown(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def verdict(self) -> str:
        """The difference in words."""
        if self.rival is None:
            return ""
        a, b = self.best["params"]["layer"], self.rival["params"]["layer"]
        if self.difference is None:
            return f"{a} and {b} share no seed: no difference shown"
        line = f"{100 * self.difference:+.2f} points"
        if self.interval is not None:
            line += f" [{100 * self.interval[0]:+.2f}, {100 * self.interval[1]:+.2f}]"
        else:
            line += " [-]"
        if not self.shown:
            why = "the interval spans 0" if self.interval is not None else "one seed gives no interval"
            return f"{line}: no difference shown ({why})"
        return f"{line}: {a} is {'better' if self.difference > 0 else 'worse'} than {b}"


def answer(summary: Summary, max_latency_ms: float | None = None) -> Answer:
    """The best finalist within a latency budget, by mean validation accuracy over fresh seeds.

    Raises:
        UserError: no finalist was retrained, or none fits the budget.
    """
    name = summary["study"]
    measured = [(t, ms) for t in finalist_trials(summary) if t["mean"] is not None and (ms := latency_ms(t))]
    if not measured:
        raise UserError(f"study {name} has no retrained finalist yet: go on with `fffexp study resume {name}`")
    # from the fastest on, so that max takes the faster of two that are equal
    fitting = [trial for trial, ms in measured if max_latency_ms is None or ms <= max_latency_ms]
    if not fitting:
        raise UserError(
            f"nothing in study {name} fits {max_latency_ms:g} ms: its fastest finalist takes {_up(measured[0][1])} ms; "
            "raise --max_latency_ms to at least that"
        )
    best = max(fitting, key=_mean)
    is_ff = best["params"]["layer"] == "FF"
    rivals = [trial for trial in fitting if (trial["params"]["layer"] == "FF") != is_ff]
    if not rivals:
        return Answer(best, None, None, None, 0)
    rival = max(rivals, key=_mean)
    a, b = (_by_seed(trial, "test/accuracy") for trial in (best, rival))
    if not a.keys() & b.keys():
        return Answer(best, rival, None, None, 0)
    test = paired_test(a, b)
    return Answer(best, rival, test.difference, test.interval, test.seeds)


def _interval(trial: Trial, metric: str) -> tuple[float | None, list[float] | None]:
    values = list(_by_seed(trial, metric).values())
    if not values:
        return None, None
    mean, interval = mean_interval(values)
    return mean, None if interval is None else list(interval)


def _by_seed(trial: Trial, metric: str) -> dict[int, float]:
    if trial["final"] is None:
        return {}
    values: Mapping[str, Any] = trial["final"]
    # a value that was not finite is null once it has been through JSON
    pairs = zip(trial["seeds"], values[metric], strict=True)
    return {seed: value for seed, value in pairs if value is not None and math.isfinite(value)}


def _pair(interval: Sequence[float] | None) -> Interval | None:
    return None if interval is None else (interval[0], interval[1])


def _mean(trial: Trial) -> float:
    assert trial["mean"] is not None
    return trial["mean"]


def _up(value: float) -> str:
    """Three digits, rounded up: a budget of that much is enough."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:.3g}"

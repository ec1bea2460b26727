"""What a study or a table of the paper found: its trials, the file that holds them, and their statistics."""

import json
import math
import statistics as basic
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from fffexp.errors import UserError
from fffexp.files import save_json, strict_json
from fffexp.statistics import Interval, Paired, mean_interval, paired_tests

# The speed of a machine drifts, so trials are compared by the ratio to a reference that was timed in turn.
LATENCY = "speed/latency_b256_ratio"
REFERENCE = "speed/reference_latency_b256_ms"

Record = dict[str, Any]  # of one training: "seed", and metrics by the names that fit tracks


@dataclass
class Trial:
    """A point of a study: a layer with its hyperparameters, and its trainings."""

    number: int  # over all layers of the study
    state: str  # as Optuna names it, such as COMPLETE, PRUNED, FAIL
    params: dict[str, Any]  # "layer", the class name or class path, and the hyperparameters by their short names
    values: list[float] | None = None  # of the objectives
    runs: list[Record] = field(default_factory=list)  # trainings that selection may use, one a seed
    evaluation: list[Record] = field(default_factory=list)  # trainings of a finalist on fresh seeds
    run_id: str | None = None  # of MLflow
    sizes: dict[str, int] | None = None  # of the layers together, as they count them
    attempts: int = 1  # how often it was started
    error: str | None = None  # why it failed
    recipe: str | None = None  # digest of all that decides its result but the seed
    # of the monitored metric over `evaluation` if there is one, else over `runs`
    seeds: list[int] = field(default_factory=list)
    mean: float | None = None
    ci95: Interval | None = None
    test_mean: float | None = None  # on the test set
    test_ci95: Interval | None = None
    latency_ms: float | None = None  # median of a batch of 256, at the median speed of the study's machine

    @property
    def layer(self) -> str:
        """Class of the layer."""
        return str(self.params["layer"])

    def by_seed(self, metric: str, runs: Iterable[Record] | None = None) -> dict[int, float]:
        """Finite values of a metric by seed, of the runs given, else of `evaluation` or, without one, of `runs`."""
        runs = (self.evaluation or self.runs) if runs is None else runs
        numbers = {run["seed"]: run[metric] for run in runs if isinstance(run.get(metric), int | float)}
        return {seed: number for seed, number in numbers.items() if math.isfinite(number)}


@dataclass
class Results:
    """All that is kept of a study; the content of summary.json and of the tables of trainings in docs/results/."""

    study: str
    monitor: str = "val/loss"  # metric that trainings are selected by
    mode: str = "min"  # or "max", of the monitor
    unit: bool = False  # whether the monitor is a share in [0, 1], which tables print in percent
    directions: list[str] = field(default_factory=list)  # "maximize" or "minimize", one an objective
    metrics: list[str] = field(default_factory=list)  # the objectives
    seeds: list[int] = field(default_factory=list)  # of the trials' runs
    trials: list[Trial] = field(default_factory=list)  # by their numbers
    pareto: list[int] = field(default_factory=list)  # those that no other beats in every objective, over all layers
    finalists: list[int] = field(default_factory=list)  # those that were or will be trained on fresh seeds
    best: int | None = None  # by the monitor, the faster of equal ones
    machines: int = 1  # how many the trainings ran on
    reference_ms: float | None = None  # median latency of the reference over all trainings
    environments: list[dict[str, Any]] = field(default_factory=list)  # what the numbers depend on besides the configs
    wall_s: float = 0.0  # seconds that commands worked on it
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of the file, which are kept as they are

    @property
    def test_monitor(self) -> str:
        """The monitored metric on the test set."""
        return "test/" + self.monitor.partition("/")[2]

    @property
    def sign(self) -> int:
        """1 if more of the monitored metric is better, else -1."""
        return 1 if self.mode == "max" else -1

    @property
    def scale(self) -> int:
        """Factor of the monitored metric in print: shares are in percent."""
        return 100 if self.unit else 1

    @property
    def baseline(self) -> str | None:
        """The layer that others are compared with: the first of the study."""
        return min(self.trials, key=lambda t: t.number).layer if self.trials else None

    def trial(self, number: int) -> Trial:
        """By its number."""
        return next(trial for trial in self.trials if trial.number == number)

    def best_of(self, trials: Sequence[Trial]) -> Trial:
        """By the mean of the monitored metric, which all have; the first of equal ones."""
        return max(trials, key=lambda t: self.sign * (t.mean or 0.0))

    def finalist_trials(self) -> list[Trial]:
        """The finalists, fastest first; those without a latency come last."""
        return sorted(map(self.trial, self.finalists), key=lambda t: t.latency_ms or math.inf)

    def selected_by(self, trial: Trial, metric: str | None = None) -> float | None:
        """What selection sees of a trial: the mean of the monitored or another metric over its runs."""
        metric = metric or self.monitor
        if metric in self.metrics and trial.values:
            return trial.values[self.metrics.index(metric)]
        values = trial.by_seed(metric, trial.runs).values()
        return basic.fmean(values) if values else None

    def update(self) -> None:
        """Compute seeds, means, intervals and latencies of every trial anew."""
        references = [
            ms for trial in self.trials for ms in trial.by_seed(REFERENCE, trial.runs + trial.evaluation).values()
        ]
        self.reference_ms = basic.median(references) if references else None
        for trial in self.trials:
            ratios = trial.by_seed(LATENCY).values()
            trial.latency_ms = basic.median(ratios) * self.reference_ms if ratios and self.reference_ms else None
            trial.seeds = [run["seed"] for run in trial.evaluation or trial.runs]
            (trial.mean, trial.ci95), (trial.test_mean, trial.test_ci95) = (
                mean_interval(values, self.unit) if (values := [*trial.by_seed(metric).values()]) else (None, None)
                for metric in (self.monitor, self.test_monitor)
            )

    def to_json(self) -> dict[str, Any]:
        """What the file says; numbers that are not finite are null."""
        return dict(strict_json({key: value for key, value in asdict(self).items() if key != "extra"} | self.extra))

    def save(self, path: Path | None) -> None:
        """Write the file, whole or not at all; without one compute the statistics alone."""
        self.update()
        if path is not None:
            save_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file, with statistics computed anew; UserError if it cannot be read, or holds something else."""
        try:
            extra = dict(json.loads(path.read_text()))
            own = {each.name: extra.pop(each.name) for each in fields(cls) if each.name in extra}
            results = cls(own.pop("study"), own.pop("monitor"), **own, extra=extra)
            results.trials = [Trial(**trial) for trial in own["trials"]]
            results.update()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} holds no results of a study ({error}): give the summary.json of one") from error
        return results


class Answer(NamedTuple):
    """The best finalist within a latency budget, and the best of the layers that it is compared with.

    Those are the study's first layer, or all others if the best is of the first. `test` is of best minus rival on the
    test set, over the seeds that both have; None where there is none.
    """

    best: Trial
    rival: Trial | None
    test: Paired | None
    fitting: list[Trial]


def answer(results: Results, max_latency_ms: float | None = None) -> Answer:
    """The best finalist within a latency budget, by the mean over fresh seeds; UserError if there is none."""
    trained = [t for t in results.finalist_trials() if t.mean is not None and (t.latency_ms or max_latency_ms is None)]
    if not trained and any(t.mean is not None for t in results.finalist_trials()):
        raise UserError(f"no finalist of study {results.study} has a {LATENCY}: leave --max_latency_ms out")
    if not trained:
        raise UserError(f"no finalist is retrained yet: go on with `fffexp study resume {results.study}`")
    # from the fastest on, so that max takes the faster of two that are equal
    fitting = [t for t in trained if max_latency_ms is None or (t.latency_ms or 0.0) <= max_latency_ms]
    if not fitting:
        fastest_ms = trained[0].latency_ms or 0.0
        step = 10.0 ** (math.floor(math.log10(fastest_ms)) - 2)  # three digits, rounded up, are enough
        raise UserError(
            f"nothing in study {results.study} fits {max_latency_ms:g} ms: its fastest finalist takes "
            f"{math.ceil(fastest_ms / step) * step:.3g} ms; raise --max_latency_ms to at least that"
        )
    best = results.best_of(fitting)
    rivals = [t for t in fitting if (t.layer == results.baseline) != (best.layer == results.baseline)]
    rival = results.best_of(rivals) if rivals else None
    a, b = (trial.by_seed(results.test_monitor) if trial else {} for trial in (best, rival))
    return Answer(best, rival, paired_tests([(a, b)])[0] if a.keys() & b.keys() else None, fitting)

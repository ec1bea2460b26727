"""What a study or a table of the paper found: its trials, the file that holds them, and their statistics."""

import json
import math
import statistics as basic
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fffexp.errors import UserError
from fffexp.files import save_json, strict_json
from fffexp.statistics import Interval, Paired, mean_interval, paired_test

LATENCY = "speed/latency_b256_ms"

Record = dict[str, Any]  # of one training: "seed", and metrics by the names that fit tracks


@dataclass
class Trial:
    """A point of a study: a layer with its hyperparameters, and its trainings.

    Args:
        number: index over all layers of the study.
        state: as Optuna names it, such as COMPLETE, PRUNED, FAIL.
        params: "layer", the class name or class path, and the hyperparameters by their short names.
        values: of the objectives.
        runs: trainings that selection may use, one a seed.
        evaluation: trainings of a finalist on fresh seeds.
        run_id: of the MLflow run.
        sizes: of the layers together, as they count them.
        attempts: how often it was started.
        error: why it failed.
        recipe: digest of all that decides its result but the seed.
        seeds, mean, ci95: of the monitored metric over `evaluation` if there is one, else over `runs`.
        test_mean, test_ci95: of the same metric on the test set.
    """

    number: int
    state: str
    params: dict[str, Any]
    values: list[float] | None = None
    runs: list[Record] = field(default_factory=list)
    evaluation: list[Record] = field(default_factory=list)
    run_id: str | None = None
    sizes: dict[str, int] | None = None
    attempts: int = 1
    error: str | None = None
    recipe: str | None = None
    seeds: list[int] = field(default_factory=list)
    mean: float | None = None
    ci95: Interval | None = None
    test_mean: float | None = None
    test_ci95: Interval | None = None

    @property
    def layer(self) -> str:
        """Class of the layer."""
        return str(self.params["layer"])

    @property
    def trainings(self) -> list[Record]:
        """Those on fresh seeds if there are any, else all."""
        return self.evaluation or self.runs

    def by_seed(self, metric: str, runs: Iterable[Record] | None = None) -> dict[int, float]:
        """Finite values of a metric by seed, of `trainings` or of the runs given."""
        records = self.trainings if runs is None else runs
        return {run["seed"]: run[metric] for run in records if _finite(run.get(metric))}

    @property
    def latency_ms(self) -> float | None:
        """Median over its trainings, of a batch of 256."""
        values = self.by_seed(LATENCY).values()
        return basic.median(values) if values else None


@dataclass
class Results:
    """All that is kept of a study; the content of summary.json and of the tables of trainings in docs/results/.

    Args:
        study: its name.
        monitor: metric that trainings are selected by, such as val/accuracy.
        mode: "max" or "min", of the monitor.
        unit: whether the monitor is a share in [0, 1], which tables print in percent.
        directions: "maximize" or "minimize", one an objective.
        metrics: the objectives.
        seeds: of the trials' runs.
        trials: in the order of their numbers.
        pareto: numbers of the trials that no other beats in every objective, over all layers.
        finalists: numbers of the trials that were or will be trained on fresh seeds.
        best: number of the best trial by the monitor, the faster of equal ones.
        machines: how many the trainings ran on.
        environments: what the numbers depend on besides the configs.
        wall_s: seconds that commands worked on it.
        extra: further keys of the file, such as "table", "data", "controls", which are kept as they are.
    """

    study: str
    monitor: str = "val/loss"
    mode: str = "min"
    unit: bool = False
    directions: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    pareto: list[int] = field(default_factory=list)
    finalists: list[int] = field(default_factory=list)
    best: int | None = None
    machines: int = 1
    environments: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def test_monitor(self) -> str:
        """The monitored metric on the test set."""
        return "test/" + self.monitor.partition("/")[2]

    @property
    def sign(self) -> int:
        """1 if more of the monitored metric is better, else -1."""
        return 1 if self.mode == "max" else -1

    def trial(self, number: int) -> Trial:
        """By its number."""
        return next(trial for trial in self.trials if trial.number == number)

    @property
    def scale(self) -> int:
        """Factor of the monitored metric in print: shares are in percent."""
        return 100 if self.unit else 1

    @property
    def baseline(self) -> str | None:
        """The layer that others are compared with: the first of the study."""
        return min(self.trials, key=lambda t: t.number).layer if self.trials else None

    def best_of(self, trials: Sequence[Trial]) -> Trial:
        """By the mean of the monitored metric, the first of equal ones."""
        return max(trials, key=lambda t: -math.inf if t.mean is None else self.sign * t.mean)

    def finalist_trials(self) -> list[Trial]:
        """The finalists, fastest first; those without a latency come last."""
        return sorted(map(self.trial, self.finalists), key=lambda t: math.inf if (ms := t.latency_ms) is None else ms)

    def selected_by(self, trial: Trial, metric: str | None = None) -> float | None:
        """What selection sees of a trial: the mean of the monitored or another metric over its runs."""
        metric = metric or self.monitor
        if metric in self.metrics and trial.values:
            return trial.values[self.metrics.index(metric)]
        values = trial.by_seed(metric, trial.runs).values()
        return basic.fmean(values) if values else None

    def update(self) -> None:
        """Compute seeds, means and intervals of every trial anew."""
        for trial in self.trials:
            trial.seeds = [run["seed"] for run in trial.trainings]
            trial.mean, trial.ci95 = self._interval(trial, self.monitor)
            trial.test_mean, trial.test_ci95 = self._interval(trial, self.test_monitor)

    def _interval(self, trial: Trial, metric: str) -> tuple[float | None, Interval | None]:
        values = list(trial.by_seed(metric).values())
        return mean_interval(values, self.unit) if values else (None, None)

    def compare(self, a: Trial, b: Trial, metric: str | None = None) -> Paired | None:
        """Paired test of a minus b over the seeds in common, by the monitored metric; None without such a seed."""
        values = [trial.by_seed(metric or self.monitor) for trial in (a, b)]
        return paired_test(*values) if values[0].keys() & values[1].keys() else None

    def to_json(self) -> dict[str, Any]:
        """What the file says; numbers that are not finite are null."""
        content = asdict(self)
        extra = content.pop("extra")
        found: dict[str, Any] = strict_json(content | extra)
        return found

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Results":
        """Of what a file says, with statistics computed anew.

        Raises:
            ValueError: it is not of this format.
        """
        if not isinstance(content, Mapping) or not {"study", "monitor", "trials"} <= content.keys():
            raise ValueError("it holds no results of a study")
        own = {each.name for each in fields(cls)} - {"extra"}
        results = cls(
            **{key: value for key, value in content.items() if key in own},
            extra={key: value for key, value in content.items() if key not in own},
        )
        results.trials = [Trial(**trial) for trial in content["trials"]]
        results.update()
        return results

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        self.update()
        save_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file.

        Raises:
            UserError: it cannot be read, or holds something else.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give the JSON file of a study") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} holds no results of a study ({error}): give the summary.json of one") from error


@dataclass(frozen=True)
class Answer:
    """The best finalist within a latency budget, and the best of the layers that it is compared with.

    Those are the study's first layer, or all others if the best is of the first. `test` is of best minus rival on the
    test set, over the seeds that both have; None where there is none.
    """

    best: Trial
    rival: Trial | None
    test: Paired | None
    fitting: list[Trial]


def answer(results: Results, max_latency_ms: float | None = None) -> Answer:
    """The best finalist within a latency budget, by the mean of the monitored metric over fresh seeds.

    Raises:
        UserError: no finalist was retrained, or none fits the budget.
    """
    name = results.study
    trained = [t for t in results.finalist_trials() if t.mean is not None and (t.latency_ms or max_latency_ms is None)]
    if not trained:
        raise UserError(f"study {name} has no retrained finalist yet: go on with `fffexp study resume {name}`")
    # from the fastest on, so that max takes the faster of two that are equal
    fitting = [t for t in trained if max_latency_ms is None or (t.latency_ms or 0.0) <= max_latency_ms]
    if not fitting:
        raise UserError(
            f"nothing in study {name} fits {max_latency_ms:g} ms: its fastest finalist takes "
            f"{_up(trained[0].latency_ms or 0.0)} ms; raise --max_latency_ms to at least that"
        )
    best = results.best_of(fitting)
    dense = best.layer == results.baseline
    rivals = [trial for trial in fitting if (trial.layer == results.baseline) != dense]
    rival = results.best_of(rivals) if rivals else None
    test = results.compare(best, rival, results.test_monitor) if rival else None
    return Answer(best, rival, test, fitting)


def _up(value: float) -> str:
    """Three digits, rounded up: a budget of that much is enough."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:.3g}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

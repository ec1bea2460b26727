"""One process that takes jobs and trains them."""

import copy
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial
from optuna_integration import PyTorchLightningPruningCallback

from fffexp import tracking
from fffexp.environment import environment, host, training_device
from fffexp.errors import InvalidConfigError, NonFiniteLossError, UserError, report, terminated_by_signal
from fffexp.study import store
from fffexp.study.results import Record
from fffexp.study.spec import Point, StudySpec, Values, parse
from fffexp.study.store import Job, Queue
from fffexp.training.experiment import Context, Result, run
from fffexp.training.params import total_sizes
from fffexp.training.vectorized import train_seeds

POLL_S = 0.5
RUN = "run/"  # user attributes of a trial: the record of each finished seed


class StoredStudy:
    """A study in its storages: one Optuna study for each layer that is searched, and `NAME/runs` for the other jobs.

    The attributes of `NAME/runs` say what the study is. The other jobs are those of listed points, and the finalists
    once the search has ended.

    Args:
        spec: of the study.
        name: in the Optuna storage.
        storage: of Optuna.
        keep_seed: whether the sampler keeps its seed; any other worker with it would draw the same.
    """

    def __init__(self, spec: StudySpec, name: str, storage: store.Storage, keep_seed: bool = True) -> None:
        self.spec, self.storage = spec, storage
        self.points = {point.number: point for point in spec.points()}
        self.runs_study = optuna.load_study(study_name=f"{name}/runs", storage=storage)
        self.attrs: dict[str, Any] = self.runs_study.user_attrs
        self.searches: dict[str, Queue] = {}
        for label in spec.searched:
            sampler = copy.deepcopy(spec.sampler)
            if not keep_seed:
                sampler.reseed_rng()
            study = optuna.load_study(
                study_name=f"{name}/{label}", storage=storage, sampler=sampler, pruner=spec.pruner
            )
            jobs = {
                str(point.number): Job(point.values, {"number": point.number, "seeds": spec.seeds})
                for point in self.points.values()
                if point.label == label
            }
            self.searches[label] = Queue(storage, study, lambda jobs=jobs: jobs)  # type: ignore[misc] # bound now
        self.runs = Queue(storage, self.runs_study, self._other_jobs)

    @property
    def queues(self) -> list[Queue]:
        """All jobs there are so far."""
        return [*self.searches.values(), self.runs]

    @property
    def searched(self) -> bool:
        """Whether all searches have ended."""
        return all(queue.all_finished() for queue in self.searches.values())

    def _other_jobs(self) -> dict[str, Job]:
        jobs = dict(self._listed)
        if self.spec.searched and self.spec.evaluation_seeds and self.searched:
            for number in self.finalists():
                for seed in self.spec.evaluation_seeds:
                    jobs[f"{number}/{seed}"] = Job({}, {"number": number, "seeds": [seed], "fresh": True})
        return jobs

    @cached_property
    def _listed(self) -> dict[str, Job]:
        """Of listed points; a seed that the results file had at the start has none."""
        known: dict[str, list[int]] = self.attrs.get("known", {})
        jobs = {}
        for number, point in self.points.items():
            if point.label in self.searches:
                continue
            seeds = [seed for seed in self.spec.seeds if seed not in known.get(str(number), [])]
            for part in [seeds] if self.spec.vectorize_seeds and seeds else [[seed] for seed in seeds]:
                key = str(number) if self.spec.vectorize_seeds else f"{number}/{part[0]}"
                jobs[key] = Job({}, {"number": number, "seeds": part})
        return jobs

    def trials(self) -> dict[int, FrozenTrial]:
        """The trial of each searched point that was begun or waits, by number."""
        return {
            trial.user_attrs["number"]: trial
            for queue in self.searches.values()
            for trial in store.current(queue.study).values()
        }

    def values(self, number: int) -> Values:
        """Hyperparameters of a point."""
        point = self.points[number]
        return self.trials()[number].params if point.label in self.searches else point.values

    def finalists(self) -> list[int]:
        """Numbers of the front of each layer by itself, so that every layer is compared at its best."""
        return sorted(t.user_attrs["number"] for queue in self.searches.values() for t in queue.study.best_trials)


def main(text: str, folder: Path, name: str, url: str, uri: str, keep_seed: bool, threads: int) -> None:
    """Entry of a worker process; returns when no work is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then stops its workers
    _follow_parent()
    torch.set_num_threads(threads)
    try:
        with terminated_by_signal():
            spec = parse(text, folder, "in the storage")
            Worker(StoredStudy(spec, name, store.open_storage(url), keep_seed), uri).work()
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Worker:
    """Takes the jobs of a study until none is left."""

    def __init__(self, study: StoredStudy, uri: str) -> None:
        self.study, self.spec, self.uri = study, study.spec, uri
        self.queues = study.queues
        self.client, self.experiment = tracking.open_store(uri, self.spec.name)
        self.parent: str = study.attrs["run_id"]
        self.environment = environment([study.attrs["threads"]], training_device())
        if self.spec.vectorize_seeds:
            # hardened choices multiply to numbers that are slow and as good as 0
            torch.set_flush_denormal(True)

    def work(self) -> None:
        """Do all there is to do."""
        filled = -math.inf
        while True:
            # one of each queue in turn
            if sum(queue.run_one(self._objective, (NonFiniteLossError, InvalidConfigError)) for queue in self.queues):
                continue
            if all(queue.all_finished() for queue in self.queues):
                return
            if time.monotonic() - filled > store.HEARTBEAT_S:
                for queue in self.queues:  # there are finalists now, or another worker has died
                    queue.fill()
                filled = time.monotonic()
            else:
                time.sleep(POLL_S)

    def _objective(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        trial.set_user_attr("host", host())
        self._note_environment()
        point, fresh = self.study.points[trial.user_attrs["number"]], trial.user_attrs.get("fresh", False)
        searched = point.label in self.study.searches and not fresh
        space = self.spec.layers[point.label].space
        suggested = {name: parameter.suggest(trial, name) for name, parameter in space.items()} if searched else None
        task = _Task(trial, point, self.study.values(point.number) if suggested is None else suggested, searched, fresh)
        self._train(task)
        records = task.records(trial.user_attrs["seeds"])
        if not searched:
            return _mean(records, self.study.attrs["monitor"])
        for name, limit in self.spec.constraints.items():
            trial.set_constraint(name, _mean(records, name) - limit)
        return tuple(_mean(records, name) for name in self.study.attrs["objectives"])

    def _note_environment(self) -> None:
        runs = self.study.runs_study
        with self.study.storage.exclusive():
            known = runs.user_attrs["environments"]
            if self.environment not in known:
                runs.set_user_attr("environments", [*known, self.environment])

    def _train(self, task: "_Task") -> None:
        """Train the seeds that are not there yet; each is stored as soon as it is."""
        trial, seeds = task.trial, task.trial.user_attrs["seeds"]
        left = [seed for seed in seeds if not task.records([seed])]
        together = self.spec.vectorize_seeds and not task.fresh
        tags = {"study": self.spec.name, "trial": str(task.point.number)} | ({"finalist": "true"} if task.fresh else {})
        if not together and len(seeds) == 1:
            parent = self.study.trials()[task.point.number].user_attrs["run_id"] if task.fresh else self.parent
            for seed in left:
                trial.set_user_attr("run_id", self._train_one(task, seed, parent, tags).run_id)
            return
        layer = self.study.attrs["classes"][task.point.label]
        name, run_id = f"trial {task.point.number} {layer}", trial.user_attrs.get("run_id")
        tags["layer"] = layer
        # the run of an earlier attempt goes on
        with tracking.run(self.client, self.experiment, name, tags, self.parent, run_id) as group:
            trial.set_user_attr("run_id", group.id)
            if together:
                self._train_together(task, left, group)
            else:
                for seed in left:
                    result = self._train_one(task, seed, group.id, tags)
                    if seed == seeds[0]:
                        _describe(group, result.config, result.params, seeds)
            group.metrics(_means(task.records(seeds)))

    def _train_together(self, task: "_Task", seeds: Sequence[int], group: tracking.Run) -> None:
        args = self.spec.arguments(task.point.label, task.values, None)
        trained = train_seeds(
            args[1:],
            seeds,
            test=self.spec.test,
            patience=self.spec.patience,
            measure_fit=self.spec.fit != "ignored",
            fit_counts=self.spec.fit == "awaited",
        )
        wanted = task.trial.user_attrs["seeds"]
        for seed, each in zip(seeds, trained, strict=True):
            metrics = each.result
            if seed == wanted[0]:
                _describe(group, each.config, each.params, wanted)
                task.trial.set_user_attr("sizes", total_sizes(each.task))
            if task.searched and metrics.get("stability/nonfinite_steps"):
                raise NonFiniteLossError(
                    f"the loss of seed {seed} was not finite at {metrics['stability/nonfinite_steps']:.0f} steps: "
                    "lower the learning rate or the aux_weights"
                )
            task.store(seed, metrics)

    def _train_one(self, task: "_Task", seed: int, parent: str, tags: dict[str, str]) -> Result:
        args = self.spec.arguments(task.point.label, task.values, seed, task.fresh or self.spec.test)
        callbacks = []
        if task.searched and self.spec.pruner is not None and seed == self.spec.seeds[0]:
            callbacks = [PyTorchLightningPruningCallback(task.trial, self.study.attrs["monitor"])]
        context = Context(parent=parent, tags=tags, callbacks=callbacks, quiet=True)
        result = run([*args, f"--tracking_uri={self.uri}"], context)
        assert result is not None
        task.trial.set_user_attr("sizes", result.sizes)
        task.store(seed, {"run_id": result.run_id, **result.metrics})
        return result


@dataclass(frozen=True)
class _Task:
    """What a trial trains.

    Args:
        trial: of Optuna.
        point: of the study.
        values: hyperparameters.
        searched: whether a sampler chose them.
        fresh: whether it is a finalist's training on seeds that selection has not seen.
    """

    trial: optuna.Trial
    point: Point
    values: Values
    searched: bool
    fresh: bool

    def store(self, seed: int, record: Mapping[str, Any]) -> None:
        self.trial.set_user_attr(f"{RUN}{seed}", {"seed": seed, **record})

    def records(self, seeds: Sequence[int]) -> list[Record]:
        attrs = self.trial.user_attrs
        return [attrs[f"{RUN}{seed}"] for seed in seeds if f"{RUN}{seed}" in attrs]


def _describe(group: tracking.Run, config: str, params: Mapping[str, Any], seeds: Sequence[int]) -> None:
    group.text(config, "config.yaml")
    group.params({name: value for name, value in params.items() if name != "seed"} | {"seeds": seeds})


def _means(records: Sequence[Record]) -> dict[str, float]:
    shared = set.intersection(*(set(record) for record in records)) - {"seed", "run_id"}
    return {name: fmean(record[name] for record in records) for name in shared}


def _mean(records: Sequence[Record], metric: str) -> float:
    means = _means(records)
    if metric not in means:
        raise UserError(f"metric {metric} is not measured; there are {', '.join(sorted(means))}")
    return means[metric]

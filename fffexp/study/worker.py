"""One process that takes jobs and trains them."""

import copy
import gc
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import torch
from optuna_integration import PyTorchLightningPruningCallback as Pruning

from fffexp import tracking
from fffexp.environment import environment, training_device
from fffexp.errors import InvalidConfigError, NonFiniteLossError, UserError, report, terminated_by_signal
from fffexp.outages import asked_again
from fffexp.study import store
from fffexp.study.results import Record
from fffexp.study.spec import StudySpec, Values, parse
from fffexp.training.experiment import Context, Result, run
from fffexp.training.vectorized import train_seeds

POLL_S = 0.5
RUN = "run/"  # user attributes of a trial: the record of each finished seed


class StoredStudy:
    """A study in its storages: one Optuna study for each layer that is searched, and `NAME/runs` for the other jobs.

    The attributes of `NAME/runs` say what the study is. The other jobs are those of listed points, and the finalists
    once the search has ended. With `keep_seed` the samplers keep their seed: any other worker would draw the same.
    """

    def __init__(self, spec: StudySpec, name: str, storage: store.Storage, keep_seed: bool = True) -> None:
        self.spec, self.storage = spec, storage
        self.points = {point.number: point for point in spec.points()}
        self.runs_study = optuna.load_study(study_name=f"{name}/runs", storage=storage)
        self.attrs: dict[str, Any] = self.runs_study.user_attrs
        self.searches: dict[str, store.Queue] = {}
        for label in spec.searched:
            sampler = copy.deepcopy(spec.sampler)
            if not keep_seed:
                sampler.reseed_rng()
            part = f"{name}/{label}"
            study = optuna.load_study(study_name=part, storage=storage, sampler=sampler, pruner=spec.pruner)
            own = [point for point in self.points.values() if point.label == label]
            jobs = {str(n): (values, {"number": n, "seeds": spec.seeds}) for n, _, values in own}
            self.searches[label] = store.Queue(storage, study, jobs.copy)
        self.queues = [*self.searches.values(), store.Queue(storage, self.runs_study, self._other_jobs)]
        known: dict[str, list[int]] = self.attrs.get("known", {})  # seeds that the results file had at the start
        self.listed: dict[str, store.Job] = {}
        for number, _, values in (point for point in self.points.values() if point.label not in self.searches):
            left = [seed for seed in spec.seeds if seed not in known.get(str(number), [])]
            groups = {f"{number}/{seed}": [seed] for seed in left}
            if spec.vectorize_seeds and left:
                groups = {str(number): left}
            for key, seeds in groups.items():
                self.listed[key] = {}, {"number": number, "seeds": seeds, "values": values}

    def _other_jobs(self) -> dict[str, store.Job]:
        jobs = self.listed.copy()
        if self.searches and all(queue.all_finished() for queue in self.searches.values()):
            for trial, seed in itertools.product(self.finalists(), self.spec.evaluation_seeds):
                number, parent = trial.user_attrs["number"], trial.user_attrs["run_id"]
                attrs = {"number": number, "seeds": [seed], "values": trial.params, "fresh": True, "parent": parent}
                jobs[f"{number}/{seed}"] = {}, attrs
        return jobs

    def finalists(self) -> list[optuna.trial.FrozenTrial]:
        """The front of each layer by itself, so that every layer is compared at its best; by number."""
        best = [trial for queue in self.searches.values() for trial in queue.study.best_trials]
        return sorted(best, key=lambda trial: trial.user_attrs["number"])


def main(text: str, folder: Path, name: str, url: str, uri: str, keep_seed: bool, threads: int) -> None:
    """Entry of a worker process; returns when no work is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then stops its workers
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    gc.collect()
    gc.freeze()  # all modules: a collection after a trial is then a matter of milliseconds
    try:
        with terminated_by_signal():
            spec = parse(text, folder, "in the storage")

            def begin() -> Worker:
                return Worker(StoredStudy(spec, name, store.open_storage(url), keep_seed), uri)

            asked_again()(begin).work()
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)


def _follow_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


class Worker:
    """Takes the jobs of a study until none is left."""

    def __init__(self, study: StoredStudy, uri: str) -> None:
        self.study, self.spec, self.uri = study, study.spec, uri
        self.client, self.experiment = tracking.open_store(uri, self.spec.name)
        self.environment = environment([study.attrs["threads"]], training_device())
        # hardened choices of stacked seeds multiply to numbers that are slow and as good as 0
        torch.set_flush_denormal(self.spec.vectorize_seeds)

    def work(self) -> None:
        """Do all there is to do."""
        filled, queues = float("-inf"), self.study.queues
        while True:
            if asked_again()(self._turn):
                continue
            if all(queue.all_finished() for queue in queues):
                return
            if time.monotonic() - filled > store.HEARTBEAT_S:
                for queue in queues:  # there are finalists now, or another worker has died
                    queue.fill()
                filled = time.monotonic()
            else:
                time.sleep(POLL_S)

    def _turn(self) -> int:
        # one of each queue
        errors = NonFiniteLossError, InvalidConfigError
        return sum(queue.run_one(self._objective, errors) for queue in self.study.queues)

    def _objective(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        with self.study.storage.exclusive():
            known = self.study.runs_study.user_attrs["environments"]
            if self.environment not in known:
                self.study.runs_study.set_user_attr("environments", [*known, self.environment])
        attrs = trial.user_attrs
        label = self.study.points[attrs["number"]].label
        searched, space = label in self.study.searches and not attrs.get("fresh"), self.spec.layers[label].space
        values = {name: part.suggest(trial, name) for name, part in space.items()} if searched else attrs["values"]
        means = _means(self._train(trial, label, values, searched))
        wanted = [*self.study.attrs["objectives"]] if searched else [self.study.attrs["monitor"]]
        limits = self.spec.constraints if searched else {}
        if missing := [name for name in (*wanted, *limits) if name not in means]:
            raise UserError(f"metric {missing[0]} is not measured; there are {', '.join(sorted(means))}")
        if undefined := [name for name in (*wanted, *limits) if math.isnan(means[name])]:
            raise NonFiniteLossError(f"{undefined[0]} is NaN: lower the learning rate or the aux_weights")
        for name, limit in limits.items():
            trial.set_constraint(name, means[name] - limit)
        return tuple(means[name] for name in wanted)

    def _train(self, trial: optuna.Trial, label: str, values: Values, searched: bool) -> list[Record]:
        # the seeds that are not there yet, each of which is stored as soon as it is trained
        attrs = trial.user_attrs
        number, seeds, fresh = attrs["number"], attrs["seeds"], attrs.get("fresh", False)
        records: dict[int, Record] = {seed: attrs[RUN + str(seed)] for seed in seeds if RUN + str(seed) in attrs}
        left = [seed for seed in seeds if seed not in records]
        layer, monitor = self.study.attrs["classes"][label], self.study.attrs["monitor"]
        together = self.spec.vectorize_seeds and not fresh
        tags = {"study": self.spec.name, "trial": str(number), "layer": layer} | ({"finalist": "true"} if fresh else {})
        parent: str = attrs.get("parent", self.study.attrs["run_id"])

        def results(parent: str) -> Iterator[Result]:
            if together:
                args, spec = self.spec.arguments(label, values, None)[1:], self.spec
                yield from train_seeds(args, left, test=spec.test, patience=spec.patience, fit=spec.fit)
                return
            for seed in left:
                args = self.spec.arguments(label, values, seed, fresh or self.spec.test)
                watch = [Pruning(trial, monitor)] if searched and self.spec.pruner and seed == seeds[0] else []
                result = run([*args, f"--tracking_uri={self.uri}"], Context(parent, tags, watch, quiet=True))
                assert result is not None
                yield result

        # the run of an earlier attempt goes on
        of_all = (self.client, self.experiment, f"trial {number} {layer}", tags, parent, attrs.get("run_id"))
        with tracking.Run(*of_all) if together or len(seeds) > 1 else nullcontext() as group:
            if group is not None:
                trial.set_user_attr("run_id", group.id)
            for seed, result in zip(left, results(parent if group is None else group.id), strict=True):
                if group is None:
                    trial.set_user_attr("run_id", result.run_id)
                trial.set_user_attr("sizes", result.sizes)
                if together and searched and (steps := result.metrics.get("stability/nonfinite_steps")):
                    raise NonFiniteLossError(
                        f"seed {seed}: loss not finite at {steps:.0f} steps: lower the learning rate or the aux_weights"
                    )
                of_run = {} if together else {"run_id": result.run_id, "backend": result.backend}
                records[seed] = {"seed": seed, **of_run, **result.metrics}
                trial.set_user_attr(RUN + str(seed), records[seed])  # before a tracking server may fail
                if group is not None and seed == seeds[0]:
                    group.text(result.config, "config.yaml")
                    group.params({**{n: v for n, v in result.params.items() if n != "seed"}, "seeds": seeds})
            if group is not None:
                group.log_metrics(_means([*records.values()]))
        return [*records.values()]


def _means(records: Sequence[Record]) -> dict[str, float]:
    names = set.intersection(*map(set, records)) - {"seed", "run_id", "backend"}
    return {name: fmean(record[name] for record in records) for name in names}

"""One process that takes trials and trains them."""

import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import torch
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback

from fffexp import tracking
from fffexp.errors import InvalidConfigError, NonFiniteLossError, UserError, terminated_by_signal
from fffexp.study import store
from fffexp.study.plan import chosen, finals_name, finals_work, search_work
from fffexp.study.spec import StudySpec, parse
from fffexp.study.summary import LATENCY
from fffexp.training.experiment import Context, Result, run
from fffexp.training.params import total_sizes
from fffexp.training.vectorized import Replicas

POLL_S = 0.5


def main(text: str, folder: Path, url: str, uri: str, keep_seed: bool, threads: int) -> None:
    """Entry of a worker process; returns when no work is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then stops its workers
    _follow_parent()
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with terminated_by_signal():
            Worker(parse(text, folder, "in the storage"), url, uri, keep_seed).work()
    except UserError as error:
        print(f"fffexp: {error}", file=sys.stderr)
        sys.exit(2)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _finished(study: optuna.Study, trial: optuna.Trial) -> bool:
    return study._storage.get_trial(trial._trial_id).state.is_finished()


class Worker:
    """Takes the trials of the search, then those of the finalists."""

    def __init__(self, spec: StudySpec, url: str, uri: str, keep_seed: bool) -> None:
        self.spec, self.url, self.uri = spec, url, uri
        storage = store.open_storage(url)
        if not keep_seed:
            spec.sampler.reseed_rng()
        self.search = optuna.load_study(study_name=spec.name, storage=storage, sampler=spec.sampler, pruner=spec.pruner)
        self.finals = optuna.load_study(study_name=finals_name(spec), storage=storage)
        self.client, self.experiment = tracking.open_store(uri, spec.name)
        self.parent: str = self.search.user_attrs["run_id"]

    def work(self) -> None:
        """Do all there is to do."""
        self._drain(self.search, search_work(self.spec), self._search_trial)
        self._drain(self.finals, finals_work(self.spec, self.search), self._final_trial)

    def _drain(
        self, study: optuna.Study, work: dict[int, dict[str, Any]], objective: Callable[[optuna.Trial], Any]
    ) -> None:
        checked = 0.0
        while not store.all_finished(study, work):
            if (trial := store.take(study, self.url)) is not None:
                self._do(study, trial, objective)
            elif time.monotonic() - checked > store.HEARTBEAT_S:
                store.fill(study, self.url, work)  # another worker may have died
                checked = time.monotonic()
            else:
                time.sleep(POLL_S)

    def _do(self, study: optuna.Study, trial: optuna.Trial, objective: Callable[[optuna.Trial], Any]) -> None:
        # not study.optimize, which takes a trial where we cannot lock. A trial that was given up in the meantime,
        # because this machine slept, say, keeps the state it was given.
        tell = partial(study.tell, trial, skip_if_finished=True)
        try:
            with get_heartbeat_thread(trial._trial_id, study._storage):
                values = objective(trial)
        except optuna.TrialPruned:
            tell(state=TrialState.PRUNED)
        except (NonFiniteLossError, InvalidConfigError) as error:
            if not _finished(study, trial):
                trial.set_user_attr("error", str(error))
            tell(state=TrialState.FAIL)
        except BaseException:  # Ctrl-C and SIGTERM too: it is told, and goes on
            # without an `error` of its own: its slot is filled again by whoever goes on
            tell(state=TrialState.FAIL)
            raise
        else:
            tell(values)

    def _search_trial(self, trial: optuna.Trial) -> tuple[float, ...]:
        trial.set_user_attr("host", platform.node())
        layer = trial.suggest_categorical("layer", list(self.spec.layers))
        space = self.spec.layers[layer].space
        values = {name: parameter.suggest(trial, f"{layer}.{name}") for name, parameter in space.items()}
        train = self._train_together if self.spec.vectorize_seeds else self._train_seeds
        results = train(trial, layer, values)
        means = {name: fmean(r.metrics[name] for r in results) for name in results[0].metrics}
        trial.set_user_attr("sizes", results[0].sizes)
        trial.set_user_attr("val_accuracies", [r.metrics["val/accuracy"] for r in results])
        if LATENCY in means:
            trial.set_user_attr("latency_ms", means[LATENCY])
        missing = [name for name in (*self.spec.objectives, *self.spec.constraints) if name not in means]
        if missing:
            raise UserError(f"metric {missing[0]} is not measured; there are {', '.join(sorted(means))}")
        trial.set_user_attr("feasible", all(means[n] <= limit for n, limit in self.spec.constraints.items()))
        for name, limit in self.spec.constraints.items():
            trial.set_constraint(name, means[name] - limit)
        return tuple(means[name] for name in self.spec.objectives)

    def _train_seeds(self, trial: optuna.Trial, layer: str, values: dict[str, Any]) -> list[Result]:
        tags = {"study": self.spec.name, "trial": str(trial.number)}
        seeds = self.spec.seeds
        if len(seeds) == 1:
            results = [self._train(layer, values, seeds[0], self.parent, tags, trial)]
            trial.set_user_attr("run_id", results[0].run_id)
            return results
        with tracking.run(
            self.client,
            self.experiment,
            f"trial {trial.number} {layer}",
            {**tags, "layer": layer},
            self.parent,
        ) as mean_run:
            trial.set_user_attr("run_id", mean_run.id)
            results = [
                self._train(layer, values, seed, mean_run.id, tags, None if i else trial)
                for i, seed in enumerate(seeds)
            ]
            mean_run.text(results[0].config, "config.yaml")
            mean_run.params({k: v for k, v in results[0].params.items() if k != "seed"} | {"seeds": seeds})
            shared = set.intersection(*(set(r.metrics) for r in results))
            mean_run.metrics({name: fmean(r.metrics[name] for r in results) for name in shared})
        return results

    def _train_together(self, trial: optuna.Trial, layer: str, values: dict[str, Any]) -> list[Result]:
        tags = {"study": self.spec.name, "trial": str(trial.number), "layer": layer}
        name = f"trial {trial.number} {layer}"
        with tracking.run(self.client, self.experiment, name, tags, self.parent) as run_of_all:
            trial.set_user_attr("run_id", run_of_all.id)
            replicas = Replicas(self.spec.arguments(layer, values, None, test=False)[1:], self.spec.seeds)
            run_of_all.text(replicas.config, "config.yaml")
            run_of_all.params({k: v for k, v in replicas.params.items() if k != "seed"} | {"seeds": self.spec.seeds})
            trained = replicas.train(test=False)
            means = {name: fmean(r.metrics()[name] for r in trained) for name in trained[0].metrics()}
            run_of_all.metrics(means)
            for replica in trained:
                if replica.nonfinite_steps:
                    raise NonFiniteLossError(
                        f"the loss of seed {replica.seed} was not finite at {replica.nonfinite_steps} steps: "
                        "lower the learning rate or the aux_weights"
                    )
        sizes = total_sizes(replicas.task)
        return [Result(run_of_all.id, r.metrics(), replicas.params, sizes, replicas.config) for r in trained]

    def _final_trial(self, trial: optuna.Trial) -> float:
        trial.set_user_attr("host", platform.node())
        number, seed = (trial.suggest_int(name, 0, 2**31 - 1) for name in ("trial", "seed"))
        source = self.search.trials[number]
        layer, values = chosen(source)
        tags = {"study": self.spec.name, "trial": str(number), "finalist": "true"}
        result = self._train(layer, values, seed, source.user_attrs["run_id"], tags, None, test=True)
        trial.set_user_attr("metrics", result.metrics)
        trial.set_user_attr("run_id", result.run_id)
        return result.metrics["val/accuracy"]

    def _train(
        self,
        layer: str,
        values: dict[str, Any],
        seed: int,
        parent: str,
        tags: dict[str, str],
        trial: optuna.Trial | None,
        test: bool = False,
    ) -> Result:
        args = [*self.spec.arguments(layer, values, seed, test), f"--tracking_uri={self.uri}"]
        callbacks = []
        if trial is not None and self.spec.pruner is not None:
            callbacks = [PyTorchLightningPruningCallback(trial, "val/accuracy")]
        result = run(args, Context(parent=parent, tags=tags, callbacks=callbacks, quiet=True))
        assert result is not None
        return result

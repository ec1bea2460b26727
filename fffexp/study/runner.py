"""Running a study: workers that share a storage, progress, and the summary."""

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import optuna
from mlflow.exceptions import MlflowException
from optuna.trial import FrozenTrial, TrialState

from fffexp import paths, tracking
from fffexp.errors import UserError
from fffexp.report import page
from fffexp.report.text import settings
from fffexp.stores import store_lock
from fffexp.study import store, summary, worker
from fffexp.study.plan import chosen, finalists, finals_name, finals_work, pareto, search_work
from fffexp.study.spec import Direction, StudySpec, digest
from fffexp.training.experiment import check

STOP_S = 60  # for a worker to mark its trial when it is told to stop


class StudyRunner:
    """One command's share in a study."""

    def __init__(self, spec: StudySpec, text: str, url: str, uri: str, jobs: int) -> None:
        if jobs < 1:
            raise UserError(f"--jobs is {jobs}; it must be at least 1")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spec, self.text, self.url, self.uri, self.jobs = spec, text, url, uri, jobs
        self.storage = store.open_storage(url)
        self.client, experiment = tracking.open_store(uri, spec.name)
        self._check_corners()
        with store_lock(url):
            self.search = self._create(spec.name, list(spec.objectives.values()))
            self.finals = self._create(finals_name(spec), ["maximize"])
            self._describe(experiment)
        self.run_id: str = self.search.user_attrs["run_id"]

    def _check_corners(self) -> None:
        # a mistake in the space should be told now, not by the trial that meets it
        for layer in self.spec.layers:
            for values in self.spec.corners(layer):
                where = f"study {self.spec.name}, layer {layer} with {settings(values)}"
                try:
                    found = check(self.spec.arguments(layer, values, self.spec.seeds[0], test=False)).layer
                except UserError as error:
                    raise UserError(f"{where}: {error}") from error
                if found != layer:
                    raise UserError(f"{where}: its config makes a {found}; call it that under layers")

    def _create(self, name: str, directions: Sequence[Direction]) -> optuna.Study:
        return optuna.create_study(
            study_name=name,
            storage=self.storage,
            directions=directions,
            load_if_exists=True,
            sampler=self.spec.sampler,
        )

    def _describe(self, experiment: str) -> None:
        mark, attrs = digest(self.spec, self.text), self.search.user_attrs
        if attrs.get("digest", mark) != mark:
            raise UserError(
                f"study {self.spec.name} was begun with another definition: "
                "restore its file and configs, or give the new one another name"
            )
        self.begun_here = "digest" not in attrs
        if self.begun_here:
            run = tracking.Run(self.client, experiment, self.spec.name, {"study": self.spec.name}, None)
            run.text(self.text, "study.yaml")
            self.search.set_user_attr("text", self.text)
            self.search.set_user_attr("folder", str(self.spec.folder))
            self.search.set_user_attr("threads", max(1, (os.cpu_count() or 1) // self.jobs))
            self.search.set_user_attr("worked_s", 0.0)
            self.search.set_user_attr("run_id", run.id)
            self.search.set_user_attr("digest", mark)

    def run(self) -> summary.Summary:
        """Do what is left, and summarise."""
        try:
            run = tracking.Run(self.client, run_id=self.run_id)
        except MlflowException as error:
            raise UserError(
                f"study {self.spec.name} is not tracked in {self.uri}: give the --tracking_uri that it was begun with"
            ) from error
        try:
            store.fill(self.search, self.url, search_work(self.spec))
            if not self._complete():
                self._work()
            if not self._complete():
                raise RuntimeError(f"study {self.spec.name} is not finished; `fffexp study resume` goes on")
            result = self.summarize()
            for path in page.write(result, paths.studies() / self.spec.name):
                run.file(path)
            self._log_finals(result)
        except BaseException:
            run.end("FAILED")
            raise
        run.end("FINISHED")
        return result

    def _complete(self) -> bool:
        return store.all_finished(self.search, search_work(self.spec)) and store.all_finished(
            self.finals, finals_work(self.spec, self.search)
        )

    def _work(self) -> None:
        begun = time.monotonic()
        # latencies are compared with each other, so all are measured with as many threads
        threads = self.search.user_attrs["threads"]
        # libraries read these when they start, which is before a worker can set them
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        context = multiprocessing.get_context("spawn")
        shared = (self.text, self.spec.folder, self.url, self.uri)
        # the first worker of whoever begins a study keeps to the sampler's seed; any other with it would draw the same
        seeded = [self.begun_here and i == 0 for i in range(self.jobs)]
        workers = [context.Process(target=worker.main, args=(*shared, keep, threads)) for keep in seeded]
        progress = Progress(self.spec, self.search, self.finals)
        try:
            for process in workers:
                process.start()
            while any(process.is_alive() for process in workers):
                progress.update()
                _raise_failure(workers)
                time.sleep(worker.POLL_S)
            _raise_failure(workers)
            progress.update()
        finally:
            for process in workers:
                if process.is_alive():
                    process.terminate()
            for process in workers:
                if process.pid is not None:
                    process.join(STOP_S)
            worked = self.search.user_attrs["worked_s"] + time.monotonic() - begun
            self.search.set_user_attr("worked_s", worked)

    def _log_finals(self, result: summary.Summary) -> None:
        for trial in result["trials"]:
            if trial["run_id"] and trial["mean"] is not None and trial["test_mean"] is not None:
                self.client.log_metric(trial["run_id"], "final/val_accuracy", trial["mean"])
                self.client.log_metric(trial["run_id"], "final/test_accuracy", trial["test_mean"])

    def summarize(self) -> summary.Summary:
        """What came out so far."""
        trials = self.search.get_trials(deepcopy=False)
        slots = store.current(self.search)
        records = [self._record(slots[slot]) for slot in sorted(slots) if "layer" in slots[slot].params]
        front = pareto(self.spec, trials)
        latency = {t.number: t.user_attrs.get("latency_ms", 0.0) for t in trials}
        by_number = {t.number: t for t in trials}
        best = max(front, key=lambda n: (by_number[n].values[0], -latency[n]), default=None)
        result: summary.Summary = {
            "study": self.spec.name,
            "directions": list(self.spec.objectives.values()),
            "metrics": list(self.spec.objectives),
            "seeds": self.spec.seeds,
            "trials": sorted(records, key=lambda r: r["number"]),
            "pareto": front,
            "finalists": finalists(self.spec, self.search),
            "best": best,
            "machines": len(
                {t.user_attrs.get("host") for t in trials + self.finals.get_trials(deepcopy=False)} - {None}
            ),
            "wall_s": self.search.user_attrs["worked_s"],
        }
        summary.fill_statistics(result)
        return result

    def _record(self, trial: FrozenTrial) -> summary.Trial:
        layer, values = chosen(trial)
        finals = sorted(
            (t.params["seed"], t.user_attrs["metrics"])
            for t in self.finals.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if t.params["trial"] == trial.number
        )
        final: summary.Final = {
            "val/accuracy": [m["val/accuracy"] for _, m in finals],
            "test/accuracy": [m["test/accuracy"] for _, m in finals],
            "latency_ms": [m["speed/latency_b256_ms"] for _, m in finals],
        }
        return {
            "number": trial.number,
            "state": trial.state.name,
            "params": {"layer": layer, **values},
            "values": trial.values,
            "val_accuracies": trial.user_attrs.get("val_accuracies", []),
            "run_id": trial.user_attrs.get("run_id"),
            "seeds": [seed for seed, _ in finals],
            "mean": None,
            "ci95": None,
            "sizes": trial.user_attrs.get("sizes"),
            "final": final if finals else None,
            "test_mean": None,
            "test_ci95": None,
            "ties": [],
        }


def _raise_failure(workers: Sequence[BaseProcess]) -> None:
    for process in workers:
        if process.exitcode == 2:
            raise UserError("a worker met the mistake above; nothing that was finished is lost")
        if process.exitcode:
            raise RuntimeError(
                f"a worker ended with status {process.exitcode}; `fffexp study resume` goes on from what is finished"
            )


class Progress:
    """Lines that tell how far a study is."""

    def __init__(self, spec: StudySpec, search: optuna.Study, finals: optuna.Study) -> None:
        self.spec, self.search, self.finals = spec, search, finals
        self._trials = Phase(search, spec.trials)
        self._finals: Phase | None = None

    def update(self) -> None:
        """Print what was finished since the last call."""
        for trial in self._trials.news():
            top = max((t for t in self._trials.done.values() if t.values), key=lambda t: t.values[0], default=None)
            best = f"  best {100 * top.values[0]:.1f}% ({top.params['layer']})" if top else ""
            print(f"trial {self._trials.line(trial, *chosen(trial))}{best}", flush=True)
        if len(self._trials.done) < self.spec.trials:
            return
        self._finals = self._finals or Phase(self.finals, len(finals_work(self.spec, self.search)))
        for trial in self._finals.news():
            layer, values = chosen(self.search.get_trials(deepcopy=False)[trial.params["trial"]])
            line = self._finals.line(trial, layer, {**values, "seed": trial.params["seed"]})
            print(f"final {line}", flush=True)


class Phase:
    """Finished slots of one Optuna study, and the time that the others will take."""

    def __init__(self, study: optuna.Study, total: int) -> None:
        self.study, self.total = study, total
        self.done = self._finished()
        self._begun, self._before = time.monotonic(), len(self.done)

    def _finished(self) -> dict[int, FrozenTrial]:
        return {slot: trial for slot, trial in store.current(self.study).items() if store.finished(trial)}

    def news(self) -> list[FrozenTrial]:
        """Trials finished since the last call."""
        known, self.done = self.done, self._finished()
        return [trial for slot, trial in self.done.items() if slot not in known]

    def line(self, trial: FrozenTrial, layer: str, values: dict[str, Any]) -> str:
        """How far it is, what the trial was and what came of it."""
        count = len(self.done)
        left = (time.monotonic() - self._begun) / max(count - self._before, 1) * (self.total - count)
        score = f"{100 * trial.values[0]:.1f}%" if trial.values else trial.user_attrs.get("error", trial.state.name)
        return f"{count} of {self.total}  {layer} {settings(values)}  {score}  {left:.0f} s left"

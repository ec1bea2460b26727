"""Running a study: workers that share a storage, progress, and the results."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from mlflow.exceptions import MlflowException

from fffexp import paths, tracking
from fffexp.errors import UserError, report
from fffexp.outages import hurry
from fffexp.report import page
from fffexp.report.text import settings, value
from fffexp.study import store, worker
from fffexp.study.results import LATENCY, Record, Results, Trial
from fffexp.study.spec import StudySpec, Values
from fffexp.study.worker import StoredStudy
from fffexp.training.experiment import build

MAX_LOST = 5  # workers in a row


class StudyRunner:
    """One command's share in a study; `url` is of the Optuna storage, `uri` of the MLflow store.

    Results go to the study's folder, or complete the file `path`: runs that it has, by the recipe of their point, are
    not trained again, and new ones are written as soon as they end. It must hold what `extra` says, and gets it.
    """

    def __init__(
        self, spec: StudySpec, url: str, uri: str, jobs: int, path: Path | None = None, extra: Values | None = None
    ) -> None:
        self.spec, self.url, self.uri, self.jobs, self.path, self.extra = spec, url, uri, jobs, path, {**(extra or {})}
        mark = spec.digest()
        # one file may be completed by many definitions
        self.name = spec.name if path is None else f"{spec.name}-{mark[:8]}"
        self.recipes = {n: spec.recipe(label, of) for n, label, of in spec.points() if label not in spec.searched}
        self.file = Results.load(path) if path is not None and path.exists() else None
        if other := [key for key, of in self.extra.items() if self.file and self.file.extra.get(key) != of]:
            raise UserError(f"{path} holds another {other[0]}: give another file, or remove it")
        self.storage = store.open_storage(url)
        self.client, self.experiment = tracking.open_store(uri, spec.name)
        runs = store.studies(self.storage).get(f"{self.name}/runs")
        attrs = runs.user_attrs if runs else {}
        if attrs.get("digest", mark) != mark:
            raise UserError(
                f"study {spec.name} was begun with another definition: restore its file and configs, "
                f"give the new one another name, or `fffexp study delete {spec.name}`"
            )
        described = {} if "digest" in attrs else self._describe()
        with self.storage.exclusive():
            self._create(described, mark)
        self.study = StoredStudy(spec, self.name, self.storage)

    def _describe(self) -> dict[str, Any]:
        # a mistake ends here, not in the trial that meets it
        classes: dict[str, str] = {}
        for label, values in [(each, values) for each in self.spec.layers for values in self.spec.corners(each)]:
            where = f"study {self.spec.name}, layer {label} with {settings(values) or 'no parameters'}"
            try:
                built = build(self.spec.arguments(label, values, self.spec.seeds[0]))
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            layer = built.params["layer"] or "none"
            if classes.setdefault(label, layer) != layer:
                raise UserError(f"{where}: it makes a {layer}, others a {classes[label]}: label them apart")
        task, known = built.task, built.measurable
        objectives = self.spec.default_objectives(task.monitor, task.mode)
        if unknown := [name for name in (*objectives, *self.spec.constraints) if name not in known]:
            raise UserError(f"metric {unknown[0]} is not measured; there are {', '.join(known)}")
        monitored = {"monitor": task.monitor, "mode": task.mode, "unit": task.unit_monitor}
        return monitored | {"classes": classes, "objectives": objectives}

    def _create(self, described: dict[str, Any], mark: str) -> None:
        runs = optuna.create_study(study_name=f"{self.name}/runs", storage=self.storage, load_if_exists=True)
        self.begun_here = "digest" not in runs.user_attrs
        if self.path is not None:  # seeds that the file has of each point
            have = {t.recipe: [run["seed"] for run in t.runs] for t in self.file.trials} if self.file else {}
            runs.set_user_attr("known", {str(number): have.get(recipe, []) for number, recipe in self.recipes.items()})
        if not self.begun_here:
            return
        for part in (f"{self.name}/{label}" for label in self.spec.searched):
            directions = list(described["objectives"].values())
            optuna.create_study(study_name=part, storage=self.storage, directions=directions, load_if_exists=True)
        run = tracking.Run(self.client, self.experiment, self.spec.name, {"study": self.spec.name}, None)
        run.text(self.spec.text, "study.yaml")
        attrs = described | {
            "text": self.spec.text,
            "folder": str(self.spec.folder),
            # latencies are compared with each other, so all are measured with as many threads
            "threads": max(1, (os.cpu_count() or 1) // self.jobs),
            "worked_s": 0.0,
            "environments": [],
            "run_id": run.id,
            "digest": mark,  # last: the study is begun
        }
        for key, attr in attrs.items():
            runs.set_user_attr(key, attr)

    def run(self) -> Results:
        """Do what is left, and summarise."""
        try:
            run = tracking.Run(self.client, run_id=self.study.attrs["run_id"])
        except MlflowException as error:
            raise UserError(f"not tracked in {self.uri}: give the --tracking_uri that it was begun with") from error
        with run:
            for queue in self.study.queues:
                queue.fill()
            if not self._complete():
                self._work()
            if not self._complete():
                raise RuntimeError(f"study {self.spec.name} is not finished; `fffexp study resume` goes on")
            results = self._results()
            if self.path is not None:
                results.save(self.path)
                return results
            for path in page.write(results, paths.outputs("studies", self.spec.name)):
                run.file(path)
            for trial in (trial for trial in results.trials if trial.run_id and trial.evaluation):
                for metric, mean in ((results.monitor, trial.mean), (results.test_monitor, trial.test_mean)):
                    if mean is not None:
                        self.client.log_metric(str(trial.run_id), f"final/{metric.replace('/', '_')}", mean)
            return results

    def _complete(self) -> bool:
        return all(queue.all_finished() for queue in self.study.queues)

    def _work(self) -> None:
        begun, runs, threads = time.monotonic(), self.study.runs_study, self.study.attrs["threads"]
        # libraries read these when they start, which is before a worker can set them
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        same = (self.spec.text, self.spec.folder, self.name, self.url, self.uri)
        # the first worker of whoever begins a study keeps to the sampler's seed; any other with it would draw the same
        spawn = multiprocessing.get_context("spawn").Process
        firsts = [self.begun_here, *[False] * (self.jobs - 1)]
        workers = [spawn(target=worker.main, args=(*same, first, threads)) for first in firsts]
        lost = 0  # workers that did nothing, since a job was finished
        progress = [_progress(self.study, queues) for queues in (self.study.queues[:-1], self.study.queues[-1:])]
        for part in progress:  # what is finished by now is not news
            next(part)
        try:
            for process in workers:
                process.start()
            alive = True
            while alive:
                time.sleep(worker.POLL_S)
                alive = any(process.is_alive() for process in workers)  # before the rest, which then misses nothing
                if sum(map(next, progress)):
                    lost = 0
                    if self.path is not None:
                        self._results().save(self.path)
                for process in [each for each in workers if each.exitcode]:
                    # what it did is given up one day; without, it may be that none can work
                    lost += not sum(queue.give_up(process.pid or 0) for queue in self.study.queues)
                    self._replaceable(process.exitcode or 0, lost)
                    workers[workers.index(process)] = new = spawn(target=worker.main, args=(*same, False, threads))
                    new.start()
                    alive = True
        finally:
            left = [process for process in workers if process.is_alive()]
            if left:
                hurry()
            for process in left:
                process.terminate()
            for process in left:
                process.join(60)  # in which it marks its trial
            runs.set_user_attr("worked_s", runs.user_attrs["worked_s"] + time.monotonic() - begun)

    def _replaceable(self, status: int, lost: int) -> None:
        if status == 2:
            raise UserError("a worker met the mistake above; nothing that was finished is lost")
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if lost > MAX_LOST:
            raise UserError(
                f"{lost} workers ended before they began anything, the last {how}: nothing that was finished is lost; "
                f"see what ends them, such as too little memory, then `fffexp study resume {self.spec.name}`"
            )
        report(f"a worker {how}: another takes its place")

    def _results(self) -> Results:
        attrs = self.study.runs_study.user_attrs
        results = Results(
            self.spec.name,
            **{key: attrs[key] for key in ("monitor", "mode", "unit", "environments")},
            directions=list(attrs["objectives"].values()),
            metrics=list(attrs["objectives"]),
            seeds=self.spec.seeds,
            finalists=[trial.user_attrs["number"] for trial in self.study.finalists()],
            machines=max(1, len({environment["host"] for environment in attrs["environments"]})),
            wall_s=attrs["worked_s"],
            extra=self.extra,
        )
        results.trials = self._trials(results)
        if self.file is not None:
            results = merged(self.file, results)
        complete = [t for t in results.trials if t.state == "COMPLETE" and t.values and self._feasible(results, t)]
        results.pareto = pareto(complete, results.directions)
        best = max(
            complete,
            key=lambda t: (
                results.sign * (results.selected_by(t) or 0.0),
                -(results.selected_by(t, LATENCY) or math.inf),
            ),
            default=None,
        )
        results.best = None if best is None else best.number
        return results

    def _feasible(self, results: Results, trial: Trial) -> bool:
        means = [(results.selected_by(trial, name), limit) for name, limit in self.spec.constraints.items()]
        return all(mean is not None and mean <= limit for mean, limit in means)

    def _trials(self, results: Results) -> list[Trial]:
        jobs: dict[int, list[optuna.trial.FrozenTrial]] = {}
        for job in (job for queue in self.study.queues for job in queue.trials().values()):
            jobs.setdefault(job.user_attrs["number"], []).append(job)
        made = []
        for number, point in self.study.points.items():
            own = [job for job in jobs.get(number, []) if not job.user_attrs.get("fresh")]
            searched = point.label in self.study.searches
            values = own[0].params if own and searched else point.values
            if not own or (searched and not values):
                continue  # nobody has begun it
            errors = [error for job in own if (error := store.error_of(job))]
            stored: dict[str, Any] = {name: attr for job in reversed(own) for name, attr in job.user_attrs.items()}
            trial = Trial(
                number=number,
                state=next((job.state.name for job in own if job.state.name != "COMPLETE"), "COMPLETE"),
                params={"layer": self.study.attrs["classes"][point.label], **values},
                runs=_records(own),
                evaluation=_records([job for job in jobs[number] if job not in own]),
                attempts=max(map(store.attempts, own)),
                recipe=self.recipes.get(number),
                error=errors[0] if errors else None,
                **{key: stored[key] for key in ("run_id", "sizes") if key in stored},
            )
            if searched:
                trial.values = own[0].values
            elif trial.state == "COMPLETE":
                means = [results.selected_by(trial, name) for name in results.metrics]
                trial.values = [mean for mean in means if mean is not None] if None not in means else None
            made.append(trial)
        return made


def merged(file: Results, new: Results) -> Results:
    """The results of a file with the runs that it does not have; its trials keep their numbers."""
    by_recipe = {trial.recipe: trial for trial in file.trials}
    for trial in new.trials:
        old = by_recipe.setdefault(trial.recipe, trial)
        if old is trial:
            trial.number = max((t.number for t in file.trials), default=-1) + 1
            file.trials.append(trial)
        runs = {run["seed"]: run for run in (*trial.runs, *old.runs)}  # the file's before the new ones
        old.runs = [runs[seed] for seed in sorted(runs)]
        old.sizes, old.state = old.sizes or trial.sizes, trial.state
    file.environments += [each for each in new.environments if each not in file.environments]
    file.seeds = sorted({*file.seeds, *new.seeds})
    return file


def pareto(trials: Sequence[Trial], directions: Sequence[Any]) -> list[int]:
    """Numbers of the trials that no other beats in every objective; with one objective, of the best."""
    study = optuna.create_study(directions=directions)
    study.add_trials([optuna.create_trial(values=t.values, user_attrs={"number": t.number}) for t in trials])
    return sorted(best.user_attrs["number"] for best in study.best_trials)


def _records(jobs: Sequence[optuna.trial.FrozenTrial]) -> list[Record]:
    found = {v["seed"]: v for job in jobs for name, v in job.user_attrs.items() if name.startswith(worker.RUN)}
    return [found[seed] for seed in sorted(found)]


def _progress(study: StoredStudy, queues: Sequence[store.Queue]) -> Iterator[bool]:
    # prints each time what was finished since, and how long the rest takes; yields whether anything was
    begun, seen = time.monotonic(), {(queue, key) for queue in queues for key in queue.finished()}
    before = len(seen)
    while True:
        finished = {(queue, key): job for queue in queues for key, job in queue.finished().items()}
        new, total = [key for key in finished if key not in seen], sum(len(queue.jobs()) for queue in queues)
        if not total:  # finalists come when the search has ended
            begun = time.monotonic()
        for key in new:
            seen.add(key)
            job, count = finished[key], len(seen)
            attrs = job.user_attrs
            left_s = (time.monotonic() - begun) / (count - before) * (total - count)
            label = study.points[attrs["number"]].label
            kind = "final" if attrs.get("fresh") else "trial" if label in study.searches else "run"
            values = {**job.params, **attrs.get("values", {})}
            if kind != "trial":
                values["seed"] = " ".join(map(str, attrs["seeds"]))
            scores = [record[study.attrs["monitor"]] for record in _records([job])]
            score = value(fmean(scores), unit=study.attrs["unit"]) if scores else store.error_of(job) or job.state.name
            where = f"{kind} {count} of {total}, {left_s:.0f} s left: {study.attrs['classes'][label]}"
            print(f"{where} {settings(values)}  {score}", flush=True)
        yield bool(new)

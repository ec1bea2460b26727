"""Running a study: workers that share a storage, progress, and the results."""

import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from mlflow.exceptions import MlflowException
from optuna.trial import FrozenTrial

from fffexp import paths, tracking
from fffexp.errors import UserError
from fffexp.report import page
from fffexp.report import text as texts
from fffexp.report.text import settings
from fffexp.study import store, worker
from fffexp.study.results import LATENCY, Record, Results, Trial
from fffexp.study.spec import StudySpec, digest
from fffexp.study.store import Queue
from fffexp.study.worker import StoredStudy
from fffexp.training.experiment import Checked, check

STOP_S = 60  # for a worker to mark its trial when it is stopped


class StudyRunner:
    """One command's share in a study.

    Args:
        spec: of the study.
        text: the YAML that the spec was parsed from, which workers parse again.
        url: of the Optuna storage.
        uri: of the MLflow store.
        jobs: worker processes.
        results_path: file that is completed: runs that it has are not trained again, and new ones are written as
            soon as they end. Points are recognised by their recipe. The study's folder is left alone then.
        extra: further keys of that file; one that holds other values is of another measurement.
    """

    def __init__(
        self,
        spec: StudySpec,
        text: str,
        url: str,
        uri: str,
        jobs: int,
        results_path: Path | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec, self.text, self.url, self.uri, self.jobs = spec, text, url, uri, jobs
        self.path, self.extra = results_path, dict(extra or {})
        mark = digest(spec, text)
        # one file may be completed by many definitions
        self.name = spec.name if results_path is None else f"{spec.name}-{mark[:8]}"
        self.recipes = {point.number: spec.recipe(point.label, point.values) for point in spec.points() if point.values}
        self.file = self._load()
        self.storage = store.open_storage(url)
        self.client, self.experiment = tracking.open_store(uri, spec.name)
        attrs = self._attrs()
        if attrs.get("digest", mark) != mark:
            raise UserError(
                f"study {spec.name} was begun with another definition: restore its file and configs, "
                f"give the new one another name, or `fffexp study delete {spec.name}`"
            )
        described = {} if "digest" in attrs else self._describe()
        with self.storage.exclusive():
            self._create(described, mark)
        self.study = StoredStudy(spec, self.name, self.storage)

    def _attrs(self) -> dict[str, Any]:
        if f"{self.name}/runs" not in optuna.get_all_study_names(self.storage):
            return {}
        return optuna.load_study(study_name=f"{self.name}/runs", storage=self.storage).user_attrs

    def _describe(self) -> dict[str, Any]:
        """What is known of a study before its first trial; a mistake ends here, not in the trial that meets it."""
        classes: dict[str, str] = {}
        checked: Checked | None = None
        for label in self.spec.layers:
            for values in self.spec.corners(label):
                where = f"study {self.spec.name}, layer {label} with {settings(values) or 'no parameters'}"
                try:
                    checked = check(self.spec.arguments(label, values, self.spec.seeds[0]))
                except UserError as error:
                    raise UserError(f"{where}: {error}") from error
                layer = checked.layer or "none"
                if classes.setdefault(label, layer) != layer:
                    raise UserError(f"{where}: it makes a {layer}, others a {classes[label]}: label them apart")
        assert checked is not None
        objectives = self.spec.default_objectives(checked.monitor, checked.mode)
        for name in (*objectives, *self.spec.constraints):
            if name not in checked.metrics:
                raise UserError(
                    f"study {self.spec.name}: metric {name} is not measured; there are {', '.join(checked.metrics)}"
                )
        monitored = {"monitor": checked.monitor, "mode": checked.mode, "unit": checked.unit}
        return monitored | {"classes": classes, "objectives": objectives}

    def _create(self, described: dict[str, Any], mark: str) -> None:
        runs = optuna.create_study(study_name=f"{self.name}/runs", storage=self.storage, load_if_exists=True)
        self.begun_here = "digest" not in runs.user_attrs
        if self.path is not None:
            runs.set_user_attr("known", self._known())
        if not self.begun_here:
            return
        for label in self.spec.searched:
            optuna.create_study(
                study_name=f"{self.name}/{label}",
                storage=self.storage,
                directions=list(described["objectives"].values()),
                load_if_exists=True,
            )
        run = tracking.Run(self.client, self.experiment, self.spec.name, {"study": self.spec.name}, None)
        run.text(self.text, "study.yaml")
        attrs = described | {
            "text": self.text,
            "folder": str(self.spec.folder),
            # latencies are compared with each other, so all are measured with as many threads
            "threads": max(1, (os.cpu_count() or 1) // self.jobs),
            "worked_s": 0.0,
            "environments": [],
            "run_id": run.id,
            "digest": mark,  # last: the study is begun
        }
        for key, value in attrs.items():
            runs.set_user_attr(key, value)

    def run(self) -> Results:
        """Do what is left, and summarise."""
        run_id = self.study.attrs["run_id"]
        try:
            run = tracking.Run(self.client, run_id=run_id)
        except MlflowException as error:
            raise UserError(
                f"study {self.spec.name} is not tracked in {self.uri}: give the --tracking_uri that it was begun with"
            ) from error
        try:
            for queue in self.study.queues:
                queue.fill()
            if not self._complete():
                self._work()
            if not self._complete():
                raise RuntimeError(f"study {self.spec.name} is not finished; `fffexp study resume` goes on")
            results = self.results()
            if self.path is None:
                for path in page.write(results, paths.studies() / self.spec.name):
                    run.file(path)
                self._log_finals(results)
            else:
                results.save(self.path)
        except BaseException:
            run.end("FAILED")
            raise
        run.end("FINISHED")
        return results

    def _complete(self) -> bool:
        return all(queue.all_finished() for queue in self.study.queues)

    def _work(self) -> None:
        begun = time.monotonic()
        attrs, runs = self.study.attrs, self.study.runs_study
        threads: int = attrs["threads"]
        # libraries read these when they start, which is before a worker can set them
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        context = multiprocessing.get_context("spawn")
        shared = (self.text, self.spec.folder, self.name, self.url, self.uri)
        # the first worker of whoever begins a study keeps to the sampler's seed; any other with it would draw the same
        seeded = [self.begun_here and i == 0 for i in range(self.jobs)]
        workers = [context.Process(target=worker.main, args=(*shared, keep, threads)) for keep in seeded]
        progress = Progress(self.study)
        try:
            for process in workers:
                process.start()
            while any(process.is_alive() for process in workers):
                self._update(progress)
                _raise_failure(workers)
                time.sleep(worker.POLL_S)
            _raise_failure(workers)
            self._update(progress)
        finally:
            for process in workers:
                if process.is_alive():
                    process.terminate()
            for process in workers:
                if process.pid is not None:
                    process.join(STOP_S)
            runs.set_user_attr("worked_s", runs.user_attrs["worked_s"] + time.monotonic() - begun)

    def _update(self, progress: "Progress") -> None:
        if progress.update() and self.path is not None:
            self.results().save(self.path)

    def _log_finals(self, results: Results) -> None:
        for trial in results.trials:
            if trial.run_id and trial.evaluation:
                for metric, mean in ((results.monitor, trial.mean), (results.test_monitor, trial.test_mean)):
                    if mean is not None:
                        self.client.log_metric(trial.run_id, f"final/{metric.replace('/', '_')}", mean)

    def results(self) -> Results:
        """What came out so far, and with a file what that holds."""
        attrs = self.study.runs_study.user_attrs
        results = Results(
            study=self.spec.name,
            monitor=attrs["monitor"],
            mode=attrs["mode"],
            unit=attrs["unit"],
            directions=list(attrs["objectives"].values()),
            metrics=list(attrs["objectives"]),
            seeds=self.spec.seeds,
            trials=self._trials(attrs),
            finalists=self.study.finalists(),
            environments=attrs["environments"],
            wall_s=attrs["worked_s"],
            extra=self.extra,
        )
        hosts = {environment["host"] for environment in results.environments}
        results.machines = max(1, len(hosts))
        if self.file is not None:
            results = merged(self.file, results)
        results.update()
        complete = [t for t in results.trials if t.state == "COMPLETE" and t.values and self._feasible(t)]
        results.pareto = pareto(complete, results.directions)
        results.best = max(complete, key=lambda t: _rank(results, t)).number if complete else None
        return results

    def _feasible(self, trial: Trial) -> bool:
        return all(
            (values := trial.by_seed(name, trial.runs).values()) and fmean(values) <= limit
            for name, limit in self.spec.constraints.items()
        )

    def _trials(self, attrs: Mapping[str, Any]) -> list[Trial]:
        searched = self.study.trials()
        others: dict[int, list[FrozenTrial]] = {}
        for job in store.current(self.study.runs_study).values():
            others.setdefault(job.user_attrs["number"], []).append(job)
        made = []
        for number, point in self.study.points.items():
            jobs = [searched[number]] if number in searched else [j for j in others.get(number, []) if not _fresh(j)]
            values = jobs[0].params if number in searched else point.values
            if not jobs or (number in searched and not values and point.label in self.study.searches):
                continue
            trial = Trial(
                number=number,
                state=_state(jobs),
                params={"layer": attrs["classes"][point.label], **values},
                values=jobs[0].values if number in searched else None,
                runs=_records(jobs),
                evaluation=_records(filter(_fresh, others.get(number, []))),
                run_id=next((j.user_attrs["run_id"] for j in jobs if "run_id" in j.user_attrs), None),
                sizes=next((j.user_attrs["sizes"] for j in jobs if "sizes" in j.user_attrs), None),
                attempts=max(map(store.attempts, jobs)),
                error=next((j.user_attrs["error"] for j in jobs if "error" in j.user_attrs), None),
                recipe=self.recipes.get(number) if number not in searched else None,
            )
            if number not in searched and trial.state == "COMPLETE":
                means = [trial.by_seed(name, trial.runs).values() for name in attrs["objectives"]]
                trial.values = [fmean(mean) for mean in means] if all(means) else None
            made.append(trial)
        return made

    def _load(self) -> Results | None:
        if self.path is None or not self.path.exists():
            return None
        found = Results.load(self.path)
        if other := [key for key, value in self.extra.items() if found.extra.get(key) != value]:
            raise UserError(f"{self.path} holds another {other[0]}: give another file, or remove it")
        return found

    def _known(self) -> dict[str, list[int]]:
        """Seeds that the file has of each point."""
        by_recipe = {trial.recipe: trial for trial in self.file.trials} if self.file else {}
        return {
            str(number): [run["seed"] for run in by_recipe[recipe].runs]
            for number, recipe in self.recipes.items()
            if recipe in by_recipe
        }


def merged(file: Results, new: Results) -> Results:
    """The results of a file with the runs that it does not have; its trials keep their numbers."""
    by_recipe = {trial.recipe: trial for trial in file.trials}
    for trial in new.trials:
        old = by_recipe.get(trial.recipe)
        if old is None:
            trial.number = max((t.number for t in file.trials), default=-1) + 1
            file.trials.append(trial)
            by_recipe[trial.recipe] = trial
            continue
        have = {run["seed"] for run in old.runs}
        old.runs = sorted([*old.runs, *(run for run in trial.runs if run["seed"] not in have)], key=lambda r: r["seed"])
        old.sizes, old.state = old.sizes or trial.sizes, trial.state
    file.environments += [each for each in new.environments if each not in file.environments]
    file.seeds = sorted({*file.seeds, *new.seeds})
    return file


def pareto(trials: Sequence[Trial], directions: Sequence[Any]) -> list[int]:
    """Numbers of the trials that no other beats in every objective; with one objective, of the best."""
    study = optuna.create_study(directions=directions)
    study.add_trials([optuna.create_trial(values=t.values, user_attrs={"number": t.number}) for t in trials])
    return sorted(best.user_attrs["number"] for best in study.best_trials)


def _rank(results: Results, trial: Trial) -> tuple[float, float]:
    monitored, latency = (trial.by_seed(name, trial.runs).values() for name in (results.monitor, LATENCY))
    return results.sign * fmean(monitored), -fmean(latency) if latency else 0.0


def _fresh(job: FrozenTrial) -> bool:
    return bool(job.user_attrs.get("fresh"))


def _state(jobs: Sequence[FrozenTrial]) -> str:
    """COMPLETE if all jobs are, else that of the first that is not."""
    return next((job.state.name for job in jobs if job.state.name != "COMPLETE"), "COMPLETE")


def _records(jobs: Iterable[FrozenTrial]) -> list[Record]:
    """Of all seeds that are finished."""
    found = {v["seed"]: v for job in jobs for name, v in job.user_attrs.items() if name.startswith(worker.RUN)}
    return [found[seed] for seed in sorted(found)]


def _raise_failure(workers: Sequence[BaseProcess]) -> None:
    for process in workers:
        if process.exitcode == 2:
            raise UserError("a worker met the mistake above; nothing that was finished is lost")
        if process.exitcode:
            raise RuntimeError(
                f"a worker ended with status {process.exitcode}; `fffexp study resume` goes on from what is finished"
            )


class Progress:
    """Lines that say how far a study is."""

    def __init__(self, study: StoredStudy) -> None:
        self.study = study
        self.phases = [Phase("trial", list(study.searches.values())), Phase("run", [study.runs])]

    def update(self) -> bool:
        """Print what was finished since the last call; whether anything was."""
        attrs, changed = self.study.attrs, False
        for phase in self.phases:
            for trial in phase.news():
                changed = True
                number = trial.user_attrs["number"]
                layer = attrs["classes"][self.study.points[number].label]
                values = dict(self.study.values(number))
                fresh = _fresh(trial)
                if phase.name == "run":
                    values["seed"] = " ".join(map(str, trial.user_attrs["seeds"]))
                score = trial.user_attrs.get("error", trial.state.name)
                if records := _records([trial]):
                    score = texts.value(fmean(r[attrs["monitor"]] for r in records), unit=attrs["unit"])
                print(
                    f"{'final' if fresh else phase.name} {phase.count()} {layer} {settings(values)}  {score}",
                    flush=True,
                )
        return changed


class Phase:
    """Finished jobs of some queues, and the time that the others will take."""

    def __init__(self, name: str, queues: Sequence[Queue]) -> None:
        self.name, self.queues = name, queues
        self.done = self._finished()
        self._printed = self._before = len(self.done)
        self._begun = time.monotonic()

    def _finished(self) -> dict[tuple[int, str], FrozenTrial]:
        return {(i, key): trial for i, queue in enumerate(self.queues) for key, trial in queue.finished().items()}

    @property
    def total(self) -> int:
        """Jobs so far."""
        return sum(len(queue.jobs()) for queue in self.queues)

    def news(self) -> list[FrozenTrial]:
        """Trials finished since the last call."""
        known, self.done = self.done, self._finished()
        return [trial for key, trial in self.done.items() if key not in known]

    def count(self) -> str:
        """`3 of 48, 20 s left`: one more with each call, and the time if the others take as long."""
        self._printed += 1
        left_s = (time.monotonic() - self._begun) / (self._printed - self._before) * (self.total - self._printed)
        return f"{self._printed} of {self.total}, {left_s:.0f} s left:"

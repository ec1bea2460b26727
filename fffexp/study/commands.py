"""`fffexp study ...` and `fffexp report`."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fffexp import paths
from fffexp.commandline import NonNegativeInt, PositiveFloat, PositiveInt
from fffexp.errors import UserError

if TYPE_CHECKING:
    from fffexp.study.results import Results
    from fffexp.study.spec import StudySpec


def run(file: Path, jobs: PositiveInt = 1, storage: str | None = None, tracking_uri: str | None = None) -> None:
    """Run a study, or join it where it is already running.

    Args:
        file: study file, such as studies/digits_depth_leaf.yaml.
        jobs: worker processes on this machine.
        storage: Optuna storage (default: FFFEXP_STORAGE, else optuna.db in outputs/).
        tracking_uri: MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in outputs/).
    """
    from fffexp.study.spec import load

    _run(load(file), jobs, paths.storage(storage), tracking_uri)


def resume(name: str, jobs: PositiveInt = 1, storage: str | None = None, tracking_uri: str | None = None) -> None:
    """Go on with a study that was interrupted.

    Args:
        name: of the study.
        jobs: worker processes on this machine.
        storage: Optuna storage (default: FFFEXP_STORAGE, else optuna.db in outputs/).
        tracking_uri: MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in outputs/).
    """
    from fffexp.study import spec, store

    url = paths.storage(storage)
    attrs = store.find(name, url)[1][f"{name}/runs"].user_attrs
    if "digest" not in attrs:
        raise UserError(f"study {name!r} was interrupted before it began: use `fffexp study run` with its file")
    _run(spec.parse(attrs["text"], Path(attrs["folder"]), f"of study {name}"), jobs, url, tracking_uri)


def show(name: str, max_latency_ms: PositiveFloat | None = None, format: Literal["text", "json"] = "text") -> None:
    """Print the best finalist within a latency budget, beside the best of the study's first layer.

    Args:
        name: of the study, or a results file such as summary.json.
        max_latency_ms: largest latency of a batch of 256, in milliseconds.
        format: json prints the finalists that fit as JSON, with the best and the test of its difference.
    """
    from fffexp.files import strict_json
    from fffexp.report import text
    from fffexp.study.results import answer

    results = _results(name)
    if format == "text":
        print(text.show(results, max_latency_ms))
        return
    found = answer(results, max_latency_ms)
    test = found.test and found.test._asdict() | {"significant": found.test.significant}
    content = results.to_json() | {"best": found.best.number, "rival": found.rival and found.rival.number}
    content["trials"] = [t for t in content["trials"] if t["number"] in {trial.number for trial in found.fitting}]
    print(json.dumps(strict_json(content | {"difference": test}), indent=1))


def trials(name: str, baseline: NonNegativeInt | None = None) -> None:
    """Print all trials of a study, the best first, and how far each is from the best of its layer.

    Args:
        name: of the study, or a results file such as summary.json.
        baseline: number of the trial, of whatever layer, to print the differences to instead.
    """
    from fffexp.report import text

    print(text.trials(_results(name), baseline))


def best(name: str, tracking_uri: str | None = None) -> None:
    """Print where the best trial's run, config and checkpoint are.

    Args:
        name: of the study, or a results file such as summary.json.
        tracking_uri: MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in outputs/).
    """
    import mlflow

    from fffexp.report.text import settings, title, value
    from fffexp.study.results import answer

    results = _results(name)
    if results.best is None:
        raise UserError(f"study {results.study} has no completed trial yet")
    trial = answer(results).best if any(t.evaluation for t in results.trials) else results.trial(results.best)
    runs = trial.evaluation or trial.runs
    chosen = max(runs, key=lambda run: results.sign * float(run[results.monitor]))
    run_id: str = chosen.get("run_id") or str(trial.run_id)
    try:
        client = mlflow.MlflowClient(paths.tracking_uri(tracking_uri))
        folder = client.get_run(run_id).info.artifact_uri.removeprefix("file://")
        checkpoints = [file.path for file in client.list_artifacts(run_id, "checkpoint")]
    except mlflow.exceptions.MlflowException as error:
        raise UserError(f"run {run_id} is not in this tracking store: give its --tracking_uri") from error
    print(
        f"{trial.layer} (trial {trial.number}): {settings(trial.params)}",
        f"{title(results.monitor)}: {value(trial.mean, trial.ci95, results.unit)}, the best of {len(runs)} runs:",
        f"run: {run_id}",
        f"config: {folder}/config.yaml",
        *(f"checkpoint: {folder}/{path}" for path in checkpoints),
        sep="\n",
    )


def delete(name: str, storage: str | None = None) -> None:
    """Delete a study and its results, so that its name is free; its runs stay in MLflow.

    Args:
        name: of the study.
        storage: Optuna storage (default: FFFEXP_STORAGE, else optuna.db in outputs/).
    """
    from fffexp.study import store

    opened, parts = store.find(name, paths.storage(storage))
    with opened.exclusive():
        for study in parts.values():
            store.free(opened, study)
            if any("job" in trial.user_attrs for trial in store.running(study)):
                raise UserError(f"study {name} is running: stop its commands, wait half a minute, and delete it then")
        for part in sorted(parts, key=lambda part: part.endswith("/runs")):  # which says that it is begun
            opened.delete_study(parts[part]._study_id)
    shutil.rmtree(paths.outputs("studies", name), ignore_errors=True)
    print(f"deleted study {name}; its runs are still in MLflow")


def clean(storage: str | None = None, tracking_uri: str | None = None) -> None:
    """Free what killed workers left behind: trials that seem to run, and checkpoints of runs that have ended.

    Args:
        storage: Optuna storage (default: FFFEXP_STORAGE, else optuna.db in outputs/).
        tracking_uri: MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in outputs/).
    """
    import mlflow

    from fffexp import tracking
    from fffexp.study import store

    opened, uri = store.open_storage(paths.storage(storage)), paths.tracking_uri(tracking_uri)
    studies = store.studies(opened)
    freed = sum(store.free(opened, study) for study in studies.values())
    for name in {name.partition("/")[0] for name in studies}:
        tracking.open_store(uri, name)  # which marks the runs of dead processes
    client, removed = mlflow.MlflowClient(uri), 0
    for folder in paths.outputs("checkpoints").glob("*"):
        try:
            run = client.get_run(folder.name)
        except mlflow.exceptions.MlflowException:
            continue  # of another store
        if run.info.status != "RUNNING" and "study" in run.data.tags:
            shutil.rmtree(folder)
            removed += 1
    print(f"freed {freed} stale trials, removed {removed} checkpoint folders")


def report(name: str) -> None:
    """Write a study's report.html and figures again, and print its finalists.

    Args:
        name: of the study, or a results file such as summary.json.
    """
    from fffexp.report import page, text

    results = _results(name)
    folder = paths.outputs("studies", results.study)
    page.write(results, folder)
    print(f"{text.summary(results)}\n\nwritten to {folder}: report.html, pareto.png, history.png")


def _results(name: str) -> "Results":
    from fffexp.study.results import Results

    path = Path(name) if name.endswith(".json") else paths.outputs("studies", name, "summary.json")
    if not path.is_file():
        raise UserError(f"{path} is not there: run the study first, from this folder (fffexp study run FILE)")
    return Results.load(path)


def _run(spec: "StudySpec", jobs: int, url: str, tracking_uri: str | None) -> None:
    from fffexp.report.text import summary
    from fffexp.study.runner import StudyRunner

    runner = StudyRunner(spec, url, paths.tracking_uri(tracking_uri), jobs)
    trials = len(spec.points())
    print(f"{trials} trials, {jobs} jobs; Ctrl-C stops, `fffexp study resume {spec.name}` goes on", flush=True)
    results = runner.run()
    folder = paths.outputs("studies", spec.name)
    print(f"\n{summary(results)}\n")
    print(f"took {results.wall_s:.0f} s; written to {folder}: report.html, pareto.png, history.png")
    latencies = [t.latency_ms for t in results.finalist_trials() if t.latency_ms]
    within = f" --max_latency_ms {latencies[len(latencies) // 2]:.2g}" if latencies else ""
    following = f"show {spec.name}{within}" if results.finalists else f"trials {spec.name}"
    print(f"next: make ui, or fffexp study {following}")

"""Everything that knows MLflow."""

import logging
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from typing_extensions import override

from fffexp import paths
from fffexp.environment import git_commit, machine
from fffexp.errors import UserError, handling, hide_password, report
from fffexp.files import first_line, save_json, store_lock
from fffexp.outages import hurry, is_outage, patiently

# an unreachable server is reported at the start, not after minutes of retries
os.environ.update(
    {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_DISABLE_TELEMETRY": "true"}
    | os.environ
)

import mlflow.artifacts
from lightning.pytorch.loggers import Logger
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

AWAY_S = 20.0  # how long a training does not ask a store that did not answer


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Client, and id of the experiment, created if need be, whose runs of dead processes are failed; or UserError."""
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # creating tables is not news
    # for a database that cannot be reached the lock fails at once, where MLflow would try again for minutes
    with store_lock(uri):
        try:
            client = MlflowClient(uri)
            location = None if uri.startswith("http") else str(paths.outputs("artifacts", experiment).absolute())
            found = client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            number = found.experiment_id if found else _created(client, experiment, location)
        except Exception as error:  # every store and driver has errors of its own
            raise UserError(
                f"the tracking store {hide_password(uri)} cannot be used ({first_line(error)}): "
                "start it, or give another by --tracking_uri"
            ) from error
    for run in client.search_runs([number], "attributes.status = 'RUNNING'", max_results=1000):
        tag = run.data.tags.get("process", "")
        if tag.endswith(f" {machine()}") and tag != _process(int(tag.split()[0])):
            client.set_terminated(run.info.run_id, "FAILED")
    return client, number


def _created(client: MlflowClient, experiment: str, location: str | None) -> str:
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs, not chats
    try:
        return client.create_experiment(experiment, location, kind)
    except MlflowException as error:
        found = client.get_experiment_by_name(experiment)  # another process was faster, which a server does not prevent
        if found is None:
            raise error
        return str(found.experiment_id)


def checkpoint(uri: str, run_id: str) -> Path:
    """A run's best checkpoint, as a file here; UserError if the store does not have it."""
    try:
        folder = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="checkpoint", tracking_uri=uri)
        (file,) = Path(folder).glob("*.ckpt")
    except (MlflowException, OSError, ValueError) as error:
        store = f"the tracking store {hide_password(uri)}"
        raise UserError(f"{store} has no checkpoint of run {run_id}: give the store of the trainings") from error
    return file


# of this process by default; the start distinguishes a process from a later one with the same number
def _process(number: int | None = None) -> str:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        return f"{process.pid} {process.create_time():.2f} {machine()}"
    return ""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait until the block ends: an interrupted write would keep SQLite locked against the next one."""
    arrived: list[int] = []
    try:
        with handling(lambda number, frame: arrived.append(number), signal.SIGINT, signal.SIGTERM):
            yield
    finally:
        if arrived:
            signal.raise_signal(arrived[0])


def _short(value: str) -> str:
    # MLflow takes no more; config.yaml has all
    return value if len(value) <= 6000 else f"{value[:5970]}... (cut: see config.yaml)"


class Run(Logger):
    """One MLflow run, and a logger of Lightning's that writes to it.

    As a context it is FINISHED if the block ends well, KILLED if it was pruned, else FAILED at once. Lightning's
    MLFlowLogger writes every epoch, which costs as much as a short one, and calls a run FINISHED before it is tested.

    A new run is of the experiment and below the parent, with these tags beside those of its environment. With `run_id`
    an earlier one goes on as it is, which has ended or whose process is gone.
    """

    # for Lightning, whose callbacks put their files below save_dir/name/version
    save_dir: str = ""
    name = "checkpoints"
    version: str = ""

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str = "",
        name: str = "",
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        self.client, self.save_dir = client, str(paths.outputs())
        self._away = float("-inf")  # when the store last did not answer
        self._outage: Exception | None = None  # that cost something
        self.lacking: list[str] = []  # files that could not be stored
        self._writes, self._refilled = 2.0, time.monotonic()
        self._pending: list[Metric] = []
        self.id = self.version = self._begin(experiment_id, name, tags, parent, run_id)

    @patiently
    def _begin(
        self, experiment_id: str, name: str, tags: Mapping[str, str] | None, parent: str | None, run_id: str | None
    ) -> str:
        if run_id is None:
            known = {"git_commit": git_commit() or "unknown", "host": platform.node(), "torch": torch.__version__}
            known |= {**(tags or {}), "process": _process(), **({"mlflow.parentRunId": parent} if parent else {})}
            return str(self.client.create_run(experiment_id, tags=known, run_name=name).info.run_id)
        self.client.set_tag(run_id, "process", _process())
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: object) -> None:
        if kind is not None and kind.__name__ == "UpdateFinishedTrialError":
            return  # this machine slept, and another goes on with the run
        if kind is not None and not issubclass(kind, Exception):
            hurry()
        pruned = kind is not None and kind.__name__ == "TrialPruned"
        status = "KILLED" if pruned else "FAILED" if kind else "FINISHED"
        try:
            self._end(status, pruned)
        except Exception as error:
            if not is_outage(error):
                raise
            self._outage = error
        if self._outage is not None:
            lost = f"the tracking store did not answer: {self._keep(status)} has what it lacks"
            if kind is None or is_outage(raised):
                raise UserError(f"run {self.id} ended as {status}, but {lost}") from self._outage
            report(f"run {self.id}: {lost}")  # beside what the block ended with

    @patiently
    @uninterrupted()
    def _end(self, status: str, pruned: bool) -> None:
        self._flush()
        if pruned:
            self.client.set_tag(self.id, "pruned", "true")
        self.client.set_terminated(self.id, status)

    def _keep(self, status: str) -> Path:
        # what could not be logged
        path = paths.outputs("unlogged", f"{self.id}.json")
        metrics = [dict(each) for each in self._pending]
        save_json(path, {"run_id": self.id, "status": status, "metrics": metrics, "files": self.lacking})
        return path

    @patiently
    @uninterrupted()
    def params(self, params: Mapping[str, Any]) -> None:
        """Log params; they cannot change."""
        entries = [Param(name, _short(str(value))) for name, value in params.items()]
        for start in range(0, len(entries), 100):  # MLflow takes no more at once
            self.client.log_batch(self.id, params=entries[start : start + 100])

    @patiently
    @uninterrupted()
    def text(self, text: str, file: str) -> None:
        """Store a text artifact."""
        self.client.log_text(self.id, text, file)

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact; where the store never answers, note that it lacks."""
        try:
            self._file(path, folder)
        except Exception as error:
            if not is_outage(error):
                raise
            self._outage = error
            self.lacking.append(str(path.absolute()))

    @patiently
    @uninterrupted()
    def _file(self, path: Path, folder: str | None) -> None:
        self.client.log_artifact(self.id, str(path), folder)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Params are logged by the experiment, under flat names."""

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        self._pending += [Metric(k, float(v), now, step or 0) for k, v in metrics.items() if k != "epoch"]

    @override
    def save(self) -> None:
        # Lightning calls this twice an epoch: both are written at once unless epochs are shorter than seconds
        now = time.monotonic()
        self._writes, self._refilled = min(2.0, self._writes + (now - self._refilled) / 2), now
        if self._writes < 1 or now - self._away < AWAY_S:
            return
        self._writes -= 1
        try:
            self._flush()
        except Exception as error:
            if not is_outage(error):
                raise
            self._away = time.monotonic()
            report(
                f"the tracking store does not answer; the training goes on, and its metrics wait: {first_line(error)}"
            )

    @uninterrupted()
    def _flush(self) -> None:
        while self._pending:  # what is not written stays; MLflow takes no more at once
            self.client.log_batch(self.id, self._pending[:1000])
            del self._pending[:1000]

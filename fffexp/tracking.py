"""Everything that knows MLflow."""

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from fffexp import paths
from fffexp.errors import UserError
from fffexp.stores import first_line, store_lock

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# an unreachable server is told at the start, not after minutes of retries
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from lightning.pytorch.loggers import Logger
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

for _name in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # creating tables is not news

FLUSH_S = 2.0


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Client, and id of the experiment, which is created if need be.

    Raises:
        UserError: the store cannot be reached.
    """
    # for a database that cannot be reached the lock fails at once, where MLflow would try again for minutes
    with store_lock(uri):
        try:
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            location = None if uri.startswith("http") else str(paths.artifacts().absolute() / experiment)
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs, not chats
            experiment_id = found.experiment_id if found else client.create_experiment(experiment, location, kind)
        except Exception as error:  # every store and driver has errors of its own
            raise UserError(
                f"the tracking store {uri} cannot be used ({first_line(error)}): "
                "start it, or give another by --tracking_uri"
            ) from error
    _fail_dead_runs(client, experiment_id)
    return client, experiment_id


def _fail_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """Mark runs of this machine that were killed before they could say so."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        tags = run.data.tags
        if tags.get("host") == socket.gethostname() and not _alive(tags.get("process", "")):
            client.set_terminated(run.info.run_id, "FAILED")


def _process_id() -> str:
    # the start time tells a process from a later one with the same number
    return f"{os.getpid()} {psutil.Process().create_time():.2f}"


def _alive(process: str) -> bool:
    number, _, started = process.partition(" ")
    try:
        return f"{psutil.Process(int(number)).create_time():.2f}" == started
    except (ValueError, psutil.NoSuchProcess):
        return False


@cache
def environment_tags() -> dict[str, str]:
    """What a run's figures depend on besides its config."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "git_commit": git.stdout.strip() or "unknown",
        "host": socket.gethostname(),
        "torch": torch.__version__,
    }


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait until the block ends: an interrupted write would keep SQLite locked against the next one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, frame: arrived.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if arrived:
            signal.raise_signal(arrived[0])


class Run:
    """One MLflow run; params, metrics and artifacts by the names in the README."""

    def __init__(
        self, client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str], parent: str | None
    ) -> None:
        all_tags = {**environment_tags(), **tags, "process": _process_id()}
        if parent is not None:
            all_tags["mlflow.parentRunId"] = parent
        self.client = client
        self.id: str = client.create_run(experiment_id, tags=all_tags, run_name=name).info.run_id

    @classmethod
    def resume(cls, client: MlflowClient, run_id: str) -> "Run":
        """Go on with a run that has ended or whose process is gone."""
        run = cls.__new__(cls)
        run.client, run.id = client, run_id
        run.tag("process", _process_id())
        client.update_run(run_id, status="RUNNING")
        return run

    def params(self, params: Mapping[str, Any]) -> None:
        """Log params; they cannot change."""
        with uninterrupted():
            self.client.log_batch(self.id, params=[Param(name, str(value)) for name, value in params.items()])

    def metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step."""
        now = int(time.time() * 1000)
        with uninterrupted():
            self.client.log_batch(self.id, [Metric(k, float(v), now, step) for k, v in metrics.items()])

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        with uninterrupted():
            self.client.set_tag(self.id, name, value)

    def text(self, text: str, file: str) -> None:
        """Store a text artifact."""
        with uninterrupted():
            self.client.log_text(self.id, text, file)

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""
        with uninterrupted():
            self.client.log_artifact(self.id, str(path), folder)

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Set the final status."""
        with uninterrupted():
            self.client.set_terminated(self.id, status)


@contextmanager
def run(
    client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str], parent: str | None = None
) -> Iterator[Run]:
    """A run that is FINISHED if the block ends well, KILLED if it was pruned, else FAILED at once."""
    started = Run(client, experiment_id, name, tags, parent)
    try:
        yield started
    except BaseException as error:
        pruned = type(error).__name__ == "TrialPruned"
        if pruned:
            started.tag("pruned", "true")
        started.end("KILLED" if pruned else "FAILED")
        raise
    started.end("FINISHED")


class RunLogger(Logger):
    """Lightning's metrics to a run.

    Not Lightning's MLFlowLogger: that one writes every epoch, which costs as much as a short epoch, and calls
    a run FINISHED after fit, before it is tested.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._pending: list[Metric] = []
        self._flushed = time.monotonic()

    @property
    def name(self) -> str:
        """Of the logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """Id of the run."""
        return self._run.id

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Params are logged by the experiment, under flat names."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep them for the next write."""
        now = int(time.time() * 1000)
        self._pending += [Metric(k, float(v), now, step or 0) for k, v in metrics.items() if k != "epoch"]
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, in the portions that MLflow accepts."""
        pending, self._pending = self._pending, []
        with uninterrupted():
            for start in range(0, len(pending), 1000):
                self._run.client.log_batch(self._run.id, pending[start : start + 1000])
        self._flushed = time.monotonic()

    def finalize(self, status: str) -> None:
        """Write what is pending; the status is set when the run ends."""
        self.flush()

"""Everything that knows MLflow."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from typing_extensions import override

from fffexp import paths
from fffexp.environment import git_commit, host
from fffexp.errors import UserError, hide_password
from fffexp.stores import first_line, store_lock

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# an unreachable server is reported at the start, not after minutes of retries
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from lightning.pytorch.loggers import Logger
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

FLUSH_S = 2.0


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Client, and id of the experiment, which is created if need be.

    Raises:
        UserError: the store cannot be reached.
    """
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # creating tables is not news
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
                f"the tracking store {hide_password(uri)} cannot be used ({first_line(error)}): "
                "start it, or give another by --tracking_uri"
            ) from error
    _fail_dead_runs(client, experiment_id)
    return client, experiment_id


def _fail_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """Mark runs of this machine that were killed before they could say so."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        number, started, *machine = run.data.tags.get("process", " ").split(" ")
        if machine == [_machine()] and not _alive(number, started):
            client.set_terminated(run.info.run_id, "FAILED")


def _process() -> str:
    # the start time tells a process from a later one with the same number
    return f"{os.getpid()} {psutil.Process().create_time():.2f} {_machine()}"


def _machine() -> str:
    """What process numbers belong to: containers may share the name of their host, but not these two."""
    names = [host()]
    with suppress(OSError):  # not on Linux
        names = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(names).replace(" ", "_")


def _alive(number: str, started: str) -> bool:
    try:
        return f"{psutil.Process(int(number)).create_time():.2f}" == started
    except (ValueError, psutil.NoSuchProcess):
        return False


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


class Run(Logger):
    """One MLflow run, and a logger of Lightning's that writes to it.

    Not Lightning's MLFlowLogger: that one writes every epoch, which costs as much as a short epoch, and calls
    a run FINISHED after fit, before it is tested.

    Args:
        client: of the store.
        experiment_id: where a new run goes to.
        name: of a new run.
        tags: of a new run, beside those of its environment.
        parent: id of the run that a new run belongs to.
        run_id: a run to go on with, which has ended or whose process is gone; the other arguments are then its own.
    """

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
        self.client = client
        self._pending: list[Metric] = []
        self._flushed = time.monotonic()
        if run_id is not None:
            self.id: str = run_id
            self.tag("process", _process())
            client.update_run(run_id, status="RUNNING")
            return
        environment = {"git_commit": git_commit() or "unknown", "host": host(), "torch": torch.__version__}
        all_tags = {**environment, **(tags or {}), "process": _process()}
        if parent is not None:
            all_tags["mlflow.parentRunId"] = parent
        self.id = client.create_run(experiment_id, tags=all_tags, run_name=name).info.run_id

    def params(self, params: Mapping[str, Any]) -> None:
        """Log params; they cannot change."""
        with uninterrupted():
            self.client.log_batch(self.id, params=[Param(name, str(value)) for name, value in params.items()])

    def metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step, at once."""
        self.log_metrics(metrics, step)
        self.save()

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
        self.save()
        with uninterrupted():
            self.client.set_terminated(self.id, status)

    # for Lightning; its callbacks put their files below save_dir/name/version

    @property
    @override
    def save_dir(self) -> str:
        return str(paths.outputs())

    @property
    @override
    def name(self) -> str:
        return paths.checkpoints().name

    @property
    @override
    def version(self) -> str:
        return self.id

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Params are logged by the experiment, under flat names."""

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        self._pending += [Metric(k, float(v), now, step or 0) for k, v in metrics.items() if k != "epoch"]
        if time.monotonic() - self._flushed > FLUSH_S:
            self.save()

    @override
    def save(self) -> None:
        pending, self._pending = self._pending, []
        with uninterrupted():
            for start in range(0, len(pending), 1000):  # MLflow takes no more at once
                self.client.log_batch(self.id, pending[start : start + 1000])
        self._flushed = time.monotonic()

    @override
    def finalize(self, status: str) -> None:
        """The status is set when the run ends, which is after Lightning's."""
        self.save()


@contextmanager
def run(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    tags: Mapping[str, str],
    parent: str | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """A run that is FINISHED if the block ends well, KILLED if it was pruned, else FAILED at once.

    With `run_id` an earlier run goes on.
    """
    started = Run(client, experiment_id, name, tags, parent, run_id)
    try:
        yield started
    except BaseException as error:
        pruned = type(error).__name__ == "TrialPruned"
        if pruned:
            started.tag("pruned", "true")
        started.end("KILLED" if pruned else "FAILED")
        raise
    started.end("FINISHED")

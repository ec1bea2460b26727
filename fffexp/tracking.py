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
from fffexp.environment import git_commit
from fffexp.errors import UserError, handling, hide_password
from fffexp.files import first_line, store_lock

# an unreachable server is reported at the start, not after minutes of retries
os.environ.update(
    {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_DISABLE_TELEMETRY": "true"}
    | os.environ
)

from lightning.pytorch.loggers import Logger
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Client, and id of the experiment, created if need be, whose runs of dead processes are failed; or UserError."""
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # creating tables is not news
    # for a database that cannot be reached the lock fails at once, where MLflow would try again for minutes
    with store_lock(uri):
        try:
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            location = None if uri.startswith("http") else str(paths.outputs("artifacts", experiment).absolute())
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs, not chats
            number = found.experiment_id if found else client.create_experiment(experiment, location, kind)
        except Exception as error:  # every store and driver has errors of its own
            raise UserError(
                f"the tracking store {hide_password(uri)} cannot be used ({first_line(error)}): "
                "start it, or give another by --tracking_uri"
            ) from error
    for run in client.search_runs([number], "attributes.status = 'RUNNING'", max_results=1000):
        tag = run.data.tags.get("process", "")
        if tag.endswith(f" {_machine()}") and tag != _process(int(tag.split()[0])):
            client.set_terminated(run.info.run_id, "FAILED")
    return client, number


# of this process by default; the start distinguishes a process from a later one with the same number
def _process(number: int | None = None) -> str:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        return f"{process.pid} {process.create_time():.2f} {_machine()}"
    return ""


# what process numbers belong to: containers may share the name of their host, but not these two
def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return platform.node()


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
        self._writes, self._refilled = 2.0, time.monotonic()
        self._pending: list[Metric] = []
        if run_id is None:
            known = {"git_commit": git_commit() or "unknown", "host": platform.node(), "torch": torch.__version__}
            known |= {**(tags or {}), "process": _process(), **({"mlflow.parentRunId": parent} if parent else {})}
            run_id = client.create_run(experiment_id, tags=known, run_name=name).info.run_id
        else:
            client.set_tag(run_id, "process", _process())
            client.update_run(run_id, status="RUNNING")
        self.id = self.version = run_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with uninterrupted():
            self._flush()
            if pruned := kind is not None and kind.__name__ == "TrialPruned":
                self.client.set_tag(self.id, "pruned", "true")
            self.client.set_terminated(self.id, "KILLED" if pruned else "FAILED" if kind else "FINISHED")

    @uninterrupted()
    def params(self, params: Mapping[str, Any]) -> None:
        """Log params; they cannot change."""
        self.client.log_batch(self.id, params=[Param(name, str(value)) for name, value in params.items()])

    @uninterrupted()
    def text(self, text: str, file: str) -> None:
        """Store a text artifact."""
        self.client.log_text(self.id, text, file)

    @uninterrupted()
    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""
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
        if self._writes >= 1:
            self._writes -= 1
            self._flush()

    @uninterrupted()
    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), 1000):  # MLflow takes no more at once
            self.client.log_batch(self.id, pending[start : start + 1000])

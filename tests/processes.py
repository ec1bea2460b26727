"""Runs the program as users do, and reads what it leaves behind."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from fffexp import timing
from fffexp.training import latency

# threads that wait for each other make tiny layers ten times slower on a busy machine
torch.set_num_threads(1)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
LIMIT_S = 600.0  # for a process on a busy machine


def user_environment() -> dict[str, str]:
    """Without what a test has set, so that a process takes the stores of its folder."""
    ours = ("MLFLOW_TRACKING_URI", "FFFEXP_STORAGE")
    return {k: v for k, v in os.environ.items() if k not in ours} | ONE_THREAD | {"PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Process:
    """A `python -m fffexp ...` in a session of its own."""

    def __init__(self, args: list[str], folder: Path, label: str, environment: dict[str, str]) -> None:
        self.stdout, self.stderr = folder / f"{label}.stdout", folder / f"{label}.stderr"
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            self.popen = subprocess.Popen(
                [sys.executable, *args],
                cwd=folder,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**user_environment(), **environment},
            )

    def output(self) -> str:
        return self.stdout.read_text()

    def errors(self) -> str:
        return self.stderr.read_text()

    def wait(self, limit_s: float = LIMIT_S) -> int:
        return self.popen.wait(limit_s)

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def until_printed(self, text: str, limit_s: float = LIMIT_S) -> None:
        """Wait for a text on stdout; fail at once if the process ends without it."""
        wait_until(lambda: text in self.output() or self.popen.poll() is not None, limit_s)
        assert text in self.output(), f"ended with {self.popen.returncode}: {self.output()} {self.errors()}"

    def end(self) -> None:
        """Kill it and all it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


@contextmanager
def started(*args: str, folder: Path, label: str = "process", **environment: str) -> Iterator[Process]:
    """`fffexp ARGS` in a folder, killed with its children at the end of the block."""
    process = Process(["-m", "fffexp", *args], folder, label, environment)
    try:
        yield process
    finally:
        process.end()


def wait_until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not so after {limit_s} s"
        time.sleep(0.05)


@cache
def empty_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def with_store(folder: Path) -> Path:
    """The folder with an empty tracking store in its place: making one takes seconds."""
    (folder / "outputs").mkdir()
    (folder / "outputs" / "mlflow.db").write_bytes(empty_store())
    return folder


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in a folder, with its store as the default one."""
    patch.chdir(folder)
    # absolute: MLflow keeps a store by its address for as long as the process lives
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute()}/outputs/mlflow.db")
    patch.setenv("FFFEXP_STORAGE", f"sqlite:///{folder.absolute()}/outputs/optuna.db")
    for name in ONE_THREAD:
        patch.setenv(name, "1")
    # the fewest rounds: what is timed here does not matter
    patch.setattr(timing, "WARM_UP_S", 0.0)
    patch.setattr(latency, "ROUNDS", (1, 1))


def client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder.absolute() / 'outputs' / 'mlflow.db'}")


def runs(folder: Path, experiment: str | None = None) -> list[Run]:
    """All runs of a folder's store, oldest first."""
    store = client(folder)
    ids = [e.experiment_id for e in store.search_experiments() if experiment in (None, e.name)]
    return list(store.search_runs(ids, order_by=["attributes.start_time ASC"])) if ids else []


def artifact(folder: Path, run_id: str, name: str) -> Path:
    """Local path of an artifact."""
    return Path(client(folder).get_run(run_id).info.artifact_uri.removeprefix("file://")) / name


def history(folder: Path, run_id: str, metric: str) -> list[float]:
    return [m.value for m in client(folder).get_metric_history(run_id, metric)]


def digits(layer: str = "fff", *args: str, epochs: int = 1) -> list[str]:
    """Arguments of a short fit on the digits, from the pieces in configs/."""
    pieces = ("data/digits", "model/one_cycle", f"layer/{layer}")
    return ["fit", *(f"--config={CONFIGS / piece}.yaml" for piece in pieces), f"--trainer.max_epochs={epochs}", *args]


def write_yaml(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path

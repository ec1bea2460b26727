"""The tracking store under several processes, and under signals at a bad moment."""

import os
import random
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from processes import artifact, client, digits, enter, history, runs, started, with_store

from fffexp import paths, tracking
from fffexp.errors import terminated_by_signal


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


@pytest.mark.slow
def test_two_fits_that_create_the_store_at_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                started(*digits("ff"), f"--seed_everything={seed}", folder=tmp_path, label=f"fit{seed}")
            )
            for seed in (0, 1)
        ]
        for process in both:
            assert process.wait() == 0, process.errors()
            assert "Traceback" not in process.errors()
    found = runs(tmp_path)
    assert [r.info.status for r in found] == ["FINISHED"] * 2
    assert {r.data.params["seed"] for r in found} == {"0", "1"}
    assert len({r.info.experiment_id for r in found}) == 1
    for run in found:
        assert set(run.data.metrics) >= {"train/loss", "val/accuracy", "test/accuracy", "memory/peak_mb"}
        assert artifact(tmp_path, run.info.run_id, "config.yaml").is_file()
        assert run.info.run_id in "".join(process.output() for process in both)


def test_the_store_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///b")
    assert paths.tracking_uri("sqlite:///a") == "sqlite:///a"
    assert paths.tracking_uri(None) == "sqlite:///b"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert paths.tracking_uri(None) == "sqlite:///outputs/mlflow.db"


def test_params_beyond_the_limits_of_the_store(tmp_path: Path) -> None:
    opened, experiment = tracking.open_store(paths.tracking_uri(None), "tries")
    many = {f"param{number}": number for number in range(250)}
    with tracking.Run(opened, experiment) as run:
        run.params({**many, "long": "x" * 7000})
    found = opened.get_run(run.id).data.params
    assert {name: int(found[name]) for name in many} == many
    assert found["long"].startswith("xxx")
    assert found["long"].endswith("(cut: see config.yaml)")


@pytest.fixture
def store(tmp_path: Path) -> tuple[MlflowClient, str]:
    with_store(tmp_path)
    return tracking.open_store(paths.tracking_uri(None), "tries")


def test_a_deleted_experiment_is_restored(store: tuple[MlflowClient, str]) -> None:
    opened, experiment = store
    opened.delete_experiment(experiment)
    assert tracking.open_store(paths.tracking_uri(None), "tries")[1] == experiment
    assert opened.get_experiment(experiment).lifecycle_stage == "active"


def test_metrics_reach_the_store_whatever_their_number(store: tuple[MlflowClient, str], tmp_path: Path) -> None:
    with tracking.Run(*store, "many", {}) as run:
        for step in range(700):
            run.log_metrics({"a": step, "b": float("nan"), "epoch": step}, step)
        run.finalize("success")
    assert history(tmp_path, run.id, "a") == list(range(700))
    assert len(history(tmp_path, run.id, "b")) == 700
    assert set(client(tmp_path).get_run(run.id).data.metrics) == {"a", "b"}


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (SystemExit, "FAILED"), ("pruned", "KILLED")]
)
def test_the_status_of_a_run(
    error: type[BaseException] | str | None, status: str, store: tuple[MlflowClient, str]
) -> None:
    class TrialPruned(Exception):
        pass

    kind = TrialPruned if isinstance(error, str) else error
    with ExitStack() as stack:
        if kind:
            stack.enter_context(pytest.raises(kind))
        with tracking.Run(*store, "one", {"tag": "x"}) as run:
            if kind:
                raise kind
    found = store[0].get_run(run.id)
    assert found.info.status == status
    assert found.data.tags["tag"] == "x"
    assert ("pruned" in found.data.tags) == (status == "KILLED")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_write_fails_the_run(
    number: signal.Signals, store: tuple[MlflowClient, str]
) -> None:
    ids: list[str] = []

    def write_on() -> None:
        with terminated_by_signal(), tracking.Run(*store, "interrupted", {}) as run:
            ids.append(run.id)
            timer = threading.Timer(random.uniform(0, 0.03), os.kill, (os.getpid(), number))
            timer.start()
            end = time.monotonic() + 5
            while time.monotonic() < end:
                run.params({"width": 8})
            raise AssertionError("the signal was lost")

    random.seed(0)
    for attempt in range(12):
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            write_on()
        assert store[0].get_run(ids[-1]).info.status == "FAILED", f"attempt {attempt}"


def test_metrics_of_an_epoch_are_written_at_its_end_unless_it_is_short(store: tuple[MlflowClient, str]) -> None:
    with tracking.Run(*store, "one", {}) as run:
        for step in range(3):
            run.log_metrics({"loss": 1.0 - step}, step)
            run.save()
        assert len(store[0].get_metric_history(run.id, "loss")) == 2
    assert len(store[0].get_metric_history(run.id, "loss")) == 3

"""Faults that are caused on purpose, on real processes: nothing finished is lost, and nobody restarts anything."""

import json
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from optuna.trial import TrialState
from postgres import Postgres
from processes import CONFIGS, ROOT, Process, digits, runs, started, with_store, write_yaml

from fffexp.study import store
from fffexp.study.results import Results, Trial

pytestmark = pytest.mark.slow

OWN = """
import os, signal
from lightning.pytorch import Callback

class Oops(Callback):
    def on_train_start(self, trainer, task):
        width = next(iter(task.layers.values())).width
        if width == 7:
            raise RuntimeError("oh, a seven")
        if width == 9:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def study(folder: Path, *points: int, **more: Any) -> Path:
    """A study of dense layers of these widths; the callback above acts on some."""
    (with_store(folder) / "own.py").write_text(OWN)
    write_yaml(folder / "own.yaml", {"trainer": {"callbacks": [{"class_path": "own.Oops"}]}})
    width = {"keys": ["model.layer.init_args.width"]}
    layer = {"config": str(CONFIGS / "layer/ff.yaml"), "space": {"width": width}}
    return write_yaml(folder / "tiny.yaml", {
        "name": "tiny",
        "configs": [str(CONFIGS / "data/digits.yaml"), str(CONFIGS / "model/one_cycle.yaml"), "own.yaml"],
        "overrides": {"trainer.max_epochs": 2},
        "seeds": [0],
        "layers": {"FF": layer | {"points": [{"width": of} for of in points]}},
        **more,
    })  # fmt: skip


def results(folder: Path, url: str = "") -> dict[int, Trial]:
    found = Results.load(folder / "outputs/studies/tiny/summary.json").trials
    assert not [r for r in runs(folder) if r.info.status == "RUNNING"]
    completed = Counter(
        t.user_attrs["job"]
        for t in optuna.load_study(
            study_name="tiny/runs", storage=url or f"sqlite:///{folder}/outputs/optuna.db"
        ).trials
        if t.state == TrialState.COMPLETE
    )
    assert set(completed.values()) <= {1}, "a job was done twice"
    return {trial.params["width"]: trial for trial in found}


def workers(process: Process) -> list[psutil.Process]:
    children = psutil.Process(process.popen.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_an_error_is_tried_three_times_and_the_study_goes_on(tmp_path: Path) -> None:
    study(tmp_path, 7, 8)
    with started("study", "run", "tiny.yaml", "--jobs=2", folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        assert process.wait() == 0, process.errors()
        assert "error 3 of 3" in process.errors()
        assert "Traceback" not in process.errors()
    found = results(tmp_path)
    assert (found[7].state, found[7].attempts) == ("FAIL", 3)
    assert "oh, a seven" in str(found[7].error)
    assert (found[8].state, found[8].attempts) == ("COMPLETE", 1)


def test_a_trial_that_takes_all_memory_fails_alone(tmp_path: Path) -> None:
    study(tmp_path, 16, 3_000_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, hard))  # children inherit it
    try:
        with started(
            "study", "run", "tiny.yaml", "--jobs=1", folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}"
        ) as process:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            assert process.wait() == 0, process.errors()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    found = results(tmp_path)
    assert (found[3_000_000].state, found[3_000_000].attempts) == ("FAIL", 3)
    assert "memory" in str(found[3_000_000].error)
    assert found[16].state == "COMPLETE"


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    study(tmp_path, 9, 8, 10)
    with started("study", "run", "tiny.yaml", "--jobs=2", folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        assert process.wait() == 0, process.errors()
        assert process.errors().count("a worker was killed by SIGKILL: another takes its place") == store.MAX_VANISHED
    found = results(tmp_path)
    assert (found[9].state, found[9].attempts) == ("FAIL", store.MAX_VANISHED)
    assert "8 workers vanished with it, the last of which had needed up to" in str(found[9].error)
    assert {found[8].state, found[10].state} == {"COMPLETE"}


def test_killed_workers_are_replaced(tmp_path: Path) -> None:
    study(tmp_path, *range(20, 26))
    with started("study", "run", "tiny.yaml", "--jobs=2", folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        for number in (1, 3):
            process.until_printed(f"run {number} of 6")
            workers(process)[0].kill()
        assert process.wait() == 0, process.errors()
    found = results(tmp_path)
    assert {trial.state for trial in found.values()} == {"COMPLETE"}
    assert len(found) == 6


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_database_that_is_restarted(how: str, tmp_path: Path, postgres: Postgres) -> None:
    study(tmp_path, *range(20, 26))
    run = ("study", "run", "tiny.yaml", "--jobs=2", f"--storage={postgres.url}")
    with started(*run, folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        for number in (1, 3):
            process.until_printed(f"run {number} of 6")
            postgres.ctl("stop", "-m", how)
            time.sleep(5)
            postgres.ctl("start")
        assert process.wait() == 0, process.errors()
        assert "Traceback" not in process.errors(), process.errors()
    found = results(tmp_path, postgres.url)
    assert {trial.state for trial in found.values()} == {"COMPLETE"}
    assert len(found) == 6
    # the server may have noted a start without being able to say so
    assert max(trial.attempts for trial in found.values()) <= 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "server") as running:
        yield running


def epochs_of(server: Server) -> dict[str, tuple[str, int]]:
    """Of each run the status, and the number of values that its loss has."""
    client = MlflowClient(server.url)
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(experiments)
    return {r.info.run_id: (r.info.status, len(client.get_metric_history(r.info.run_id, "val/loss"))) for r in found}


LONG = ("--trainer.max_epochs=60", "--trainer.limit_train_batches=40")


def test_a_fit_goes_on_without_its_tracking_server(tmp_path: Path, server: Server) -> None:
    fit = (*digits("ff"), *LONG, f"--tracking_uri={server.url}")
    with started(*fit, folder=tmp_path) as process:
        process.until_printed("epoch 2/60")
        server.stop()
        process.until_printed("epoch 12/60")
        time.sleep(5)
        server.start()
        assert process.wait() == 0, process.errors()
        assert "the training goes on, and its metrics wait" in process.errors()
    assert [*epochs_of(server).values()] == [("FINISHED", 60)]


def test_a_server_that_never_comes_back_costs_no_result(tmp_path: Path, server: Server) -> None:
    fit = (*digits("ff"), *LONG, f"--tracking_uri={server.url}")
    with started(*fit, folder=tmp_path, FFFEXP_PATIENCE_S="4") as process:
        process.until_printed("epoch 2/60")
        server.stop()
        assert process.wait() == 2
        *_, line = process.errors().splitlines()
    assert "has what it lacks" in line
    (path,) = (tmp_path / "outputs/unlogged").glob("*.json")
    assert path.name in line
    kept = json.loads(path.read_text())
    assert {"val/loss", "val/accuracy", "test/accuracy"} <= {metric["key"] for metric in kept["metrics"]}
    assert [Path(file).is_file() for file in kept["files"]] == [True], "the best checkpoint"
    server.start()
    lacking = sum(metric["key"] == "val/loss" for metric in kept["metrics"])
    assert epochs_of(server) == {kept["run_id"]: ("RUNNING", 60 - lacking)}


def test_a_study_waits_for_its_tracking_server(tmp_path: Path, server: Server) -> None:
    study(tmp_path, *range(20, 24))
    run = ("study", "run", "tiny.yaml", "--jobs=2", f"--tracking_uri={server.url}")
    with started(*run, folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        process.until_printed("run 1 of 4")
        server.stop()
        time.sleep(15)
        server.start()
        assert process.wait() == 0, process.errors()
        assert "Traceback" not in process.errors(), process.errors()
    found = Results.load(tmp_path / "outputs/studies/tiny/summary.json").trials
    assert [trial.state for trial in found] == ["COMPLETE"] * 4
    assert "RUNNING" not in {status for status, _ in epochs_of(server).values()}


def test_four_fits_at_once_on_a_new_experiment(tmp_path: Path, server: Server) -> None:
    fit = (*digits("ff"), "--trainer.max_epochs=1", f"--tracking_uri={server.url}", "--name=new")
    with ExitStack() as stack:
        fits = [stack.enter_context(started(*fit, folder=tmp_path, label=f"fit{i}")) for i in range(4)]
        for process in fits:
            assert process.wait() == 0, process.errors()
    assert [status for status, _ in epochs_of(server).values()] == ["FINISHED"] * 4


def test_a_worker_that_slept_drops_its_trial(tmp_path: Path) -> None:
    study(tmp_path, *range(20, 26), overrides={"trainer.max_epochs": 30})
    with started("study", "run", "tiny.yaml", "--jobs=2", folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        process.until_printed("run 1 of 6")
        time.sleep(2)  # within a training
        sleeper = workers(process)[0]
        sleeper.suspend()
        time.sleep(store.GRACE_S + 2 * store.HEARTBEAT_S)
        sleeper.send_signal(signal.SIGCONT)
        assert process.wait() == 0, process.errors()
        assert "Traceback" not in process.errors(), process.errors()
    found = results(tmp_path)
    assert {trial.state for trial in found.values()} == {"COMPLETE"}
    assert len(found) == 6
    assert json.loads((tmp_path / "outputs/studies/tiny/summary.json").read_text())["best"] is not None

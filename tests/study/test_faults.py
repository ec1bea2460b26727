"""Faults that are caused on purpose, on real processes: nothing finished is lost, and nobody restarts anything."""

import json
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState
from processes import CONFIGS, ROOT, Process, runs, started, with_store, write_yaml

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


def results(folder: Path) -> dict[int, Trial]:
    found = Results.load(folder / "outputs/studies/tiny/summary.json").trials
    assert not [r for r in runs(folder) if r.info.status == "RUNNING"]
    completed = Counter(
        t.user_attrs["job"]
        for t in optuna.load_study(study_name="tiny/runs", storage=f"sqlite:///{folder}/outputs/optuna.db").trials
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
    assert "8 workers vanished with it, the last with" in str(found[9].error)
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

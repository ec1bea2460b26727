"""`fffexp study` from a file to its summary, with processes that come and go."""

import copy
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow.entities import Run
from optuna.trial import TrialState
from processes import CONFIGS, Process, artifact, enter, runs, started, with_store, write_yaml

from fffexp import paths
from fffexp.cli import main
from fffexp.study import store
from fffexp.study.plan import search_work
from fffexp.study.runner import StudyRunner
from fffexp.study.spec import load
from fffexp.study.summary import Summary
from fffexp.study.worker import Worker
from fffexp.training.experiment import Context, run

FF_SPACE = {"width": {"keys": ["model.layer.init_args.width"], "low": 4, "high": 32, "log": True}}
FFF_SPACE = {
    "depth": {"keys": ["model.layer.init_args.depth"], "low": 1, "high": 3},
    "leaf_width": {"keys": ["model.layer.init_args.leaf_width"], "choices": [1, 4]},
}
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "configs": [str(CONFIGS / "data" / "digits.yaml"), str(CONFIGS / "model" / "one_cycle.yaml")],
    "overrides": {"trainer.max_epochs": 1, "data.init_args.batch_size": 128},
    "trials_per_layer": 2,
    "seeds": [0],
    "evaluation_seeds": [5, 6],
    "sampler": {"class_path": "optuna.samplers.RandomSampler", "init_args": {"seed": 0}},
    "layers": {
        "FF": {"config": str(CONFIGS / "layer" / "ff.yaml"), "space": FF_SPACE},
        "FFF": {"config": str(CONFIGS / "layer" / "fff.yaml"), "space": FFF_SPACE},
    },
}
SUMMARY = {"study", "directions", "metrics", "trials", "pareto", "best", "machines", "wall_s"}
TRIAL = {"number", "state", "params", "values", "run_id", "seeds", "mean", "ci95"}
FILES = ("summary.json", "report.html", "pareto.png", "history.png")
LATENCY = "speed/latency_b256_ms"


def written(folder: Path, name: str = "tiny") -> Summary:
    summary: Summary = json.loads((folder / "outputs" / "studies" / name / "summary.json").read_text())
    return summary


def search(folder: Path, name: str = "tiny") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/outputs/optuna.db")


def assert_exact_budget(folder: Path, name: str = "tiny") -> None:
    """Every slot of the search and of the finalists was done once, and nothing is still running."""
    found, finals = search(folder, name), search(folder, f"{name}/finalists")
    done = [t for t in found.trials if t.state == TrialState.COMPLETE]
    assert sorted(t.user_attrs["slot"] for t in done) == list(range(4))
    assert Counter(t.params["layer"] for t in done) == {"FF": 2, "FFF": 2}
    trained = Counter((t.params["trial"], t.params["seed"]) for t in finals.trials if t.state == TrialState.COMPLETE)
    finalists = written(folder, name)["finalists"]
    assert trained == Counter((number, seed) for number in finalists for seed in CONTENT["evaluation_seeds"])
    assert not [r for r in runs(folder, name) if r.info.status == "RUNNING"]
    assert parent_run(folder, name).info.status == "FINISHED"


def parent_run(folder: Path, name: str = "tiny") -> Run:
    (parent,) = (r for r in runs(folder, name) if "mlflow.parentRunId" not in r.data.tags)
    return parent


def children(folder: Path, parent: str, name: str = "tiny") -> list[Run]:
    return [r for r in runs(folder, name) if r.data.tags.get("mlflow.parentRunId") == parent]


# two processes on fresh stores


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Process]]]:
    """A study of two seeds a trial that two commands have run together."""
    folder = tmp_path_factory.mktemp("shared")
    write_yaml(folder / "tiny.yaml", CONTENT | {"seeds": [0, 1]})
    with ExitStack() as stack:
        both = [stack.enter_context(started("study", "run", "tiny.yaml", folder=folder, label=label)) for label in "ab"]
        for process in both:
            process.wait()
        yield folder, both


@pytest.fixture
def done(shared: tuple[Path, list[Process]], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, both = shared
    assert [process.popen.returncode for process in both] == [0, 0]
    enter(folder, monkeypatch)
    return folder


def test_two_commands_share_a_study(shared: tuple[Path, list[Process]]) -> None:
    folder, both = shared
    for process in both:
        assert process.popen.returncode == 0, process.errors()
        assert "Traceback" not in process.errors()
        assert "next: make ui, or fffexp study show tiny" in process.output()
    assert_exact_budget(folder)
    assert [t.state for t in search(folder).trials] == [TrialState.COMPLETE] * 4
    assert {r.info.status for r in runs(folder)} == {"FINISHED"}


def test_the_summary(done: Path) -> None:
    summary = written(done)
    assert set(summary) >= SUMMARY
    assert (summary["study"], summary["directions"]) == ("tiny", ["maximize", "minimize"])
    assert summary["metrics"] == ["val/accuracy", LATENCY]
    assert summary["wall_s"] > 0
    assert summary["machines"] == 1
    numbers = [t["number"] for t in summary["trials"]]
    assert numbers == sorted(set(numbers))
    assert set(summary["pareto"]) <= set(summary["finalists"]) <= set(numbers)
    for trial in summary["trials"]:
        assert set(trial) >= TRIAL
        assert trial["state"] == "COMPLETE"
        assert set(trial["params"]) == {"layer", *(FF_SPACE if trial["params"]["layer"] == "FF" else FFF_SPACE)}
        assert all(isinstance(v, int) for k, v in trial["params"].items() if k != "layer")
        assert trial["values"] is not None
        assert len(trial["values"]) == 2
        if trial["number"] in summary["finalists"]:
            assert trial["seeds"] == [5, 6]
            assert trial["mean"] is not None
            assert trial["ci95"] is not None
            assert trial["ci95"][0] <= trial["mean"] <= trial["ci95"][1]
        else:
            assert (trial["seeds"], trial["mean"], trial["ci95"]) == ([], None, None)
    values = {t["number"]: t["values"] or [] for t in summary["trials"]}  # each has some
    assert summary["best"] == max(values, key=lambda n: (values[n][0], -values[n][1]))


def test_the_files_are_there_and_in_the_parent_run(done: Path) -> None:
    parent = parent_run(done)
    for name in FILES:
        content = (done / "outputs" / "studies" / "tiny" / name).read_bytes()
        assert len(content) > 500
        assert artifact(done, parent.info.run_id, name).is_file()
    assert artifact(done, parent.info.run_id, "study.yaml").read_text() == (done / "tiny.yaml").read_text()


def test_runs_are_nested(done: Path) -> None:
    summary, parent = written(done), parent_run(done)
    trials = children(done, parent.info.run_id)
    assert sorted(r.info.run_id for r in trials) == sorted(t["run_id"] or "" for t in summary["trials"])
    for trial in summary["trials"]:
        assert trial["run_id"]
        assert trial["values"]
        below = children(done, trial["run_id"])
        finals = [r for r in below if r.data.tags.get("finalist") == "true"]
        seeds = [r for r in below if r not in finals]
        assert sorted(r.data.params["seed"] for r in seeds) == ["0", "1"]
        assert [int(r.data.params["seed"]) for r in finals] == trial["seeds"]
        assert all("test/accuracy" in r.data.metrics for r in finals)
        assert not any("test/accuracy" in r.data.metrics for r in seeds)
        (mean,) = (r for r in trials if r.info.run_id == trial["run_id"])
        best = [r.data.metrics["val/best_accuracy"] for r in seeds]
        assert mean.data.metrics["val/accuracy"] == pytest.approx(sum(best) / 2)
        assert trial["values"][0] == pytest.approx(sum(best) / 2)
        assert mean.data.tags["study"] == "tiny"
        assert mean.data.tags["trial"] == str(trial["number"])
        assert mean.data.params["layer"] == trial["params"]["layer"]


def test_a_training_of_a_trial_reruns_from_its_config_alone(done: Path) -> None:
    trial = written(done)["trials"][-1]
    assert trial["run_id"]
    below = children(done, trial["run_id"])
    assert len(below) >= 2
    for one in below:
        config = artifact(done, one.info.run_id, "config.yaml")
        again = run(["fit", f"--config={config}", "--name=again"], Context(quiet=True))
        assert again is not None
        assert again.metrics["val/accuracy"] == pytest.approx(one.data.metrics["val/best_accuracy"])
        assert ("test/accuracy" in again.metrics) == ("test/accuracy" in one.data.metrics)


def test_the_run_that_show_names_has_a_config(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "show", "tiny"]) == 0
    output = capsys.readouterr().out
    assert "best finalist" in output
    (line,) = (line for line in output.splitlines() if "MLflow run" in line)
    assert artifact(done, line.split()[2], "config.yaml").is_file()


def test_show_within_a_budget(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "show", "tiny", "--max_latency_ms=1000"]) == 0
    assert "within 1000 ms" in capsys.readouterr().out
    assert main(["study", "show", "tiny", "--max_latency_ms=0.000001"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fffexp: ")
    assert "max_latency_ms" in line


def test_run_again_does_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {r.info.run_id for r in runs(done, "tiny")}
    trials = written(done)["trials"]
    begun = time.monotonic()
    assert main(["study", "run", "tiny.yaml"]) == 0
    assert main(["study", "resume", "tiny", "--jobs=2"]) == 0
    assert time.monotonic() - begun < 15
    assert {r.info.run_id for r in runs(done, "tiny")} == before
    assert written(done)["trials"] == trials
    assert_exact_budget(done)
    assert "took" in capsys.readouterr().out


def test_another_definition_needs_another_name(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_yaml(done / "other.yaml", CONTENT | {"seeds": [0, 2]})
    assert main(["study", "run", str(other)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiny was begun with another definition" in line
    assert_exact_budget(done)


# interruptions


def interrupted(number: signal.Signals, folder: Path) -> int:
    """Start a study, stop its command after the first trial, and wait until its workers have gone."""
    write_yaml(with_store(folder) / "tiny.yaml", CONTENT)
    with started("study", "run", "tiny.yaml", folder=folder) as process:
        process.until_printed("trial 1 of 4")
        process.send(number)
        status = process.wait(60)
        if number == signal.SIGKILL:
            # the workers notice, and mark what they were doing
            time.sleep(5)
        return status


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_study_is_resumed(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted(number, tmp_path) == status
    states = Counter(r.info.status for r in runs(tmp_path) if "mlflow.parentRunId" in r.data.tags)
    assert states["RUNNING"] == 0
    assert parent_run(tmp_path).info.status == ("RUNNING" if number == signal.SIGKILL else "FAILED")
    finished = {t.number for t in search(tmp_path).trials if t.state == TrialState.COMPLETE}
    assert finished
    enter(tmp_path, monkeypatch)
    assert main(["study", "resume", "tiny"]) == 0
    assert_exact_budget(tmp_path)
    assert finished <= {t["number"] for t in written(tmp_path)["trials"]}, "what was finished counts"


@pytest.mark.slow
def test_a_killed_worker_is_told_and_its_trial_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    write_yaml(with_store(tmp_path) / "tiny.yaml", CONTENT)
    with started("study", "run", "tiny.yaml", folder=tmp_path) as process:
        process.until_printed("trial 1 of 4")
        for child in psutil.Process(process.popen.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
        assert process.wait(60) == 1
        assert "resume" in process.errors()
    enter(tmp_path, monkeypatch)
    assert main(["study", "resume", "tiny"]) == 0
    assert_exact_budget(tmp_path)


# what a trial may meet; the worker works in this process, which saves starting one


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Summary]:
    enter(with_store(tmp_path), monkeypatch)

    def call(**changes: Any) -> Summary:
        spec, text = load(write_yaml(tmp_path / "tiny.yaml", CONTENT | {"evaluation_seeds": [5]} | changes))
        url, uri = f"sqlite:///{tmp_path}/outputs/optuna.db", paths.tracking_uri(None)
        runner = StudyRunner(spec, text, url, uri, jobs=1)
        store.fill(runner.search, url, search_work(spec))
        Worker(spec, url, uri, keep_seed=True).work()
        runner.run()
        return written(tmp_path)

    return call


def test_a_trial_with_a_non_finite_loss_fails_alone(work: Callable[..., Summary], tmp_path: Path) -> None:
    lr = {"lr": {"keys": ["model.optimizer.init_args.lr"], "choices": [0.01, 1e30]}}
    layers = {name: part | {"space": lr} for name, part in CONTENT["layers"].items()}
    # a random sampler with this seed draws both
    summary = work(layers=layers, trials_per_layer=3)
    states = Counter(t["state"] for t in summary["trials"])
    assert set(states) == {"COMPLETE", "FAIL"}
    assert sum(states.values()) == 6
    for trial in summary["trials"]:
        assert (trial["state"] == "FAIL") == (trial["params"]["lr"] == 1e30)
    failed = [r for r in runs(tmp_path) if r.info.status == "FAILED"]
    assert len(failed) == states["FAIL"]
    assert {r.info.status for r in runs(tmp_path)} == {"FINISHED", "FAILED"}
    assert parent_run(tmp_path).info.status == "FINISHED"


ACCURACY = {"objectives": {"val/accuracy": "maximize"}}
MEDIAN = {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 1}}


def test_one_objective_with_a_constraint_and_a_pruner(work: Callable[..., Summary], tmp_path: Path) -> None:
    overrides = CONTENT["overrides"] | {"trainer.max_epochs": 3}
    summary = work(**ACCURACY, constraints={LATENCY: 1000.0}, pruner=MEDIAN, overrides=overrides)
    assert (summary["metrics"], summary["directions"]) == (["val/accuracy"], ["maximize"])
    states = Counter(t["state"] for t in summary["trials"])
    assert set(states) <= {"COMPLETE", "PRUNED"}
    assert summary["best"] in summary["pareto"]
    best = max(t["values"][0] for t in summary["trials"] if t["state"] == "COMPLETE" and t["values"])
    assert {t["number"]: t for t in summary["trials"]}[summary["best"]]["values"] == [best]
    pruned = [r for r in runs(tmp_path) if r.info.status == "KILLED"]
    assert len(pruned) == states["PRUNED"]
    assert all(r.data.tags["pruned"] == "true" for r in pruned)


def test_seeds_that_train_at_once(
    work: Callable[..., Summary], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = copy.deepcopy(CONTENT["layers"])
    layers["FF"]["first"] = [{"width": 5}]
    layers["FFF"]["first"] = [{"depth": 3, "leaf_width": 4}, {"depth": 1}]
    summary = work(**ACCURACY, vectorize_seeds=True, seeds=[0, 1], layers=layers)
    chosen = [{k: v for k, v in t["params"].items() if k != "layer"} for t in summary["trials"]]
    assert [chosen[i] for i in (0, 1, 3)] == [{"width": 5}, *({"depth": d, "leaf_width": 4} for d in (3, 1))]
    assert {t["state"] for t in summary["trials"]} == {"COMPLETE"}
    for trial in summary["trials"]:
        assert trial["values"] == [pytest.approx(sum(trial["val_accuracies"]) / 2)]
        (mine,) = (r for r in runs(tmp_path) if r.info.run_id == trial["run_id"])
        assert mine.data.metrics["val/accuracy"] == pytest.approx(trial["values"][0])
        assert "test/accuracy" not in mine.data.metrics, "the test set is for finalists"
        assert mine.data.params["layer"] == trial["params"]["layer"]
        config = artifact(tmp_path, mine.info.run_id, "config.yaml")
        again = run(["fit", f"--config={config}", "--name=again", "--test=false"], Context(quiet=True))
        assert again is not None
        # sums in another order: a row of 288 may be a tie
        assert again.metrics["val/accuracy"] == pytest.approx(trial["val_accuracies"][0], abs=0.004)
    assert summary["finalists"]
    capsys.readouterr()
    path = str(tmp_path / "outputs" / "studies" / "tiny" / "summary.json")
    assert main(["study", "show", path, "--trials", "true"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[1].split()[0] == str(summary["best"])
    assert sum(line.split()[0].isdigit() for line in told.splitlines() if line) == 4
    assert main(["study", "show", "tiny", "--trials", "true", "--max_latency_ms", "1"]) == 2
    assert main(["study", "show", "tiny", "--trials", "true", "--against", "0"]) == 0
    assert "to trial 0" in capsys.readouterr().out
    assert main(["study", "show", "tiny", "--against", "0"]) == 2


def test_seeds_that_train_at_once_fail_at_a_loss_that_is_not_finite(work: Callable[..., Summary]) -> None:
    lr = {"lr": {"keys": ["model.optimizer.init_args.lr"], "choices": [0.01, 1e30]}}
    layers = {
        name: part | {"space": lr, "first": [{"lr": 1e30}, {"lr": 0.01}]} for name, part in CONTENT["layers"].items()
    }
    summary = work(**ACCURACY, vectorize_seeds=True, seeds=[0, 1], layers=layers)
    states = {(t["params"]["layer"], t["params"]["lr"]): t["state"] for t in summary["trials"]}
    assert states == {(layer, lr): "FAIL" if lr > 1 else "COMPLETE" for layer in layers for lr in (0.01, 1e30)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no summary of a study"),
        ('{"table": "table1"}', "is no summary of a study"),
        (
            '{"study": "old", "trials": [], "finalists": []}',
            "`fffexp study resume old`, where it was run, write it again",
        ),
    ],
)
def test_files_that_show_cannot_list(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    assert main(["study", "show", str(path), "--trials", "true"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert message in told


def test_a_constraint_that_nothing_meets(work: Callable[..., Summary], capsys: pytest.CaptureFixture[str]) -> None:
    summary = work(**ACCURACY, constraints={LATENCY: 1e-9}, trials_per_layer=1)
    assert {t["state"] for t in summary["trials"]} == {"COMPLETE"}
    assert (summary["pareto"], summary["finalists"], summary["best"]) == ([], [], None)
    assert main(["study", "show", "tiny"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_pruned_trials(work: Callable[..., Summary], tmp_path: Path) -> None:
    # no accuracy reaches 1.1
    pruner = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 1.1}}
    summary = work(**ACCURACY, pruner=pruner, trials_per_layer=1)
    assert {t["state"] for t in summary["trials"]} == {"PRUNED"}
    assert (summary["pareto"], summary["best"]) == ([], None)
    trained = [r for r in runs(tmp_path) if "mlflow.parentRunId" in r.data.tags]
    assert len(trained) == 2
    for run_ in trained:
        assert run_.info.status == "KILLED"
        assert run_.data.tags["pruned"] == "true"
        assert "val/accuracy" in run_.data.metrics, "what it had measured is kept"


def test_an_unknown_metric_is_told(work: Callable[..., Summary]) -> None:
    with pytest.raises(ValueError, match="speed/nonesuch is not measured"):
        work(objectives={"val/accuracy": "maximize", "speed/nonesuch": "minimize"})


def test_a_mistake_in_a_corner_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(with_store(tmp_path), monkeypatch)
    space = {"depth": {"keys": ["model.layer.init_args.depth"], "low": -1, "high": 3}}
    layers = {"FFF": CONTENT["layers"]["FFF"] | {"space": space}}
    path = write_yaml(tmp_path / "tiny.yaml", CONTENT | {"layers": layers})
    assert main(["study", "run", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "layer FFF" in line
    assert "depth is -1" in line
    assert runs(tmp_path) == []


def test_resume_names_the_studies_there_are(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "resume", "nonesuch"]) == 2
    assert "there are: tiny" in capsys.readouterr().err

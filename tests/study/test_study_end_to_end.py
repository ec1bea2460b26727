"""`fffexp study` from a file to its summary, with processes that come and go."""

import copy
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
import requests
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState
from processes import CONFIGS, artifact, client, enter, runs, started, with_store, write_yaml

from fffexp import paths, tracking
from fffexp.cli import main
from fffexp.errors import UserError
from fffexp.study import store
from fffexp.study.results import Results
from fffexp.study.runner import StudyRunner
from fffexp.study.spec import load
from fffexp.study.worker import StoredStudy, Worker
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
SUMMARY = {
    "study",
    "monitor",
    "mode",
    "unit",
    "directions",
    "metrics",
    "trials",
    "pareto",
    "best",
    "machines",
    "wall_s",
}
TRIAL = {"number", "state", "params", "values", "run_id", "seeds", "mean", "ci95", "runs", "evaluation", "attempts"}
FILES = ("summary.json", "report.html", "pareto.png", "history.png")
LATENCY = "speed/latency_b256_ratio"


def written(folder: Path, name: str = "tiny") -> Results:
    return Results.load(folder / "outputs" / "studies" / name / "summary.json")


def trials_of(folder: Path, part: str, name: str = "tiny") -> list[FrozenTrial]:
    url = f"sqlite:///{folder}/outputs/optuna.db"
    return optuna.load_study(study_name=f"{name}/{part}", storage=url).trials


def assert_exact_budget(folder: Path, name: str = "tiny", fresh: Sequence[int] = (5, 6)) -> None:
    """Every job of the search and of the finalists was done once, and nothing is still running."""
    done = {
        part: Counter(t.user_attrs["job"] for t in trials_of(folder, part, name) if t.state == TrialState.COMPLETE)
        for part in ("FF", "FFF", "runs")
    }
    assert (done["FF"], done["FFF"]) == (Counter(["0", "2"]), Counter(["1", "3"]))
    finalists = written(folder, name).finalists
    assert done["runs"] == Counter(f"{number}/{seed}" for number in finalists for seed in fresh)
    assert not [r for r in runs(folder, name) if r.info.status == "RUNNING"]
    assert parent_run(folder, name).info.status == "FINISHED"


def parent_run(folder: Path, name: str = "tiny") -> Run:
    (parent,) = (r for r in runs(folder, name) if "mlflow.parentRunId" not in r.data.tags)
    return parent


def children(folder: Path, parent: str, name: str = "tiny") -> list[Run]:
    return [r for r in runs(folder, name) if r.data.tags.get("mlflow.parentRunId") == parent]


# a study that has ended; its worker worked in this process, which saves starting one


def run_here(folder: Path, **changes: Any) -> Results:
    spec = load(write_yaml(folder / "tiny.yaml", CONTENT | changes))
    url, uri = f"sqlite:///{folder}/outputs/optuna.db", paths.tracking_uri(None)
    runner = StudyRunner(spec, url, uri, jobs=1)
    Worker(StoredStudy(spec, runner.name, store.open_storage(url)), uri).work()
    runner.run()
    return written(folder)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_store(tmp_path_factory.mktemp("ended"))
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        run_here(folder, seeds=[0, 1])
    return folder


@pytest.fixture
def done(ended: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a study of two seeds a trial."""
    enter(ended, monkeypatch)
    return ended


@pytest.mark.slow
def test_two_commands_share_a_study_on_fresh_stores(tmp_path: Path) -> None:
    write_yaml(tmp_path / "tiny.yaml", CONTENT | {"seeds": [0, 1]})
    with ExitStack() as stack:
        commands = [started("study", "run", "tiny.yaml", folder=tmp_path, label=label) for label in "ab"]
        both = [stack.enter_context(command) for command in commands]
        for process in both:
            assert process.wait() == 0, process.errors()
            assert "Traceback" not in process.errors()
            assert "next: make ui, or fffexp study show tiny" in process.output()
    assert_exact_budget(tmp_path)
    for part in ("FF", "FFF"):
        assert [t.state for t in trials_of(tmp_path, part) if "job" in t.user_attrs] == [TrialState.COMPLETE] * 2
    assert {r.info.status for r in runs(tmp_path)} == {"FINISHED"}


def test_the_budget_is_exact(done: Path) -> None:
    assert_exact_budget(done)
    assert {r.info.status for r in runs(done, "tiny")} == {"FINISHED"}


def test_the_summary(done: Path) -> None:
    content = json.loads((done / "outputs" / "studies" / "tiny" / "summary.json").read_text())
    assert set(content) >= SUMMARY
    assert all(set(trial) >= TRIAL for trial in content["trials"])
    assert (content["study"], content["directions"]) == ("tiny", ["maximize", "minimize"])
    assert (content["monitor"], content["mode"], content["unit"]) == ("val/accuracy", "max", True)
    assert content["metrics"] == ["val/accuracy", LATENCY]
    results = written(done)
    assert results.machines == 1
    assert results.environments
    assert [t.number for t in results.trials] == [0, 1, 2, 3], "over all layers, in turn"
    assert [t.layer for t in results.trials] == ["FF", "FFF", "FF", "FFF"]
    assert set(results.pareto) <= set(results.finalists) <= {0, 1, 2, 3}
    for trial in results.trials:
        assert (trial.state, trial.error) == ("COMPLETE", None)
        assert trial.attempts >= 1
        assert set(trial.params) == {"layer", *(FF_SPACE if trial.layer == "FF" else FFF_SPACE)}
        assert all(isinstance(v, int) for k, v in trial.params.items() if k != "layer")
        assert trial.values == pytest.approx([sum(run[n] for run in trial.runs) / 2 for n in results.metrics])
        assert [run["seed"] for run in trial.runs] == [0, 1]
        for record in trial.runs + trial.evaluation:
            assert record["backend"] == client(done).get_run(record["run_id"]).data.tags["backend"]
        if trial.number in results.finalists:
            assert trial.seeds == [run["seed"] for run in trial.evaluation] == [5, 6]
            assert trial.mean is not None
            assert trial.test_mean is not None
        else:
            assert (trial.seeds, trial.evaluation, trial.test_mean) == ([0, 1], [], None)
    values = {t.number: t.values or [] for t in results.trials}  # each has some
    assert results.best == max(values, key=lambda n: (values[n][0], -values[n][1]))


def test_the_files_are_there_and_in_the_parent_run(done: Path) -> None:
    parent = parent_run(done)
    for name in FILES:
        content = (done / "outputs" / "studies" / "tiny" / name).read_bytes()
        assert len(content) > 500
        assert artifact(done, parent.info.run_id, name).is_file()
    assert artifact(done, parent.info.run_id, "study.yaml").read_text() == (done / "tiny.yaml").read_text()


def test_runs_are_nested(done: Path) -> None:
    results, parent = written(done), parent_run(done)
    trials = children(done, parent.info.run_id)
    assert sorted(r.info.run_id for r in trials) == sorted(t.run_id or "" for t in results.trials)
    for trial in results.trials:
        assert trial.run_id
        assert trial.values
        below = children(done, trial.run_id)
        finals = [r for r in below if r.data.tags.get("finalist") == "true"]
        seeds = [r for r in below if r not in finals]
        assert sorted(r.data.params["seed"] for r in seeds) == ["0", "1"]
        assert sorted(int(r.data.params["seed"]) for r in finals) == [run["seed"] for run in trial.evaluation]
        assert all("test/accuracy" in r.data.metrics for r in finals)
        assert not any("test/accuracy" in r.data.metrics for r in seeds)
        (mean,) = (r for r in trials if r.info.run_id == trial.run_id)
        best = [r.data.metrics["val/best_accuracy"] for r in seeds]
        assert mean.data.metrics["val/accuracy"] == pytest.approx(sum(best) / 2)
        assert trial.values[0] == pytest.approx(sum(best) / 2)
        assert mean.data.tags["study"] == "tiny"
        assert mean.data.tags["trial"] == str(trial.number)
        assert mean.data.params["layer"] == trial.layer


def test_a_training_of_a_trial_reruns_from_its_config_alone(done: Path) -> None:
    trial = written(done).trials[-1]
    assert trial.run_id
    below = children(done, trial.run_id)
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
    (line,) = (line for line in output.splitlines() if "MLflow run: " in line)
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
    trials = written(done).trials
    assert main(["study", "run", "tiny.yaml"]) == 0
    assert main(["study", "resume", "tiny", "--jobs=2"]) == 0
    assert {r.info.run_id for r in runs(done, "tiny")} == before
    assert written(done).trials == trials
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
    write_yaml(with_store(folder) / "tiny.yaml", CONTENT | {"evaluation_seeds": [5]})
    with started("study", "run", "tiny.yaml", folder=folder) as process:
        process.until_printed("trial 1 of 4")
        process.send(number)
        status = process.wait()
        if number == signal.SIGKILL:
            # the workers notice, and mark what they were doing
            time.sleep(5)
        return status


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_study_is_resumed(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted(number, tmp_path) == status
    states = Counter(r.info.status for r in runs(tmp_path) if "mlflow.parentRunId" in r.data.tags)
    assert states["RUNNING"] == 0
    assert parent_run(tmp_path).info.status == ("RUNNING" if number == signal.SIGKILL else "FAILED")
    finished = [t for part in ("FF", "FFF") for t in trials_of(tmp_path, part) if t.state == TrialState.COMPLETE]
    assert finished
    enter(tmp_path, monkeypatch)
    assert main(["study", "resume", "tiny"]) == 0
    assert_exact_budget(tmp_path, fresh=[5])
    assert written(tmp_path).wall_s > 0
    trained = {t.number: t.runs for t in written(tmp_path).trials}
    for trial in finished:
        assert trained[trial.user_attrs["number"]] == [trial.user_attrs["run/0"]], "what was finished counts"


# what a trial may meet


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Results]:
    enter(with_store(tmp_path), monkeypatch)
    return lambda **changes: run_here(tmp_path, **{"evaluation_seeds": [5]} | changes)


@pytest.mark.slow
def test_a_trial_with_a_non_finite_loss_fails_alone(work: Callable[..., Results], tmp_path: Path) -> None:
    lr = {"lr": {"keys": ["model.optimizer.init_args.lr"], "choices": [0.01, 1e30]}}
    layers = {
        name: part | {"space": lr, "initial_trials": [{"lr": 0.01}, {"lr": 1e30}]}
        for name, part in CONTENT["layers"].items()
    }
    results = work(layers=layers)
    for trial in results.trials:
        assert (trial.state == "FAIL") == (trial.params["lr"] == 1e30)
        assert ("lower the learning rate" in (trial.error or "")) == (trial.state == "FAIL")
        assert trial.attempts == 1
    states = Counter(r.info.status for r in runs(tmp_path))
    assert states["FAILED"] == 2
    assert set(states) == {"FINISHED", "FAILED"}
    assert parent_run(tmp_path).info.status == "FINISHED"


@pytest.mark.slow
def test_an_objective_that_is_not_a_number_fails_its_trial_once(
    work: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    def undefined(*args: Any) -> Any:
        result = run(*args)
        assert result is not None
        result.metrics["val/accuracy"] = math.nan
        return result

    monkeypatch.setattr("fffexp.study.worker.run", undefined)
    results = work()
    assert {t.state for t in results.trials} == {"FAIL"}
    assert {t.attempts for t in results.trials} == {1}
    assert all("val/accuracy is NaN" in (t.error or "") for t in results.trials)


def test_a_finished_seed_is_kept_where_tracking_fails_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_texts: list[str] = []
    text = tracking.Run.text

    def out_of_reach(run: tracking.Run, content: str, file: str) -> None:
        written_texts.append(file)
        # of the study, of the first seed, and of all seeds of the trial
        if written_texts == ["study.yaml", "config.yaml", "config.yaml"]:
            raise requests.ConnectionError("the tracking server is gone")
        text(run, content, file)

    enter(with_store(tmp_path), monkeypatch)
    monkeypatch.setattr(tracking.Run, "text", out_of_reach)
    results = run_here(tmp_path, seeds=[0, 1])
    assert sorted(trial.attempts for trial in results.trials) == [1, 1, 1, 2]
    assert all([run["seed"] for run in trial.runs] == [0, 1] for trial in results.trials)
    (failed,) = (t for part in ("FF", "FFF") for t in trials_of(tmp_path, part) if t.state == TrialState.FAIL)
    kept = results.trial(failed.user_attrs["number"]).runs[0]
    assert kept == failed.user_attrs["run/0"], "what was trained was trained again"


ACCURACY = {"objectives": {"val/accuracy": "maximize"}}
MEDIAN = {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 1}}


@pytest.mark.slow
def test_one_objective_with_a_constraint_and_a_pruner(work: Callable[..., Results], tmp_path: Path) -> None:
    overrides = CONTENT["overrides"] | {"trainer.max_epochs": 3}
    results = work(**ACCURACY, constraints={LATENCY: 1000.0}, pruner=MEDIAN, overrides=overrides)
    assert (results.metrics, results.directions) == (["val/accuracy"], ["maximize"])
    states = Counter(t.state for t in results.trials)
    assert set(states) <= {"COMPLETE", "PRUNED"}
    assert results.best in results.pareto
    best = max(t.values[0] for t in results.trials if t.state == "COMPLETE" and t.values)
    assert results.best is not None
    assert results.trial(results.best).values == [best]
    pruned = [r for r in runs(tmp_path) if r.info.status == "KILLED"]
    assert len(pruned) == states["PRUNED"]
    assert all(r.data.tags["pruned"] == "true" for r in pruned)


@pytest.mark.slow
def test_another_objective_than_the_monitored_metric(work: Callable[..., Results]) -> None:
    results = work(objectives={LATENCY: "minimize", "epochs_to_best": "minimize"}, trials_per_layer=1)
    assert (results.metrics, results.directions) == ([LATENCY, "epochs_to_best"], ["minimize", "minimize"])
    accuracies = {t.number: t.runs[0]["val/accuracy"] for t in results.trials}
    assert accuracies[results.best or 0] == max(accuracies.values()), "the best is so by the monitored metric"


@pytest.mark.slow
def test_seeds_that_train_at_once(
    work: Callable[..., Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = copy.deepcopy(CONTENT["layers"])
    layers["FF"]["initial_trials"] = [{"width": 5}]
    layers["FFF"]["initial_trials"] = [{"depth": 3, "leaf_width": 4}, {"depth": 1}]
    results = work(**ACCURACY, vectorize_seeds=True, seeds=[0, 1], layers=layers)
    chosen = [{k: v for k, v in t.params.items() if k != "layer"} for t in results.trials]
    assert [chosen[i] for i in (0, 1, 3)] == [{"width": 5}, *({"depth": d, "leaf_width": 4} for d in (3, 1))]
    assert {t.state for t in results.trials} == {"COMPLETE"}
    for trial in results.trials:
        accuracies = [run["val/accuracy"] for run in trial.runs]
        assert trial.values is not None
        assert trial.values == pytest.approx([sum(accuracies) / 2])
        (own,) = (r for r in runs(tmp_path) if r.info.run_id == trial.run_id)
        assert own.data.metrics["val/accuracy"] == pytest.approx(trial.values[0])
        assert "test/accuracy" not in own.data.metrics, "the test set is for finalists"
        assert own.data.params["layer"] == trial.layer
        config = artifact(tmp_path, own.info.run_id, "config.yaml")
        again = run(["fit", f"--config={config}", "--name=again", "--test=false"], Context(quiet=True))
        assert again is not None
        # sums in another order: a row of 288 may be a tie
        assert again.metrics["val/accuracy"] == pytest.approx(accuracies[0], abs=0.004)
    assert results.finalists
    capsys.readouterr()
    path = str(tmp_path / "outputs" / "studies" / "tiny" / "summary.json")
    assert main(["study", "trials", path]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[0] == str(results.best)
    assert {line.split()[0] for line in printed[1:5]} == {"0", "1", "2", "3"}
    assert main(["study", "trials", "tiny", "--baseline", "0"]) == 0
    assert "to trial 0" in capsys.readouterr().out
    assert main(["study", "trials", "tiny", "--baseline", "7"]) == 2


@pytest.mark.slow
def test_seeds_that_train_at_once_fail_at_a_loss_that_is_not_finite(work: Callable[..., Results]) -> None:
    lr = {"lr": {"keys": ["model.optimizer.init_args.lr"], "choices": [0.01, 1e30]}}
    initial = [{"lr": 1e30}, {"lr": 0.01}]
    layers = {name: part | {"space": lr, "initial_trials": initial} for name, part in CONTENT["layers"].items()}
    results = work(**ACCURACY, vectorize_seeds=True, seeds=[0, 1], layers=layers)
    states = {(t.layer, t.params["lr"]): t.state for t in results.trials}
    assert states == {(layer, lr): "FAIL" if lr > 1 else "COMPLETE" for layer in layers for lr in (0.01, 1e30)}


# listed points

WIDTH = {"keys": ["model.layer.init_args.width"]}
LISTED: dict[str, Any] = {key: CONTENT[key] for key in ("name", "configs", "overrides", "seeds")} | {
    "test": True,
    "layers": {
        "FF": {
            "config": CONTENT["layers"]["FF"]["config"],
            "space": {"width": WIDTH, "kind": {"keys": []}},
            "points": [{"width": 4, "kind": "narrow"}, {"width": 8}],
        },
        "controls": {
            "config": CONTENT["layers"]["FF"]["config"],
            "space": {"width": WIDTH},
            "points": [{"width": 16}],
        },
    },
}


def run_listed(path: Path | None, **changes: Any) -> Results:
    spec = load(write_yaml(Path("listed.yaml"), LISTED | changes))
    url, uri = f"sqlite:///{Path.cwd()}/outputs/optuna.db", paths.tracking_uri(None)
    runner = StudyRunner(spec, url, uri, jobs=1, path=path, extra={"table": "tiny"})
    Worker(StoredStudy(spec, runner.name, store.open_storage(url)), uri).work()
    return runner.run()


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_listed_points(together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(with_store(tmp_path), monkeypatch)
    results = run_listed(None, vectorize_seeds=together, seeds=[0, 1])
    assert [(t.number, t.layer, t.params.get("kind"), t.params["width"]) for t in results.trials] == [
        (0, "FF", "narrow", 4),
        (1, "FF", None, 16),
        (2, "FF", "narrow", 8),
    ]
    for trial in results.trials:
        assert (trial.state, trial.seeds, trial.evaluation) == ("COMPLETE", [0, 1], [])
        assert len({run["seed"] for run in trial.runs}) == 2
        assert trial.values == pytest.approx([sum(run[name] for run in trial.runs) / 2 for name in results.metrics])
        assert trial.test_mean is not None, "the test set is read where nothing is selected"
        assert trial.run_id
        assert trial.recipe
    assert results.finalists == []
    assert not [r for r in runs(tmp_path) if r.info.status == "RUNNING"]
    assert main(["study", "trials", "tiny"]) == 0
    assert main(["report", "tiny"]) == 0


def test_a_file_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(with_store(tmp_path), monkeypatch)
    path = tmp_path / "results.json"
    first = run_listed(path)
    assert json.loads(path.read_text())["table"] == "tiny"
    assert [(t.number, t.seeds) for t in first.trials] == [(0, [0]), (1, [0]), (2, [0])]
    before = {r.info.run_id for r in runs(tmp_path)}
    layers = copy.deepcopy(LISTED["layers"])
    layers["FF"]["points"] = [{"width": 8, "kind": "wide"}, {"width": 32}]
    del layers["controls"]
    second = run_listed(path, seeds=[0, 1], layers=layers)
    # the point with another kind is the same training
    assert [(t.params["width"], t.seeds) for t in second.trials] == [(4, [0]), (16, [0]), (8, [0, 1]), (32, [0, 1])]
    assert [t.number for t in second.trials] == [0, 1, 2, 3]
    assert second.trial(2).runs[0] == first.trial(2).runs[0]
    trained = [r for r in runs(tmp_path) if r.info.run_id not in before and "mlflow.parentRunId" in r.data.tags]
    assert len(trained) == 3, "seed 1 of one point, both seeds of another"
    spec = load(Path("listed.yaml"))
    with pytest.raises(UserError, match="another table"):
        StudyRunner(spec, "sqlite:///outputs/optuna.db", paths.tracking_uri(None), 1, path, {"table": "other"})


# mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no results of a study"),
        ('{"table": "table1"}', "holds no results of a study"),
        ('{"study": "old", "trials": [], "finalists": []}', "holds no results of a study"),
    ],
)
def test_files_that_show_cannot_list(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    assert main(["study", "trials", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
def test_a_constraint_that_nothing_meets(work: Callable[..., Results], capsys: pytest.CaptureFixture[str]) -> None:
    results = work(**ACCURACY, constraints={LATENCY: 1e-9}, trials_per_layer=1)
    assert {t.state for t in results.trials} == {"COMPLETE"}
    assert (results.pareto, results.finalists, results.best) == ([], [], None)
    for command in ("show", "best"):
        capsys.readouterr()
        assert main(["study", command, "tiny"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_pruned_trials(work: Callable[..., Results], tmp_path: Path) -> None:
    # no accuracy reaches 1.1
    pruner = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 1.1}}
    results = work(**ACCURACY, pruner=pruner, trials_per_layer=1)
    assert {t.state for t in results.trials} == {"PRUNED"}
    assert (results.pareto, results.best) == ([], None)
    trained = [r for r in runs(tmp_path) if "mlflow.parentRunId" in r.data.tags]
    assert len(trained) == 2
    for run_ in trained:
        assert run_.info.status == "KILLED"
        assert run_.data.tags["pruned"] == "true"
        assert "val/accuracy" in run_.data.metrics, "what it had measured is kept"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"val/accuracy": "maximize", "speed/nonesuch": "minimize"}}, "speed/nonesuch is not measured"),
        (ACCURACY | {"constraints": {"nonesuch": 1.0}}, "nonesuch is not measured"),
    ],
)
def test_an_unknown_metric_is_refused_before_the_name_is_spent(
    changes: dict[str, Any], message: str, work: Callable[..., Results], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        work(**changes)
    assert runs(tmp_path) == []
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path}/outputs/optuna.db") == []


def test_a_mistake_in_a_corner_is_reported_before_training(
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


# what is done with a study that has ended


def test_the_best_checkpoint_is_found(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "best", "tiny"]) == 0
    lines = dict(line.partition(": ")[::2] for line in capsys.readouterr().out.splitlines())
    args = [f"--config={lines['config']}", f"--ckpt_path={lines['checkpoint']}"]
    best = max(written(done).finalist_trials(), key=lambda t: t.mean or 0)
    assert lines["run"] in {run["run_id"] for run in best.evaluation}
    assert main(["validate", *args]) == 0


def test_show_as_json(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "show", "tiny", "--max_latency_ms", "1000", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {t["number"] for t in content["trials"]} == set(written(done).finalists)
    assert content["best"] in written(done).finalists
    assert content["difference"].keys() >= {"difference", "interval", "seeds", "p", "significant"}


def test_report_is_written_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = done / "outputs" / "studies" / "tiny" / "report.html"
    page.unlink()
    assert main(["report", "tiny"]) == 0
    assert page.is_file()
    assert "difference to the" in capsys.readouterr().out


@pytest.mark.slow
def test_delete_frees_the_name(
    work: Callable[..., Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"trials_per_layer": 1, "layers": {"FF": CONTENT["layers"]["FF"]}}
    work(**one)
    assert main(["study", "clean"]) == 0
    assert "freed 0 stale trials" in capsys.readouterr().out
    assert main(["study", "delete", "tiny"]) == 0
    assert not (tmp_path / "outputs" / "studies" / "tiny").exists()
    assert main(["study", "delete", "tiny"]) == 2
    assert "no study 'tiny'" in capsys.readouterr().err
    assert len(work(**one, seeds=[3]).trials) == 1, "another definition takes the name"


def test_clean_frees_what_a_killed_worker_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(with_store(tmp_path), monkeypatch)
    url = f"sqlite:///{tmp_path}/outputs/optuna.db"
    study = optuna.create_study(storage=store.Storage(url, heartbeat_interval=1, grace_period=1), study_name="tiny/FF")
    study.enqueue_trial({}, user_attrs={"job": "0"})
    study.ask()
    monkeypatch.setattr(store, "GRACE_S", 1)
    time.sleep(2.5)
    assert main(["study", "clean"]) == 0
    assert "freed 1 stale" in capsys.readouterr().out
    assert [t.state for t in study.get_trials()] == [TrialState.FAIL]

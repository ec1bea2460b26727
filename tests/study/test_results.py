import json
import math
from pathlib import Path
from typing import Any

import pytest

from fffexp.errors import UserError
from fffexp.study.results import LATENCY, REFERENCE, Results, Trial, answer
from fffexp.study.runner import merged, pareto


def trial(
    number: int,
    params: dict[str, Any],
    values: list[float] | None,
    val: list[float] | None = None,
    test: list[float] | None = None,
    latency: list[float] | None = None,
) -> Trial:
    """A trial, and a finalist where there are values of fresh seeds."""
    made = Trial(number, "COMPLETE" if values else "FAIL", params, values, run_id=f"run{number}")
    made.sizes = {"inference_size": 12, "parameters": 12345, "flops_per_sample": 999}
    for i, value in enumerate(val or []):
        run = {"seed": 5 + i, "val/accuracy": value, "test/accuracy": (test or val or [])[i]}
        made.evaluation.append(run | ({LATENCY: latency[i], REFERENCE: 1.0} if latency else {}))
    return made


def results_of(trials: list[Trial], study: str = "tiny", single: bool = False) -> Results:
    finalists = [t.number for t in trials if t.evaluation]
    results = Results(
        study,
        monitor="val/accuracy",
        mode="max",
        unit=True,
        directions=["maximize"] if single else ["maximize", "minimize"],
        metrics=["val/accuracy"] if single else ["val/accuracy", LATENCY],
        trials=trials,
        pareto=finalists,
        finalists=finalists,
        wall_s=12.5,
    )
    results.update()
    return results


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([(0.9, 1.0)], [0]),
        ([(0.9, 1.0), (0.8, 2.0)], [0]),  # the first is better in both
        ([(0.9, 1.0), (0.95, 2.0)], [0, 1]),  # each is better in one
        ([(0.9, 1.0), (0.9, 1.5)], [0]),  # equal in one, better in the other
        ([(0.9, 1.0), (0.9, 1.0), (0.5, 3.0)], [0, 1]),  # equal points stay
        ([(0.5, 3.0), (0.7, 2.0), (0.9, 2.5), (0.6, 1.0), (0.6, 1.1)], [1, 2, 3]),
    ],
)
def test_pareto_front(values: list[tuple[float, float]], expected: list[int]) -> None:
    trials = [Trial(i, "COMPLETE", {"layer": "FF"}, list(v)) for i, v in enumerate(values)]
    assert pareto(trials, ["maximize", "minimize"]) == expected


def test_pareto_front_of_one_objective_is_the_best() -> None:
    trials = [Trial(i, "COMPLETE", {"layer": "FF"}, [v]) for i, v in enumerate([0.5, 0.9, 0.7, 0.9])]
    assert pareto(trials, ["maximize"]) == [1, 3]
    assert pareto(trials, ["minimize"]) == [0]


def test_statistics_are_of_fresh_seeds_if_there_are_any() -> None:
    made = trial(0, {"layer": "FF"}, [0.8], [0.97, 0.96, 0.98], [0.95, 0.95, 0.95])
    made.runs = [{"seed": 0, "val/accuracy": 0.8}]
    results_of([made])
    assert made.seeds == [5, 6, 7]
    assert made.mean == pytest.approx(0.97)
    assert made.ci95 is not None
    assert made.ci95[0] < 0.97 < made.ci95[1] < 1
    assert made.test_mean == pytest.approx(0.95)
    assert made.test_ci95 is None, "no spread was seen"
    made.evaluation = []
    results_of([made])
    again = [made.seeds, made.mean, made.ci95, made.test_mean]
    assert again == [[0], 0.8, None, None]


def test_a_file_and_back(tmp_path: Path) -> None:
    results = results_of([trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1], [0.9, 0.8], latency=[0.1, 0.3])])
    results.extra = {"table": "table1", "controls": [{"width": 3}]}
    results.trials[0].attempts, results.trials[0].error = 3, "why"
    path = tmp_path / "deep" / "results.json"
    results.save(path)
    assert Results.load(path).to_json() == results.to_json()
    content = json.loads(path.read_text())
    assert content["controls"] == [{"width": 3}], "further keys stand beside the others"
    assert content["trials"][0]["evaluation"][1] == {
        "seed": 6,
        "val/accuracy": 0.8,
        "test/accuracy": 0.8,
        LATENCY: 0.3,
        REFERENCE: 1.0,
    }
    assert [p.name for p in path.parent.iterdir()] == ["results.json"], "no temporary file is left"


def test_what_is_not_finite_is_null_and_left_out(tmp_path: Path) -> None:
    results = results_of([trial(0, {"layer": "FF", "lr": math.inf}, [math.nan, 0.3], [math.nan, 0.96, 0.94])])
    path = tmp_path / "results.json"
    results.save(path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["trials"][0]["values"] == [None, 0.3]
    back = Results.load(path)
    assert back.trials[0].mean == pytest.approx(0.95), "over the seeds that are left"
    assert back.selected_by(back.trials[0]) is None


def test_a_file_that_cannot_be_replaced_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "summary.json" / "occupied").mkdir(parents=True)
    with pytest.raises(OSError, match=r"summary\.json"):
        results_of([]).save(tmp_path / "summary.json")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"study": "x"}', '{"study": "x", "monitor": "y", "trials": [1]}'])
def test_what_holds_no_results(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    for path in (tmp_path / "x.json", tmp_path / "absent.json"):
        with pytest.raises(UserError, match=path.name) as error:
            Results.load(path)
        assert "\n" not in str(error.value)


def test_a_file_takes_the_runs_that_it_does_not_have() -> None:
    def one(number: int, recipe: str, *seeds: int) -> Trial:
        return Trial(
            number, "COMPLETE", {"layer": "FF"}, runs=[{"seed": s, "val/accuracy": 0.1} for s in seeds], recipe=recipe
        )

    file = Results("t", trials=[one(0, "a", 1), one(4, "b", 0)], seeds=[0, 1])
    found = merged(file, Results("t", trials=[one(0, "c", 0), one(1, "a", 0, 1, 2), one(2, "c", 0)], seeds=[0, 1, 2]))
    assert [(t.number, t.recipe, [run["seed"] for run in t.runs]) for t in found.trials] == [
        (0, "a", [0, 1, 2]),
        (4, "b", [0]),
        (5, "c", [0]),
    ]
    assert found.seeds == [0, 1, 2]


def test_latencies_are_at_the_median_speed_of_the_machine() -> None:
    a = trial(0, {"layer": "FF"}, [0.9, 0.5], [0.9, 0.9, 0.9], latency=[0.5, 0.6, 0.5])
    b = trial(1, {"layer": "FFF"}, [0.9, 2.0], [0.9, 0.9, 0.9])
    b.runs = [{"seed": 0, LATENCY: 2.0, REFERENCE: 3.0}]
    for run, ms in zip(a.evaluation, (0.1, 0.2, 0.4), strict=True):  # half as fast each time
        run[REFERENCE] = ms
    results = results_of([a, b])
    assert results.reference_ms == pytest.approx(0.3), "of the trials' own seeds too"
    assert a.latency_ms == pytest.approx(0.5 * 0.3)
    assert b.latency_ms is None, "its fresh seeds were not timed"


def test_the_answer_to_a_budget() -> None:
    ff = trial(0, {"layer": "FF"}, [0.9, 0.1], [0.9, 0.91, 0.92], [0.9, 0.9, 0.9], [0.2] * 3)
    fff = trial(1, {"layer": "FFF"}, [0.9, 0.1], [0.96, 0.95, 0.955], [0.92, 0.93, 0.94], [0.3] * 3)
    moe = trial(2, {"layer": "own.MoE"}, [0.9, 0.1], [0.97, 0.96, 0.98], [0.95, 0.96, 0.94], [0.5, 0.7, 0.4])
    results = results_of([ff, fff, moe])
    assert [(t.number, t.latency_ms) for t in results.finalist_trials()] == [(0, 0.2), (1, 0.3), (2, 0.5)]
    found = answer(results)
    assert (found.best, found.rival, found.fitting) == (moe, ff, [ff, fff, moe])
    assert found.test is not None
    # on the test set: 5, 6, 4 points
    assert found.test.difference == pytest.approx(0.05)
    assert found.test.significant
    assert answer(results, 0.3).best is fff, "as much as it takes"
    assert (answer(results, 0.25).best, answer(results, 0.25).rival) == (ff, None)
    ff.evaluation = [run | {"val/accuracy": 0.99} for run in ff.evaluation]
    results.update()
    assert (answer(results).best, answer(results).rival) == (ff, moe), "the best of the other layers"


def test_the_answer_where_less_is_better() -> None:
    trials = [trial(0, {"layer": "FF"}, [0.1], [0.1, 0.2]), trial(1, {"layer": "FFF"}, [0.1], [0.3, 0.4])]
    for t in trials:
        t.evaluation = [{"seed": run["seed"], "val/mse": run["val/accuracy"]} for run in t.evaluation]
    results = results_of(trials)
    results.monitor, results.mode, results.unit = "val/mse", "min", False
    results.update()
    assert answer(results).best is trials[0]
    assert results.test_monitor == "test/mse"


def test_equal_ones_go_to_the_faster() -> None:
    trials = [
        trial(i, {"layer": layer}, [0.9, ms], [0.9, 0.8], latency=[ms, ms])
        for i, (layer, ms) in enumerate([("FF", 0.3), ("FFF", 0.2), ("NoisyTopKMoE", 0.4)])
    ]
    assert answer(results_of(trials)).best.number == 1


def test_seeds_apart_have_no_difference() -> None:
    trials = [trial(i, {"layer": layer}, [0.9], [0.9 + i / 100] * 2) for i, layer in enumerate(("FF", "FFF"))]
    trials[1].evaluation = [run | {"seed": run["seed"] + 50} for run in trials[1].evaluation]
    found = answer(results_of(trials))
    assert found.rival is not None
    assert found.test is None


def test_nothing_fits_and_how_much_is_enough() -> None:
    results = results_of([trial(0, {"layer": "FF"}, [0.9, 0.1], [0.9] * 3, latency=[0.123412] * 3)])
    with pytest.raises(UserError, match=r"fits 0\.1 ms: its fastest finalist takes 0\.124 ms; raise --max_latency_ms"):
        answer(results, 0.1)
    assert answer(results, 0.124).best.number == 0


def test_no_answer_before_finalists_are_retrained() -> None:
    with pytest.raises(UserError, match="fffexp study resume tiny"):
        answer(results_of([trial(0, {"layer": "FF"}, [0.9, 0.1])]))


def test_a_budget_where_nothing_was_timed() -> None:
    results = results_of([trial(0, {"layer": "FF"}, [0.9, 0.1], [0.9, 0.91])])
    assert answer(results).best is results.trials[0]
    with pytest.raises(UserError, match="leave --max_latency_ms out"):
        answer(results, 0.5)

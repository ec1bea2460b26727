import base64
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fffexp.errors import UserError
from fffexp.report import figures
from fffexp.report.page import write
from fffexp.report.tables import table
from fffexp.report.text import label, show, summary, to_best, value
from fffexp.report.text import trials as trials_table
from fffexp.study.results import LATENCY, REFERENCE, Results, Trial

PNG = b"\x89PNG\r\n\x1a\n"


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
    for i, of_seed in enumerate(val or []):
        run = {"seed": 5 + i, "val/accuracy": of_seed, "test/accuracy": (test or val or [])[i]}
        made.evaluation.append(run | ({LATENCY: latency[i], REFERENCE: 1.0} if latency else {}))
    return made


def results_of(trials: list[Trial], **changes: Any) -> Results:
    of_finalists = [t.number for t in trials if t.evaluation]
    settings: dict[str, Any] = {
        "monitor": "val/accuracy",
        "mode": "max",
        "unit": True,
        "directions": ["maximize", "minimize"],
    }
    settings |= {"metrics": ["val/accuracy", LATENCY], "pareto": of_finalists, "finalists": of_finalists}
    results = Results("tiny", trials=trials, **settings | changes)
    results.update()
    return results


@pytest.fixture
def tiny() -> Results:
    """FF at 0.2 ms, FFF at 0.3 ms and better, a layer from outside at 0.5 ms and best on validation, in no order."""
    moe = {"layer": "own.MoE", "num_experts": 16, "expert_width": 8, "lr": 0.0123}
    fff = {"layer": "FFF", "depth": 4, "leaf_width": 8, "hardening": 0.125, "lr": 0.01}
    failed = trial(2, {"layer": "FF", "width": 32, "lr": 0.1}, None)
    failed.error, failed.attempts = "the loss is nan", 3
    return results_of(
        [
            trial(0, {"layer": "FF", "width": 64, "lr": 0.1}, [0.91, 0.2], [0.9, 0.91, 0.92], [0.9] * 3, [0.2] * 3),
            trial(1, moe, [0.97, 0.5], [0.97, 0.96, 0.98], [0.95, 0.96, 0.94], [0.5, 0.7, 0.4]),
            failed,
            trial(3, fff, [0.96, 0.3], [0.96, 0.95, 0.955], [0.92, 0.93, 0.94], [0.3] * 3),
        ]
    )


# tables


def test_a_table_has_the_cells_under_their_names() -> None:
    lines = table([{"name": "a [b]", "x": 1.25, "none": None}, {"name": "c", "x": None, "none": None}], {"x": ".1f"})
    assert [line.split() for line in lines.splitlines()] == [["name", "x"], ["a", "[b]", "1.2"], ["c"]]
    assert table([]) == ""


def test_a_wide_table_is_wrapped_where_it_may_be() -> None:
    rows = [{"number": "1.5 [1.25, 1.75]", "words": "many words " * 20}]
    lines = table(rows, width=60, wrap=("words",)).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("1.5 [1.25, 1.75]" in line for line in lines) == 1
    assert " ".join(" ".join(lines).split()).count("many words") >= 15
    assert len(table(rows).splitlines()) == 2, "without a width nothing is"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((0.9721, (0.968, 0.9762), True), "97.21% [96.80, 97.62]"),
        ((0.9721, None, True), "97.21%"),
        ((0.01234567, (0.01, 0.0146), False), "0.01235 [0.01, 0.0146]"),
        ((None, None, True), "-"),
        ((math.nan, None, True), "-"),
    ],
)
def test_values(args: tuple[Any, ...], text: str) -> None:
    assert value(*args) == text


def test_label(tiny: Results) -> None:
    assert [label(t) for t in tiny.trials] == ["w64", "ne16 ew8", "w32", "d4 lw8"]
    assert label(trial(7, {"layer": "FF", "lr": 0.1, "flag": True}, None)) == "#7"


# finalists


def test_finalists_fastest_first(tiny: Results) -> None:
    text = summary(tiny)
    assert max(map(len, text.splitlines())) <= 120
    at = [text.index(name) for name in (" FF ", " FFF ", "own.MoE")]
    assert at == sorted(at)
    for part in ("0.200 ms", "91.00% [", "95.00% [", "width=64", "leaf_width=8", "best"):
        assert part in text
    flat = " ".join(text.split())
    assert "95% t interval on the logit scale of the mean over 3 fresh seeds" in flat
    assert "test set was read once" in flat
    assert "machines" not in flat
    tiny.machines = 2
    assert "2 machines" in " ".join(summary(tiny).split())


def test_differences_of_finalists_are_adjusted_together(tiny: Results) -> None:
    best, ff, fff = ([run["val/accuracy"] for run in tiny.trial(n).evaluation] for n in (1, 0, 3))
    ps = stats.false_discovery_control([stats.ttest_rel(other, best).pvalue for other in (ff, fff)])
    differences = to_best(tiny, tiny.finalist_trials())
    assert list(differences) == [0, 3, 1]
    assert differences[1] == "best"
    for number, p in zip((0, 3), ps, strict=True):
        assert f"p {p:.2g}" in differences[number]


def test_finalists_of_one_seed_and_of_none() -> None:
    one = summary(results_of([trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1], [0.9], latency=[0.1])]))
    assert "90.00% " in one
    assert "1 fresh seed," in one
    waiting = results_of([trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1])])
    assert "fresh seed" not in summary(waiting)
    waiting.finalists = [0]
    assert "No finalist has been trained" in summary(waiting)


def test_listed_points() -> None:
    made = trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1], [0.9, 0.8])
    made.runs, made.evaluation = made.evaluation, []
    text = summary(results_of([made]))
    assert "85.00% [" in text
    assert "width=8" in text


# the answer


def test_show_without_a_budget(tiny: Results) -> None:
    text = show(tiny)
    flat = " ".join(text.split())
    assert "own.MoE (trial 1): num_experts=16 expert_width=8 lr=0.0123" in flat
    assert "test accuracy: 95.00% [" in flat
    assert "latency: 0.500 ms" in flat
    assert "best FF with any latency: FF (trial 0)" in flat
    # differences 5, 6, 4 points: 5 ± 4.302653 * 1 / sqrt(3)
    assert (
        "test accuracy, own.MoE minus FF, paired over 3 seeds: +5.00 [+2.52, +7.48], p 0.013: own.MoE is better" in flat
    )
    assert "not significantly worse: FFF (trial 3)" in flat


def test_show_within_a_budget(tiny: Results) -> None:
    flat = " ".join(show(tiny, 0.3).split())
    assert "best finalist within 0.3 ms" in flat
    assert "own.MoE" not in flat
    assert "FFF minus FF, paired over 3 seeds: +3.00 [+0.52, +5.48], p 0.035: FFF is better" in flat


def test_show_when_the_best_is_of_the_first_layer(tiny: Results) -> None:
    assert "No other layer is among the finalists within 0.25 ms." in show(tiny, 0.25)
    tiny.trial(0).evaluation = [run | {"val/accuracy": 0.99} for run in tiny.trial(0).evaluation]
    tiny.update()
    flat = " ".join(show(tiny).split())
    assert "best other layer with any latency: own.MoE (trial 1)" in flat
    assert "FF minus own.MoE, paired over 3 seeds: -5.00 [-7.48, -2.52], p 0.013: FF is worse" in flat


@pytest.mark.parametrize(
    ("test", "text"),
    [
        ([0.89, 0.91, 0.92], ", not significant"),  # the interval spans 0
        ([0.95, 0.95, 0.95], "+5.00, not significant"),  # the same with each seed: no spread was seen
    ],
)
def test_show_when_the_difference_is_not_significant(test: list[float], text: str, tiny: Results) -> None:
    for run, of_seed in zip(tiny.trial(1).evaluation, test, strict=True):
        run["test/accuracy"] = of_seed
    tiny.update()
    assert text in " ".join(show(tiny).split())
    assert "is better" not in show(tiny)


def test_show_with_seeds_apart(tiny: Results) -> None:
    tiny.trial(0).evaluation = [run | {"seed": run["seed"] + 50} for run in tiny.trial(0).evaluation]
    tiny.update()
    assert "share no seed: no difference can be given" in show(tiny)


def test_show_when_no_baseline_fits(tiny: Results) -> None:
    tiny.trial(0).evaluation = [run | {LATENCY: 0.9} for run in tiny.trial(0).evaluation]
    tiny.update()
    text = show(tiny, 0.6)
    assert "own.MoE (trial 1)" in text
    assert "No FF is among the finalists within 0.6 ms." in text
    assert "minus" not in text


def test_a_metric_to_minimise_is_not_in_percent(tiny: Results, tmp_path: Path) -> None:
    for t in tiny.trials:
        t.evaluation = [
            {
                "seed": r["seed"],
                "val/mse": 1 - r["val/accuracy"],
                "test/mse": 1 - r["test/accuracy"],
                LATENCY: r[LATENCY],
                REFERENCE: 1.0,
            }
            for r in t.evaluation
        ]
        t.values = t.values and [1 - t.values[0], t.values[1]]
    results = results_of(
        tiny.trials,
        monitor="val/mse",
        mode="min",
        unit=False,
        directions=["minimize"] * 2,
        metrics=["val/mse", LATENCY],
    )
    flat = " ".join(show(results).split())
    assert "own.MoE (trial 1)" in flat
    assert "val mse: 0.03 [" in flat
    assert "-0.05 [-0.07, -0.03], p 0.013: own.MoE is better" in flat
    assert "%" not in flat.replace("95% t", "")
    assert trials_table(results).splitlines()[1].split()[0] == "1", "the least is the best"
    write(results, tmp_path)
    axes = figures.history(results).axes[0]
    assert axes.get_ylabel() == "val mse (lower is better)"
    assert "own.MoE: best 0.03" in {text.get_text() for text in figures.history(results).legends[0].get_texts()}


# all trials


def accuracies_of(by_number: dict[int, list[float]], layers: dict[int, dict[str, Any]]) -> Results:
    made = [
        Trial(n, "COMPLETE", layers[n], runs=[{"seed": 5 + i, "val/accuracy": v} for i, v in enumerate(values)])
        for n, values in by_number.items()
    ]
    return results_of(made, metrics=["val/accuracy"], directions=["maximize"], seeds=[5, 6, 7])


def rows_of(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if line[:5].strip().isdigit()}


def test_differences_of_trials_are_tested_all_together() -> None:
    accuracies = {0: [0.90, 0.91, 0.92], 1: [0.89, 0.90, 0.905], 2: [0.88, 0.90, 0.85], 3: [0.80, 0.81, 0.82]}
    layers = {n: {"layer": "FFF" if n == 3 else "FF", "width": n} for n in accuracies}
    rows = rows_of(trials_table(accuracies_of(accuracies, layers)))
    assert list(rows) == ["0", "1", "2", "3"]
    ps = [stats.ttest_rel(accuracies[n], accuracies[0]).pvalue for n in (1, 2)]
    for n, p in zip("12", stats.false_discovery_control(ps), strict=True):
        assert f"p {p:.2g}" in rows[n]
    assert "-1.17 [" in rows["1"]
    assert "[" not in rows["0"], "the best of its layer"
    assert "[" not in rows["3"]


def test_differences_to_a_baseline() -> None:
    accuracies = {0: [0.80, 0.81, 0.82], 1: [0.89, 0.90, 0.905], 2: [0.88, 0.90, 0.85], 3: [math.nan] * 3}
    layers = {n: {"layer": "FF" if n < 2 else "FFF", "lr": 0.1, "width": n} for n in accuracies}
    results = accuracies_of(accuracies, layers)
    text = trials_table(results, baseline=0)
    rows = rows_of(text)
    ps = stats.false_discovery_control([stats.ttest_rel(accuracies[n], accuracies[0]).pvalue for n in (1, 2)])
    assert list(rows) == ["1", "2", "0"]
    for n, p in zip("12", ps, strict=True):
        assert f"p {p:.2g}" in rows[n]
    # of the same layer what differs, of another all
    own = {n: [word for word in row.split() if "=" in word] for n, row in rows.items()}
    assert own == {"1": ["width=1"], "2": ["lr=0.1", "width=2"], "0": []}
    assert "trial 0: lr=0.1 width=0" in text
    assert "by chance" not in text
    assert "every FF: lr=0.1" in trials_table(results)
    for number in (3, 7):  # not finite, and none
        with pytest.raises(UserError, match=rf"--baseline {number}: .*; there are 0, 1, 2$"):
            trials_table(results, baseline=number)


def test_trials_that_failed_are_listed_with_their_reason(tiny: Results) -> None:
    assert "trial 2 FF width=32 lr=0.1: the loss is nan, started 3 times" in trials_table(tiny)


# the page


class Page(HTMLParser):
    """Text, tags and image sources of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.links += [link for name, link in attrs if name in ("src", "href") and link]

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + "\n"


def test_write(tiny: Results, tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "tiny"
    paths = write(tiny, folder)
    assert [path.name for path in paths] == ["summary.json", "pareto.png", "history.png", "report.html"]
    assert sorted(folder.iterdir()) == sorted(paths)  # no temporary file is left
    assert Results.load(paths[0]) == tiny
    images = [path.read_bytes() for path in paths[1:3]]
    assert all(image.startswith(PNG) and len(image) > 10_000 for image in images)

    page = Page(paths[3].read_text())
    assert [base64.b64decode(source.partition("base64,")[2]) for source in page.images] == images
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags
    for found in tiny.finalist_trials():
        assert f"{found.layer}\n" in page.text
        assert f"lr={found.params['lr']:.3g}" in page.text
    for part in ("95.00% [", "own.MoE is better", "the loss is nan\n", "make ui"):
        assert part in page.text


def test_names_are_escaped(tiny: Results, tmp_path: Path) -> None:
    tiny.study = "<script>alert('$1')</script>"
    tiny.trial(1).params["lr"] = "<b>"
    html = write(tiny, tmp_path)[3].read_text()
    page = Page(html)
    assert "<script" not in html
    assert not {"script", "b"} & set(page.tags)
    assert "<script>alert('$1')</script>" in page.text


@pytest.mark.parametrize("measured", [True, False])
def test_a_single_objective(tiny: Results, tmp_path: Path, measured: bool) -> None:
    for t in tiny.trials:
        t.values = t.values and t.values[:1]
    tiny.metrics, tiny.directions, tiny.pareto = ["val/accuracy"], ["maximize"], [1]
    if not measured:
        tiny.finalists = []
    paths = write(tiny, tmp_path)
    assert all(path.stat().st_size > 1000 for path in paths)
    texts = [text.get_text() for text in figures.pareto(tiny).axes[0].texts]
    assert ("no trial has both a val accuracy and a latency yet" in texts) is not measured
    assert ("d4 lw8" in texts) is measured


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, {"layer": "FF", "width": 8}, None)],
        [trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1])],
        [trial(0, {"layer": "Other"}, [1.0, 0.1], [1.0, 1.0], latency=[0.1, 0.1])],
        [trial(0, {"layer": "Other"}, [0.0, 0.1], [0.0, 0.0], latency=[0.1, 0.1])],
    ],
    ids=["empty", "failed", "no finalist", "perfect", "nothing right"],
)
def test_little_to_show(trials: list[Trial], tmp_path: Path) -> None:
    assert all(path.stat().st_size > 0 for path in write(results_of(trials), tmp_path))


def test_figures_name_every_layer_and_finalist(tiny: Results) -> None:
    figure = figures.pareto(tiny)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"w64", "d4 lw8", "ne16 ew8"} <= texts
    names = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert all(layer in names.split() for layer in ("FF", "FFF", "own.MoE"))
    history = figures.history(tiny)
    assert "FFF: best 96.00%" in " ".join(text.get_text() for text in history.legends[0].get_texts())
    assert "failed or pruned" in " ".join(text.get_text() for text in history.axes[0].texts)


def test_a_trial_that_learned_nothing_does_not_squeeze_the_others(tiny: Results) -> None:
    tiny.trials += [trial(9 + i, {"layer": "FFF", "depth": 1}, [0.9 + i / 100, 0.1]) for i in range(6)]
    tiny.trials.append(trial(20, {"layer": "FFF", "depth": 1}, [0.1, 0.1]))
    for figure in (figures.pareto(tiny), figures.history(tiny)):
        assert figure.axes[0].get_ylim()[0] > 80
        assert "10%\n↓" in {text.get_text() for text in figure.axes[0].texts}

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from scipy import stats

from fffexp.errors import UserError
from fffexp.report import figures
from fffexp.report.listing import trials
from fffexp.report.page import write
from fffexp.report.text import label, show, table
from fffexp.study.summary import (
    LATENCY,
    Summary,
    Trial,
    answer,
    fill_statistics,
    finalist_trials,
    latency_ms,
    pareto_front,
)

PNG = b"\x89PNG\r\n\x1a\n"
T_2 = 4.302653  # 97.5% quantile of Student's t, 2 degrees of freedom


def trial(
    number: int,
    params: dict[str, Any],
    values: list[float] | None,
    val: list[float] | None = None,
    test: list[float] | None = None,
    latency: list[float] | None = None,
) -> Trial:
    """A trial, and a finalist where there are values of fresh seeds."""
    return {
        "number": number,
        "state": "COMPLETE" if values else "FAIL",
        "params": params,
        "values": values,
        "run_id": f"run{number}",
        "seeds": list(range(5, 5 + len(val or []))),
        "mean": None,
        "ci95": None,
        "sizes": {
            "training_width": 128,
            "training_size": 143,
            "inference_width": 8,
            "inference_size": 12,
            "parameters": 12345,
            "flops_per_sample": 999,
        },
        "final": {"val/accuracy": val, "test/accuracy": test or val, "latency_ms": latency or []} if val else None,
        "test_mean": None,
        "test_ci95": None,
        "ties": [],
    }


def summary_of(trials: list[Trial], study: str = "tiny", single: bool = False) -> Summary:
    result: Summary = {
        "study": study,
        "directions": ["maximize"] if single else ["maximize", "minimize"],
        "metrics": ["val/accuracy"] if single else ["val/accuracy", LATENCY],
        "trials": trials,
        "pareto": [t["number"] for t in trials if t["final"]],
        "finalists": [t["number"] for t in trials if t["final"]],
        "best": None,
        "machines": 1,
        "wall_s": 12.5,
    }
    fill_statistics(result)
    return result


@pytest.fixture
def tiny() -> Summary:
    """FF at 0.2 ms, FFF at 0.3 ms and better, MoE at 0.5 ms and best on validation, in no order."""
    moe = {"layer": "NoisyTopKMoE", "num_experts": 16, "expert_width": 8, "k": 2, "lr": 0.0123}
    fff = {"layer": "FFF", "depth": 4, "leaf_width": 8, "hardening": 0.125, "inverse_temperature": 31.4, "lr": 0.01}
    return summary_of(
        [
            trial(0, moe, [0.97, 0.5], [0.97, 0.96, 0.98], [0.95, 0.96, 0.94], [0.5, 0.7, 0.4]),
            trial(1, {"layer": "FF", "width": 64, "lr": 0.1}, [0.91, 0.2], [0.9, 0.91, 0.92], [0.9] * 3, [0.2] * 3),
            trial(2, {"layer": "FF", "width": 32, "lr": 0.1}, None),
            trial(3, fff, [0.96, 0.3], [0.96, 0.95, 0.955], [0.92, 0.93, 0.94], [0.3] * 3),
        ]
    )


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
    assert pareto_front(values, ["maximize", "minimize"]) == expected


def test_pareto_front_of_one_objective_is_the_best() -> None:
    assert pareto_front([[0.5], [0.9], [0.7], [0.9]], ["maximize"]) == [1, 3]
    assert pareto_front([[0.5], [0.9]], ["minimize"]) == [0]


def test_statistics_and_ties(tiny: Summary) -> None:
    moe, ff, failed, _ = tiny["trials"]
    half = T_2 * 0.01 / math.sqrt(3)  # 0.0248
    assert moe["mean"] == pytest.approx(0.97)
    assert moe["ci95"] == pytest.approx([0.97 - half, 0.97 + half], rel=1e-6)
    assert (moe["test_mean"], ff["test_ci95"]) == (pytest.approx(0.95), pytest.approx([0.9, 0.9]))
    assert (failed["mean"], failed["ci95"], failed["test_mean"], failed["test_ci95"]) == (None,) * 4
    # FF [0.885, 0.935], FFF 0.955 ± 0.0124 = [0.943, 0.967], MoE [0.945, 0.995]
    assert [t["ties"] for t in tiny["trials"]] == [[3], [], [], [0]]


def test_differences_of_trials_are_tested_all_together() -> None:
    accuracies = {0: [0.90, 0.91, 0.92], 1: [0.89, 0.90, 0.905], 2: [0.88, 0.90, 0.85], 3: [0.80, 0.81, 0.82]}
    layers = {0: "FF", 1: "FF", 2: "FF", 3: "FFF"}
    made = [
        {"number": n, "params": {"layer": layers[n], "width": n}, "values": [sum(a) / 3], "val_accuracies": a}
        for n, a in accuracies.items()
    ]
    made.append(made[2] | {"number": 4, "values": [0.5], "val_accuracies": [0.5, None, 0.5]})  # not finite, by JSON
    told = trials(cast(Summary, {"seeds": [5, 6, 7], "trials": made})).splitlines()  # all that it reads
    ps = [stats.ttest_rel(accuracies[n], accuracies[0]).pvalue for n in (1, 2)]
    adjusted = [f"{p:.1e}" for p in stats.false_discovery_control(ps)]
    assert [line.split()[-1] for line in told[2:4]] == adjusted != [f"{p:.1e}" for p in ps]
    assert "-1.17 [" in told[2]
    compared = {line.split()[0]: len(line.split()) > 4 for line in told[1:6]}
    assert compared == {"0": False, "1": True, "2": True, "3": False, "4": False}, "the best, and what is not finite"


def test_differences_to_a_trial_of_ones_choice() -> None:
    accuracies = {0: [0.80, 0.81, 0.82], 1: [0.89, 0.90, 0.905], 2: [0.88, 0.90, 0.85], 3: [0.1, None, 0.1]}
    means = [0.81, 0.9, 0.88, 0.1]
    made = [
        {
            "number": n,
            "params": {"layer": "FF" if n < 2 else "FFF", "lr": 0.1, "width": n},
            "values": [means[n]],
            "val_accuracies": a,
        }
        for n, a in accuracies.items()
    ]
    summary = cast(Summary, {"seeds": [5, 6, 7], "trials": made})
    told = trials(summary, against=0).splitlines()
    ps = stats.false_discovery_control([stats.ttest_rel(accuracies[n], accuracies[0]).pvalue for n in (1, 2)])
    assert [line.split()[0] for line in told[1:5]] == ["1", "2", "0", "3"]
    assert [line.split()[-1] for line in told[1:5]] == [*(f"{p:.1e}" for p in ps), "81.00", "10.00"]
    assert "to trial 0" in told[0]
    # of the same layer what differs, of another all
    assert [[word for word in line.split() if "=" in word] for line in told[1:6]] == [
        ["width=1"],
        ["lr=0.1", "width=2"],
        [],
        ["lr=0.1", "width=3"],
        ["lr=0.1", "width=0"],
    ]
    assert told[5].startswith("trial 0: ")
    assert "by chance" not in "\n".join(told)
    assert [line for line in trials(summary).splitlines() if "every" in line] == [
        "every FF: lr=0.1",
        "every FFF: lr=0.1",
    ]
    for number in (3, 7):  # not finite by each seed, and none
        with pytest.raises(UserError, match=rf"--against {number}: .*; there are 0, 1, 2$"):
            trials(summary, against=number)


def test_without_intervals_nothing_is_tied() -> None:
    same = summary_of([trial(i, {"layer": "FF", "width": 8}, [0.9, 0.1], [0.9], latency=[0.1]) for i in range(2)])
    assert [(t["mean"], t["ci95"], t["ties"]) for t in same["trials"]] == [(0.9, None, [])] * 2


def test_finalists_are_sorted_by_median_latency(tiny: Summary) -> None:
    assert [(t["number"], latency_ms(t)) for t in finalist_trials(tiny)] == [(1, 0.2), (3, 0.3), (0, 0.5)]


def test_label(tiny: Summary) -> None:
    assert [label(t) for t in tiny["trials"]] == ["e16 ew8 k2", "w64", "w32", "d4 l8"]
    assert label(trial(7, {"layer": "FF", "lr": 0.1}, None)) == "#7"


def test_latencies_of_several_machines_are_told(tiny: Summary) -> None:
    assert "machines" not in table(tiny)
    assert "2 machines" in " ".join(table(tiny | {"machines": 2}).split())


def test_table(tiny: Summary) -> None:
    lines = table(tiny).splitlines()
    assert max(map(len, lines)) <= 120
    body = [re.split(r" {2,}", line.strip()) for line in lines[3:6]]
    sizes = ["999", "12", "12.3k"]
    assert body == [
        ["1*", "FF", "w64 lr0.1", "91.00 ± 2.48", "90.00 ± 0.00", "0.200", *sizes, "none"],
        # ± of FFF: 4.302653 * 0.5 / sqrt(3) = 1.24
        ["3*", "FFF", "d4 l8 h0.12 cs31 lr0.01", "95.50 ± 1.24", "93.00 ± 2.48", "0.300", *sizes, "0"],
        ["0*", "NoisyTopKMoE", "e16 ew8 k2 lr0.012", "97.00 ± 2.48", "95.00 ± 2.48", "0.500", *sizes, "3"],
    ]
    text = " ".join(lines)
    assert "95% t interval of the mean over 3 fresh seeds" in text
    assert "test set was read once" in text
    assert "l leaf_width" in text


def test_table_fits_the_terminal_whatever_the_hyperparameters() -> None:
    params = {"layer": "FFF", "depth": 3, "dropout": 0.25, "long_name_of_it": 0.123, "another_long_name": "something"}
    trials = [
        trial(i, {**params, "decay": 0.5, "dims": "a, b"}, [0.9, 0.1], [0.9, 0.8], latency=[1, 1]) for i in range(9)
    ]
    text = table(summary_of(trials))
    assert max(map(len, text.splitlines())) <= 120
    # d is depth's, so these are written out
    assert "dropout=0.25" in text
    assert "dims=a, b" in text.replace("\n", " ")
    assert " all" in text


def test_table_of_one_seed_and_of_none() -> None:
    one = table(summary_of([trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1], [0.9], latency=[0.1])]))
    assert "90.00 ± -" in one
    assert "1 fresh seed," in one
    waiting = summary_of([trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1])])
    assert "no finalists" in table(waiting)
    waiting["finalists"] = [0]
    assert "No finalist has been trained" in table(waiting)


def test_show_without_a_budget(tiny: Summary) -> None:
    text = show(tiny)
    assert "NoisyTopKMoE (trial 0)" in text
    assert "num_experts=16 expert_width=8 k=2 lr=0.0123" in text
    # 95 ± 2.48
    assert "95.00% [92.52, 97.48]" in text
    assert "0.500 ms" in text
    assert "best FF with any latency: FF (trial 1)" in text
    # differences 5, 6, 4 points: 5 ± 4.302653 * 1 / sqrt(3)
    assert "paired over 3 seeds" in text
    assert "+5.00 points [+2.52, +7.48]: NoisyTopKMoE is better than FF" in text
    assert "no difference shown" not in text


def test_show_within_a_budget(tiny: Summary) -> None:
    text = show(tiny, 0.3)  # as much as FFF takes
    assert "best finalist within 0.3 ms" in text
    assert "FFF (trial 3)" in text
    assert "NoisyTopKMoE" not in text
    # differences 2, 3, 4 points
    assert "+3.00 points [+0.52, +5.48]: FFF is better than FF" in text


def test_show_when_the_best_is_ff(tiny: Summary) -> None:
    assert "No other layer among the finalists fits 0.25 ms." in show(tiny, 0.25)
    for t in tiny["trials"]:
        if t["params"]["layer"] == "FF" and t["final"]:
            t["final"]["val/accuracy"] = [0.99] * 3
    fill_statistics(tiny)
    text = show(tiny)
    assert "FF (trial 1)" in text
    assert "best other layer with any latency: NoisyTopKMoE (trial 0)" in text
    assert "-5.00 points [-7.48, -2.52]: FF is worse than NoisyTopKMoE" in text


def test_show_when_the_interval_spans_zero(tiny: Summary) -> None:
    final = tiny["trials"][0]["final"]
    assert final
    final["test/accuracy"] = [0.89, 0.91, 0.92]  # differences -1, 1, 2 points
    fill_statistics(tiny)
    assert "no difference shown (the interval spans 0)" in show(tiny)
    final["test/accuracy"] = [0.9] * 3
    fill_statistics(tiny)
    assert "+0.00 points [+0.00, +0.00]: no difference shown" in show(tiny)


def test_show_with_one_seed() -> None:
    one = summary_of(
        [
            trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1], [0.9], latency=[0.1]),
            trial(1, {"layer": "FFF", "depth": 1}, [0.95, 0.1], [0.95], latency=[0.1]),
        ]
    )
    assert "+5.00 points [-]: no difference shown" in show(one)
    assert "95.00% [-]" in show(one)


def test_show_with_seeds_apart(tiny: Summary) -> None:
    tiny["trials"][1]["seeds"] = [50, 60, 70]
    assert "share no seed: no difference shown" in show(tiny)


def test_show_when_nothing_fits(tiny: Summary) -> None:
    with pytest.raises(UserError, match=r"fits 0\.1 ms: its fastest finalist takes 0\.2 ms; raise --max_latency_ms"):
        show(tiny, 0.1)


def test_the_latency_named_when_nothing_fits_is_enough(tiny: Summary) -> None:
    final = tiny["trials"][1]["final"]
    assert final
    final["latency_ms"] = [0.123412] * 3
    with pytest.raises(UserError) as error:
        show(tiny, 0.1)
    found = re.search(r"takes ([\d.]+) ms", str(error.value))
    assert found
    assert found[1] == "0.124"
    assert answer(tiny, float(found[1])).best["number"] == 1


def test_show_when_no_ff_fits(tiny: Summary) -> None:
    final = tiny["trials"][1]["final"]
    assert final
    final["latency_ms"] = [0.9] * 3
    text = show(tiny, 0.6)
    assert "NoisyTopKMoE (trial 0)" in text
    assert "No FF among the finalists fits 0.6 ms." in text
    assert "points" not in text


def test_show_before_finalists_are_retrained() -> None:
    waiting = summary_of([trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1])])
    with pytest.raises(UserError, match="fffexp study resume tiny"):
        show(waiting)


def test_equal_accuracies_go_to_the_faster() -> None:
    layers = [("FF", 0.3), ("FFF", 0.2), ("NoisyTopKMoE", 0.4)]
    trials = [
        trial(i, {"layer": layer}, [0.9, ms], [0.9, 0.8], latency=[ms, ms]) for i, (layer, ms) in enumerate(layers)
    ]
    assert answer(summary_of(trials)).best["number"] == 1


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
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + "\n"


def test_write(tiny: Summary, tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "tiny"
    paths = write(tiny, folder)
    assert [path.name for path in paths] == ["summary.json", "pareto.png", "history.png", "report.html"]
    assert sorted(folder.iterdir()) == sorted(paths)  # no temporary file is left
    assert json.loads(paths[0].read_text()) == tiny
    images = [path.read_bytes() for path in paths[1:3]]
    assert all(image.startswith(PNG) and len(image) > 10_000 for image in images)

    page = Page(paths[3].read_text())
    assert [base64.b64decode(source.partition("base64,")[2]) for source in page.images] == images
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags
    for found in finalist_trials(tiny):
        assert f"{found['params']['layer']}\n" in page.text
        assert f"lr={found['params']['lr']:.3g}" in page.text
    assert "95.00% [92.52, 97.48]" in page.text
    assert "NoisyTopKMoE is better than FF" in page.text
    assert "fail\n" in page.text
    assert "make ui" in page.text


def test_write_again_replaces(tiny: Summary, tmp_path: Path) -> None:
    write(tiny, tmp_path)
    tiny["wall_s"] = 99.0
    write(tiny, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["wall_s"] == 99
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_cannot_be_replaced_leaves_no_other(tiny: Summary, tmp_path: Path) -> None:
    (tmp_path / "summary.json" / "occupied").mkdir(parents=True)
    with pytest.raises(OSError, match=r"summary\.json"):
        write(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_what_is_not_finite_is_null(tiny: Summary, tmp_path: Path) -> None:
    fff, moe = tiny["trials"][3], tiny["trials"][0]
    fff["params"]["lr"], fff["values"] = math.inf, [math.nan, 0.3]
    assert moe["final"]
    moe["final"]["test/accuracy"][0] = math.nan
    fill_statistics(tiny)
    path = write(tiny, tmp_path)[0]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    back = json.loads(path.read_text(), parse_constant=refuse)
    assert back["trials"][3]["values"] == [None, 0.3]
    assert back["trials"][3]["params"]["lr"] is None
    # seeds 6 and 7 are left of MoE: 0.96 and 0.94 against 0.9
    assert "paired over 2 seeds" in show(back)
    assert "+5.00 points" in show(back)


def test_names_are_escaped(tiny: Summary, tmp_path: Path) -> None:
    tiny["study"] = "<script>alert('$1')</script>"
    tiny["trials"][0]["params"]["lr"] = "<b>"
    html = write(tiny, tmp_path)[3].read_text()
    page = Page(html)
    assert "<script" not in html
    assert not {"script", "b"} & set(page.tags)
    assert "<script>alert('$1')</script>" in page.text


@pytest.mark.parametrize("measured", [True, False])
def test_a_single_objective(tiny: Summary, tmp_path: Path, measured: bool) -> None:
    for t in tiny["trials"]:
        t["values"] = t["values"] and t["values"][:1]
    tiny["metrics"], tiny["directions"], tiny["pareto"] = ["val/accuracy"], ["maximize"], [0]
    if not measured:
        tiny["finalists"] = []
    paths = write(tiny, tmp_path)
    assert all(path.stat().st_size > 1000 for path in paths)
    texts = [text.get_text() for text in figures.pareto(tiny).axes[0].texts]
    assert ("no trial has both an accuracy and a latency yet" in texts) is not measured
    assert ("d4 l8" in texts) is measured


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, {"layer": "FF", "width": 8}, None)],
        [trial(0, {"layer": "FF", "width": 8}, [0.9, 0.1])],
        [trial(0, {"layer": "Other"}, [1.0, 0.1], [1.0, 1.0], latency=[0.1, 0.1])],
    ],
    ids=["empty", "failed", "no finalist", "perfect"],
)
def test_little_to_show(trials: list[Trial], tmp_path: Path) -> None:
    assert all(path.stat().st_size > 0 for path in write(summary_of(trials), tmp_path))


def test_figures_name_every_layer_and_finalist(tiny: Summary) -> None:
    figure = figures.pareto(tiny)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"w64", "d4 l8", "e16 ew8 k2"} <= texts
    names = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert all(f"{layer}: finalists" in names for layer in ("FF", "FFF", "NoisyTopKMoE"))
    history = " ".join(text.get_text() for text in figures.history(tiny).legends[0].get_texts())
    assert "FFF: best 96.0%" in history
    assert "failed or pruned" in history


def test_a_trial_that_learned_nothing_does_not_squeeze_the_others(tiny: Summary) -> None:
    tiny["trials"] += [trial(9 + i, {"layer": "FFF", "depth": 1}, [0.9 + i / 100, 0.1]) for i in range(6)]
    tiny["trials"].append(trial(20, {"layer": "FFF", "depth": 1}, [0.1, 0.1]))
    for figure in (figures.pareto(tiny), figures.history(tiny)):
        assert figure.axes[0].get_ylim()[0] > 80
        assert "10%" in {text.get_text() for text in figure.axes[0].texts}

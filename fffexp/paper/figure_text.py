"""The contenders of `fffexp reproduce text` as two figures: against their size and time, and against training."""

from collections.abc import Mapping
from pathlib import Path

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fffexp.paper import text
from fffexp.report.figures import COLOURS
from fffexp.statistics import mean_interval
from fffexp.study.results import Results, Trial

LINE = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5}
# three more colours that differ from those, and no markers that meet them again before all have been used
MORE = ("#882255", "#7F7F7F", "#000000")
MARKERS = "os^Dv"


def draw(results: Results, path: Path) -> None:
    """Bits per byte against size and time into the file, against the steps of training into one beside it."""
    per_budget = text.budgets(results)
    complete = [steps for steps, trials in per_budget.items() if {text.NONE, text.DENSE} <= trials.keys()]
    if complete:
        _costs(results, max(complete), per_budget[max(complete)]).savefig(path)
    if per_budget:
        _steps(results, per_budget).savefig(path.with_stem(f"{path.stem}_steps"))


def _costs(results: Results, steps: int, trials: Mapping[str, Trial]) -> Figure:
    speeds = text.speeds(results)
    costs: dict[str, dict[str, float | None]] = {
        "neurons of a layer for a token": {key: _size(t, "inference_size") for key, t in trials.items()},
        "kFLOPs of a layer for a token": {key: _size(t, "flops_per_sample", 1e3) for key, t in trials.items()},
        "ms of a layer, 256 tokens": {key: speeds.get(key, {}).get("layer_b256_ms") for key in trials},
        "ms of the model, one token": {key: speeds.get(key, {}).get("model_b1_ms") for key in trials},
    }
    figure = Figure(figsize=(13, 10), dpi=110, layout="constrained")
    figure.suptitle(f"Bits per byte of the test text after {steps:,} steps; lower is better", x=0.01, ha="left")
    drawn = [
        (axes, _panel(axes, results, trials, costs[cost], cost))
        for axes, cost in zip(figure.subplots(2, 2, sharey=True).flat, costs, strict=True)
    ]
    figure.draw_without_rendering()
    for axes, labels in drawn:
        if labels:
            adjust_text(labels, ax=axes, expand=(1.1, 1.4), arrowprops=LINE, ensure_inside_axes=True)
    return figure


def _size(trial: Trial, kind: str, unit: float = 1.0) -> float | None:
    return (trial.sizes or {}).get(kind, 0) / text.BLOCKS / unit or None


def _panel(
    axes: Axes, results: Results, trials: Mapping[str, Trial], costs: Mapping[str, float | None], label: str
) -> list[object]:
    labels = list[object]()
    for key, trial in trials.items():
        y, ends = mean_interval([*trial.by_seed(results.test_monitor).values()])
        if (x := costs[key]) is None:
            axes.axhline(y, color="0.6", linewidth=1, linestyle=":")
            axes.annotate(
                key,
                (0.99, y),
                (0, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="0.4",
            )
            continue
        colour, marker = _styles(results)[trial.layer]
        low, high = ends or (y, y)
        axes.errorbar(x, y, [[y - low], [high - y]], fmt=marker, color=colour, capsize=2, markersize=6)
        labels.append(axes.text(x, y, key, fontsize=8, color=colour))
    _dress(axes, label)
    axes.set_ylabel("bits per byte")
    return labels


def _steps(results: Results, per_budget: text.Budgets) -> Figure:
    figure = Figure(figsize=(13, 6), dpi=110, layout="constrained")
    figure.suptitle("Bits per byte of the test text, and what each layer recovers, over training", x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    ends: dict[Axes, list[tuple[int, float, str, str]]] = {left: [], right: []}
    for key in dict.fromkeys(key for trials in per_budget.values() for key in trials):
        of = {steps: trials[key] for steps, trials in per_budget.items() if key in trials}
        shares = {steps: text.recovered(results, per_budget[steps], key) for steps in of}
        bits = {steps: text.mean(results, trial) for steps, trial in of.items()}
        share = {steps: 100 * found[0] for steps, found in shares.items() if found}
        colour, marker = _styles(results)[next(iter(of.values())).layer]
        for axes, course in ((left, bits), (right, share)):
            if course:
                axes.plot([*course], [*course.values()], f"{marker}-", color=colour, markersize=4, linewidth=1)
                ends[axes].append((max(course), course[max(course)], key, colour))
    for axes, label in ((left, "bits per byte"), (right, f"% of what {text.DENSE} gains over {text.NONE}")):
        _dress(axes, "steps of 4,096 bytes")
        axes.set_xticks([*per_budget], [f"{steps:,}" for steps in per_budget])
        axes.set_xlim(right=2.5 * max(per_budget))
        axes.set_ylabel(label)
        low, high = axes.get_ylim()
        before, place = 0, low
        for x, y, key, colour in sorted(ends[axes]):  # one above the other, beside the ends of their lines
            place = max(y, place + 0.026 * (high - low)) if x == before else y
            axes.text(1.08 * x, place, key, fontsize=8, va="center", color=colour)
            before = x
    return figure


def _dress(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{label}, log scale")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    layers = dict.fromkeys(trial.layer for trial in sorted(results.trials, key=lambda t: t.number))
    colours = (*COLOURS, *MORE)
    return {layer: (colours[i % len(colours)], MARKERS[i % len(MARKERS)]) for i, layer in enumerate(layers)}

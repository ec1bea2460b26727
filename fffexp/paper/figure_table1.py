"""Table 1 as a figure: test accuracy against training width."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fffexp.paper.rows import METRICS, is_dense, ordered, row, width
from fffexp.report.figures import COLOURS
from fffexp.study.results import Results, Trial


def draw(results: Results, path: Path) -> None:
    """A panel a layer, with the dense one in each: means with their intervals, and hollow the paper's best of ten."""
    trials = ordered(results)
    titles = sorted({_title(trial) for trial in trials if not is_dense(trial)}) or [""]
    # dense controls have widths that are nobody's training width
    shown = sorted({width(trial) for trial in trials if titles == [""] or not is_dense(trial)})
    dense = [trial for trial in trials if is_dense(trial) and width(trial) in shown]
    figure = Figure(figsize=(2 + 3.4 * len(titles), 4.4), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    leaf_widths = sorted({leaf for trial in trials if (leaf := trial.params.get("leaf_width"))}, reverse=True)
    for axes, title in zip(panels, titles, strict=True):
        _line(axes, results, dense, dense[0].layer if dense else "", "0.3", 0)
        for index, leaf in enumerate(leaf_widths):
            of = [trial for trial in trials if _title(trial) == title and trial.params.get("leaf_width") == leaf]
            _line(axes, results, of, f"leaves or experts of {leaf}", COLOURS[index % len(COLOURS)], index + 1)
        axes.plot([], [], "o", color="0.4", markerfacecolor="none", markersize=7, label="printed: best of ten")
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set(xticks=shown, xticklabels=map(str, shown), xlabel="training width (hidden neurons)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy in percent, hard routing")
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right center")
    counts = sorted({len(trial.runs) for trial in trials}) or [0]
    seeds = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    title = f"{results.extra['data']}, {results.extra['recipe']} recipe: mean of {seeds} seeds, 95% interval"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)


def _title(trial: Trial) -> str:
    return f"{trial.layer} {trial.params.get('reduction', '')}".strip()


def _line(axes: Axes, results: Results, trials: Sequence[Trial], name: str, colour: str, place: int) -> None:
    rows = [row(results, trial, METRICS[0]) for trial in sorted(trials, key=width)]
    if not rows:
        return
    widths = [each["training_width"] * 1.03**place for each in rows]  # beside each other
    means = [each["mean"] for each in rows]
    half = [[0.0 if e["ci95"] is None else abs(e["ci95"][side] - e["mean"]) for e in rows] for side in (0, 1)]
    axes.errorbar(widths, means, half, fmt="-o", color=colour, markersize=4, linewidth=1, capsize=2, label=name)
    printed = [(at, each["paper"]) for at, each in zip(widths, rows, strict=True) if each["paper"]]
    if printed:
        axes.plot(*zip(*printed, strict=True), "o", color=colour, markerfacecolor="none", markersize=7)

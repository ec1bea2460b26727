"""The contenders of `fffexp reproduce minilm` as a figure: what is lost against what is gained."""

import statistics
from pathlib import Path

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from fffexp.paper.encoder import SETTING
from fffexp.paper.minilm import CONTENDERS, Results, budgets_of, front, shown
from fffexp.report.figures import COLOURS


def draw(results: Results, path: Path) -> None:
    """Recall against time on one thread, a panel a batch size; large marks are the longest conversions."""
    figure = Figure(figsize=(13, 5.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(shown()), sharey=True)
    drawn = [_panel(axes, results, *point) for axes, point in zip(panels, shown(), strict=True)]
    panels[0].set_ylabel("recall@10 in percent (higher is better)")
    title = (
        "all-MiniLM-L6-v2 made faster: what is lost; faint: conversions in fewer minutes; line: the best in this time"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.draw_without_rendering()
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5}
    for axes, (labels, marks) in zip(panels, drawn, strict=True):
        if labels:
            adjust_text(labels, ax=axes, objects=marks, expand=(1.1, 1.5), arrowprops=line, ensure_inside_axes=True)
    figure.savefig(path)


def _panel(axes: Axes, results: Results, batch_size: int, threads: int) -> tuple[list[Text], list[Line2D]]:
    kinds = dict.fromkeys(name.split()[0] for name in CONTENDERS)
    colours = dict(zip(kinds, (*COLOURS, "0.3", "0.6"), strict=False))
    points, labels, marks = dict[str, tuple[float, float]](), list[Text](), list[Line2D]()
    for name in CONTENDERS:
        timed, last = results.time(name, batch_size, threads), results.last(name)
        if timed and last:
            x, colour = _ms(results, batch_size, threads) / timed["speedup"], colours[name.split()[0]]
            runs = [run for minutes in budgets_of(name, SETTING["minutes"]) if (run := results.run(name, minutes))]
            axes.plot([x] * len(runs), [100 * run["recall@10"] for run in runs], "o-", color=colour, alpha=0.3, ms=4)
            points[name] = x, 100 * last["recall@10"]
            marks += axes.plot(*points[name], "o", color=colour, ms=8)
            labels.append(axes.text(*points[name], name, fontsize=8, color=colour))
    best = [points[name] for name in front(results, batch_size, threads)]
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color="0.6", linewidth=1, zorder=0)
    axes.set_title(f"batch {batch_size}, {threads} thread{'s' * (threads > 1)}", loc="left", fontsize=10)
    axes.set_xlabel("milliseconds per sentence (further left is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return labels, marks


def _ms(results: Results, batch_size: int, threads: int) -> float:
    # the original's, over all timings: drift of the machine's speed is no difference of contenders
    point = batch_size, threads
    return statistics.median(t["original_ms"] for t in results.times if (t["batch_size"], t["threads"]) == point)

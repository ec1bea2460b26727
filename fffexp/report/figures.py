"""Figures of a study: the monitored metric against latency, and the search as it went."""

import io
import itertools
from collections.abc import Sequence
from typing import Any

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator

from fffexp.report.text import label, title, value
from fffexp.study.results import LATENCY, Results

# colours of Okabe and Ito, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def pareto(results: Results) -> Figure:
    """The monitored metric against latency: every trial faint, finalists with intervals, and their front."""
    done = [t for t in results.trials if t.state == "COMPLETE"]
    complete = [(t, results.selected_by(t, LATENCY), results.selected_by(t)) for t in done]
    scale_ms = results.reference_ms or 0.0
    trials = [(t, x * scale_ms, results.scale * y) for t, x, y in complete if x and scale_ms and y is not None]
    retrained = [(t, t.latency_ms, t.mean) for t in results.finalist_trials() if t.evaluation]
    finalists = [(t, ms, results.scale * y) for t, ms, y in retrained if ms is not None and y is not None]
    figure, axes = _figure(results, "Which layer is the best within a latency budget?")
    if not trials and not finalists:
        return _end(figure, axes, f"no trial has both a {title(results.monitor)} and a latency yet", empty=True)
    _limit(axes, results, [y for *_, y in trials], [y for *_, y in finalists])
    axes.set_xscale("log")
    labels, marks = list[Text](), list[Line2D]()
    for layer, (colour, marker) in _styles(results).items():
        own = [(t, ms, y) for t, ms, y in finalists if t.layer == layer]
        _scatter(axes, [(ms, y) for t, ms, y in trials if t.layer == layer], colour, marker, "" if own else layer)
        for t, ms, y in own:
            low, high = (results.scale * end for end in t.ci95) if t.ci95 else (y, y)
            marks += axes.plot(ms, y, marker, color=colour, markersize=8, zorder=4)
            axes.errorbar(ms, y, [[y - low], [high - y]], color=colour, capsize=3, zorder=4)
            labels.append(axes.text(ms, y, label(t), fontsize=8, color=colour))
        if own:
            marks[-1].set_label(layer)
    if finalists:
        end = 1.1 * max(ms for _, ms, _ in (*trials, *finalists))
        points = sorted((ms, y) for _, ms, y in finalists)
        _best_so_far(axes, results, points, end, color="0.35", label="best finalist up to this latency")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("latency of a batch of 256 in ms, log scale (further left is faster)")
    figure.draw_without_rendering()
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5}
    adjust_text(labels, ax=axes, objects=marks, expand=(1.1, 1.5), arrowprops=line, ensure_inside_axes=True)
    seeds = max((len(t.seeds) for t, *_ in finalists), default=0)
    large = f"large marks: finalists, 95% interval over {seeds} fresh seed{'s' * (seeds != 1)}; " * bool(finalists)
    return _end(figure, axes, f"{large}faint marks: all trials, by the search's own seeds")


def history(results: Results) -> Figure:
    """The monitored metric of each layer's trials in order, and the best so far as a line."""
    seen = {t.number: results.selected_by(t) for t in results.trials if t.state == "COMPLETE"}
    complete = {number: results.scale * y for number, y in seen.items() if y is not None}
    figure, axes = _figure(results, "Was the search long enough? Each layer's trials in order, and its best so far")
    if not complete:
        return _end(figure, axes, "no trial has been completed yet", empty=True)
    _limit(axes, results, [*complete.values()], [])
    for layer, (colour, marker) in _styles(results).items():
        ended = [t.number for t in results.trials if t.layer == layer and t.state not in ("RUNNING", "WAITING")]
        points = [(float(i), complete[n]) for i, n in enumerate(ended, 1) if n in complete]
        lost = [i for i, n in enumerate(ended, 1) if n not in complete]
        axes.plot(lost, [0.02] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform(), zorder=3)
        _scatter(axes, points, colour, marker)
        if points:
            best = max(points, key=lambda point: results.sign * point[1])[1] / results.scale
            name = f"{layer}: best {value(best, unit=results.unit)}"
            _best_so_far(axes, results, points, len(ended) + 0.4, color=colour, linewidth=2, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("how many trials of this layer so far")
    return _end(figure, axes, "lines: the best so far, which more trials may improve; x: failed or pruned")


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def _figure(results: Results, heading: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(heading, loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.text(0, 1.02, f"study {results.study}", transform=axes.transAxes, color="0.35", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return figure, axes


def _end(figure: Figure, axes: Axes, note: str, empty: bool = False) -> Figure:
    x, y, where, size = (0.5, 0.5, "center", 12) if empty else (1, 1.02, "right", 8)
    axes.text(x, y, note, transform=axes.transAxes, ha=where, fontsize=size, color="0.35")
    if empty:
        axes.set_axis_off()
    else:
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    styles = itertools.cycle(zip(COLOURS, "o^sDPX", strict=True))
    return dict(zip(dict.fromkeys(trial.layer for trial in results.trials), styles, strict=False))


def _best_so_far(
    axes: Axes, results: Results, points: Sequence[tuple[float, float]], right: float, **style: Any
) -> None:
    best = [*itertools.accumulate((y for _, y in points), max if results.sign > 0 else min)]
    axes.step([*(x for x, _ in points), right], [*best, best[-1]], where="post", zorder=2, **style)


def _limit(axes: Axes, results: Results, trials: Sequence[float], finalists: Sequence[float]) -> None:
    # a trial that learned nothing must not squeeze the others together
    sign, unit = results.sign, results.unit
    values = sorted(sign * y for y in (*trials, *finalists))
    typical, best = values[len(values) // 4], values[-1]
    worst = min([max(values[0], 2 * typical - best), *(sign * y for y in finalists)])
    margin = max(0.08 * (best - worst), 1e-3 * abs(best))
    top = min(best + 1.5 * margin, 100.5 if unit else float("inf"))
    axes.set_ylim(*sorted((sign * (worst - margin), sign * top)))
    axes.yaxis.set_major_formatter("{x:g}" + "%" * unit)
    axes.set_ylabel(f"{title(results.monitor)} ({'higher' if sign > 0 else 'lower'} is better)")


def _scatter(axes: Axes, points: Sequence[tuple[float, float]], colour: str, marker: str, name: str = "") -> None:
    low, high = axes.get_ylim()
    inside = [(x, y) for x, y in points if low <= y <= high]
    xs, ys = [x for x, _ in inside], [y for _, y in inside]
    axes.scatter(xs, ys, 26, colour, marker=marker, alpha=0.4, linewidth=0, label=name if points else "")
    for x, y in points:
        number = axes.yaxis.get_major_formatter()(float(f"{y:.3g}"))
        if not low <= y <= high:
            edge, text, side = (low, f"{number}\n↓", "bottom") if y < low else (high, f"↑\n{number}", "top")
            axes.text(x, edge, text, ha="center", va=side, fontsize=7, color=colour)

"""Figures of a study: accuracy against latency, and the search as it went."""

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from fffexp.report.text import label
from fffexp.study.summary import LATENCY, Summary, Trial, finalist_trials, latency_ms, pareto_front

# colours of Okabe and Ito, which the colour-blind can tell apart
_STYLES = {"FF": ("#0072B2", "o"), "NoisyTopKMoE": ("#009E73", "s"), "FFF": ("#D55E00", "^")}
_OTHERS = (("#CC79A7", "D"), ("#E69F00", "P"), ("#56B4E9", "X"), ("#000000", "*"))
_OPEN = ("RUNNING", "WAITING")


def pareto(summary: Summary) -> Figure:
    """Validation accuracy against latency: every trial faint, finalists with intervals, and their front."""
    axes = _axes(summary, "Which layer is the most accurate within a latency budget?")
    figure = cast(Figure, axes.figure)
    trials = _complete(summary) if LATENCY in summary["metrics"] else []
    at = summary["metrics"].index(LATENCY) if trials else 0
    found = [
        (t, ms, 100 * t["mean"]) for t in finalist_trials(summary) if t["mean"] is not None and (ms := latency_ms(t))
    ]
    if not trials and not found:
        return _empty(axes, "no trial has both an accuracy and a latency yet")
    floor = _floor([_percent(t) for t in trials], [y for _, _, y in found])
    styles = _styles(summary)
    for layer, (colour, marker) in styles.items():
        of_layer = [(t["values"][at], _percent(t)) for t in trials if t["params"]["layer"] == layer and t["values"]]
        _scatter(axes, of_layer, floor, colour, marker)
        ours = [(t, x, y) for t, x, y in found if t["params"]["layer"] == layer]
        if not ours:
            if of_layer:
                axes.plot([], [], marker, color=colour, alpha=0.3, label=f"{layer}: trials")
            continue
        axes.errorbar(
            [x for _, x, _ in ours],
            [y for _, _, y in ours],
            yerr=list(zip(*(_bars(t, y) for t, _, y in ours), strict=True)),
            fmt=marker,
            color=colour,
            markersize=8,
            markeredgecolor="white",
            capsize=3,
            linewidth=1.2,
            label=f"{layer}: finalists",
            zorder=4,
        )
    corners: list[tuple[float, float]] = []
    points = [(x, y) for _, x, y in found]
    front = sorted({points[i] for i in pareto_front(points, ["minimize", "maximize"])})
    if front:
        right = 1.1 * max(itertools.chain((x for x, _ in points), (t["values"][at] for t in trials if t["values"])))
        corners = [front[0]]
        for x, y in front[1:]:
            corners += [(x, corners[-1][1]), (x, y)]
        corners.append((right, front[-1][1]))
        xs, ys = zip(*corners, strict=True)
        axes.plot(xs, ys, color="0.35", linewidth=1.2, label="best finalist up to this latency", zorder=2)
    if trials:
        axes.plot([], [], "o", color="0.5", alpha=0.35, markersize=5, label="all trials of the search")
    axes.set_xscale("log")
    _latency_ticks(axes)
    axes.set_xlabel("latency of a batch of 256 in ms, log scale (further left is faster)")
    axes.set_ylabel("validation accuracy (higher is better)")
    _limits(axes, floor, [_percent(t) for t in trials] + [y for _, _, y in found])
    _legend(figure)
    if found:
        seeds = max(len(t["seeds"]) for t, _, _ in found)
        bars = f"bars: 95% interval over {seeds} fresh seeds" if seeds > 1 else "large marks: one fresh seed"
        _note(axes, f"{bars}; faint marks: the search's own seeds" if trials else bars)
    lines = list(itertools.pairwise(corners))
    lines += [((x, y - below), (x, y + above)) for t, x, y in found for below, above in [_bars(t, y)] if below > 0]
    if found:
        _annotate(axes, [(x, y, label(t), styles[t["params"]["layer"]][0]) for t, x, y in found], lines)
    return figure


def history(summary: Summary) -> Figure:
    """Validation accuracy of each layer's trials in order, and the best so far as a line."""
    axes = _axes(summary, "Was the search long enough? Each layer's trials in order, and its best so far")
    figure = cast(Figure, axes.figure)
    complete = _complete(summary)
    if not complete:
        return _empty(axes, "no trial has been completed yet")
    floor = _floor([_percent(t) for t in complete], [])
    numbers = {t["number"] for t in complete}
    longest, lost = 1, []
    for layer, (colour, marker) in _styles(summary).items():
        ended = [t for t in summary["trials"] if t["params"]["layer"] == layer and t["state"] not in _OPEN]
        points = [(float(i), _percent(t)) for i, t in enumerate(ended, 1) if t["number"] in numbers]
        lost += [(i, colour) for i, t in enumerate(ended, 1) if t["number"] not in numbers]
        longest = max(longest, len(ended))
        if not points:
            continue
        _scatter(axes, points, floor, colour, marker, alpha=0.5)
        best = list(itertools.accumulate((y for _, y in points), max))
        xs = [x for x, _ in points] + [float(len(ended)) + 0.4]
        name = f"{layer}: best {best[-1]:.1f}%"
        axes.step(xs, [*best, best[-1]], where="post", color=colour, linewidth=2, alpha=0.9, zorder=3)
        axes.plot([], [], marker=marker, color=colour, linewidth=2, label=name)
    _limits(axes, floor, [_percent(t) for t in complete])
    for i, colour in lost:
        axes.plot([i], [0.02], "x", color=colour, transform=axes.get_xaxis_transform(), zorder=3)
    if lost:
        axes.plot([], [], "x", color="0.4", label="failed or pruned")
    axes.set_xlim(0.4, longest + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.set_xlabel("how many trials of this layer so far")
    axes.set_ylabel("validation accuracy (higher is better)")
    _legend(figure)
    _note(axes, "marks: single trials; lines: the best so far; if one still climbs, more trials may help")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _axes(summary: Summary, title: str) -> Axes:
    figure = Figure(figsize=(9, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.text(0, 1.02, f"study {summary['study']}", transform=axes.transAxes, color="0.35", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return axes


def _empty(axes: Axes, message: str) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", fontsize=12)
    return cast(Figure, axes.figure)


def _styles(summary: Summary) -> dict[str, tuple[str, str]]:
    layers = dict.fromkeys(trial["params"]["layer"] for trial in summary["trials"])
    known = {layer: style for layer, style in _STYLES.items() if layer in layers}
    return known | dict(zip(sorted(layers.keys() - known), itertools.cycle(_OTHERS), strict=False))


def _complete(summary: Summary) -> list[Trial]:
    return [t for t in summary["trials"] if t["state"] == "COMPLETE" and t["values"] and _finite(t["values"])]


def _finite(values: Iterable[float | None]) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _percent(trial: Trial) -> float:
    assert trial["values"]
    return 100 * trial["values"][0]


def _bars(trial: Trial, mean: float) -> tuple[float, float]:
    ci = trial["ci95"]
    return (math.nan, math.nan) if ci is None else (mean - 100 * ci[0], 100 * ci[1] - mean)


def _floor(trials: Sequence[float], finalists: Sequence[float]) -> float:
    """Lower end of the axis: a trial that learned nothing must not squeeze the others together."""
    values = sorted([*trials, *finalists])
    typical = values[len(values) // 4]
    lowest = max(values[0], typical - (values[-1] - typical))
    lowest = min([lowest, *finalists])
    return lowest - max(0.08 * (values[-1] - lowest), 0.3)


def _limits(axes: Axes, floor: float, values: Sequence[float]) -> None:
    top = max(values)
    axes.set_ylim(floor, min(top + 0.08 * (top - floor) + 0.2, 100.5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))


def _scatter(
    axes: Axes, points: Sequence[tuple[float, float]], floor: float, colour: str, marker: str, alpha: float = 0.35
) -> None:
    inside = [(x, y) for x, y in points if y >= floor]
    xs, ys = [x for x, _ in inside], [y for _, y in inside]
    axes.scatter(xs, ys, s=26, c=colour, marker=marker, alpha=alpha, linewidth=0, zorder=1)
    for x, y in points:
        if y < floor:
            axes.annotate(
                f"{y:.0f}%",
                (x, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 14),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=colour,
                arrowprops={"arrowstyle": "->", "color": colour},
            )


def _latency_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.05, high * 1.05)
    subs = (1, 2, 5) if high / low > 30 else (1, 1.5, 2, 3, 4, 5, 7)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _note(axes: Axes, text: str) -> None:
    axes.text(1, 1.02, text, transform=axes.transAxes, ha="right", fontsize=8, color="0.35")


def _legend(figure: Figure) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    # layers first
    order = sorted(range(len(names)), key=lambda i: isinstance(handles[i], Line2D))
    figure.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )


def _sticks_out(box: Bbox, frame: Bbox) -> bool:
    return box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1


def _annotate(
    axes: Axes,
    points: Sequence[tuple[float, float, str, str]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Write a label at each point where it covers the least; one that could not be read is left out."""
    cast(Figure, axes.figure).canvas.draw()  # settles the layout, so that extents are known
    marks = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in axes.transData.transform([p[:2] for p in points])]
    strokes = [Bbox(axes.transData.transform(line)).padded(1) for line in lines]
    frame = axes.get_window_extent()
    labels: list[Bbox] = []
    sides = ((-1, 1), (1, -1), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
    for x, y, text, colour in sorted(points):
        note = axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=colour)
        note.set(zorder=5, va="center", path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()])
        tried: list[tuple[int, int, int, dict[str, Any], Bbox]] = []
        for far, (dx, dy) in itertools.product((1, 2), sides):
            place: dict[str, Any] = {
                "position": (6.0 * dx, 9.0 * far * dy),
                "ha": {-1: "right", 0: "center", 1: "left"}[dx],
            }
            note.set(**place)
            box = note.get_window_extent()
            unread = box.count_overlaps(labels) + box.count_overlaps(marks) + _sticks_out(box, frame)
            tried.append((unread, box.count_overlaps(strokes) + far, len(tried), place, box))
        unread, _, _, place, box = min(tried, key=lambda candidate: candidate[:3])
        if unread:
            note.remove()
            continue
        note.set(**place)
        labels.append(box)

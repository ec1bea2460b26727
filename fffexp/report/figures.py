"""Figures of a study: the monitored metric against latency, and the search as it went."""

import io
import itertools
from collections.abc import Sequence
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from fffexp.report.text import label, title, value
from fffexp.study.results import LATENCY, Results, Trial

# colours of Okabe and Ito, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "o^sDPXv"
_OPEN = ("RUNNING", "WAITING")

Point = tuple[float, float]


def pareto(results: Results) -> Figure:
    """The monitored metric against latency: every trial faint, finalists with intervals, and their front."""
    axes = _axes(results, "Which layer is the best within a latency budget?")
    figure = cast(Figure, axes.figure)
    trials = [(t, ms, y) for t, y in _complete(results) if (ms := results.selected_by(t, LATENCY)) is not None]
    finalists = [
        (t, ms, results.scale * t.mean)
        for t in results.finalist_trials()
        if t.evaluation and t.mean is not None and (ms := t.latency_ms)
    ]
    if not trials and not finalists:
        return _empty(axes, f"no trial has both a {title(results.monitor)} and a latency yet")
    limits = _Limits(results, [y for *_, y in trials], [y for *_, y in finalists])
    styles = _styles(results)
    for layer, (colour, marker) in styles.items():
        points = [(x, y) for t, x, y in trials if t.layer == layer]
        _scatter(axes, points, limits, colour, marker)
        own = [(x, y, *_bars(results, t, y)) for t, x, y in finalists if t.layer == layer]
        if not own:
            if points:
                axes.plot([], [], marker, color=colour, alpha=0.3, label=f"{layer}: trials")
            continue
        xs, ys, below, above = zip(*own, strict=True)
        bars: dict[str, Any] = {
            "markersize": 8,
            "markeredgecolor": "white",
            "capsize": 3,
            "linewidth": 1.2,
            "zorder": 4,
        }
        axes.errorbar(xs, ys, (below, above), fmt=marker, color=colour, label=f"{layer}: finalists", **bars)
    corners = _front([(x, y) for _, x, y in finalists], max(x for _, x, _ in [*trials, *finalists]), results.sign)
    if corners:
        label_of_front = "best finalist up to this latency"
        axes.plot(*zip(*corners, strict=True), color="0.35", linewidth=1.2, label=label_of_front, zorder=2)
    if trials:
        axes.plot([], [], "o", color="0.5", alpha=0.35, markersize=5, label="all trials of the search")
    axes.set_xscale("log")
    _latency_ticks(axes)
    axes.set_xlabel("latency of a batch of 256 in ms, log scale (further left is faster)")
    limits.apply(axes)
    _legend(figure)
    if finalists:
        seeds = max(len(t.seeds) for t, *_ in finalists)
        note = f"bars: 95% interval over {seeds} fresh seeds" if seeds > 1 else "large marks: one fresh seed"
        _note(axes, f"{note}; faint marks: the search's own seeds" if trials else note)
        lines = list(itertools.pairwise(corners))
        lines += [((x, y - below), (x, y + above)) for t, x, y in finalists for below, above in [_bars(results, t, y)]]
        _annotate(axes, [(x, y, label(t), styles[t.layer][0]) for t, x, y in finalists], lines)
    return figure


def history(results: Results) -> Figure:
    """The monitored metric of each layer's trials in order, and the best so far as a line."""
    axes = _axes(results, "Was the search long enough? Each layer's trials in order, and its best so far")
    figure = cast(Figure, axes.figure)
    complete = {t.number: y for t, y in _complete(results)}
    if not complete:
        return _empty(axes, "no trial has been completed yet")
    limits = _Limits(results, list(complete.values()), [])
    longest, lost = 1, []
    for layer, (colour, marker) in _styles(results).items():
        ended = [t.number for t in results.trials if t.layer == layer and t.state not in _OPEN]
        points = [(float(i), complete[n]) for i, n in enumerate(ended, 1) if n in complete]
        lost += [(i, colour) for i, n in enumerate(ended, 1) if n not in complete]
        longest = max(longest, len(ended))
        if not points:
            continue
        _scatter(axes, points, limits, colour, marker, alpha=0.5)
        best = list(itertools.accumulate((y for _, y in points), max if results.sign > 0 else min))
        xs = [x for x, _ in points] + [len(ended) + 0.4]
        axes.step(xs, [*best, best[-1]], where="post", color=colour, linewidth=2, alpha=0.9, zorder=3)
        name = f"{layer}: best {value(best[-1] / results.scale, unit=results.unit)}"
        axes.plot([], [], marker=marker, color=colour, linewidth=2, label=name)
    limits.apply(axes)
    for i, colour in lost:
        axes.plot([i], [0.02], "x", color=colour, transform=axes.get_xaxis_transform(), zorder=3)
    if lost:
        axes.plot([], [], "x", color="0.4", label="failed or pruned")
    axes.set_xlim(0.4, longest + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.set_xlabel("how many trials of this layer so far")
    _legend(figure)
    _note(axes, "marks: single trials; lines: the best so far; if one still improves, more trials may help")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _axes(results: Results, heading: str) -> Axes:
    figure = Figure(figsize=(9, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(heading, loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.text(0, 1.02, f"study {results.study}", transform=axes.transAxes, color="0.35", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return axes


def _empty(axes: Axes, message: str) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", fontsize=12)
    return cast(Figure, axes.figure)


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    """Colour and marker of each layer, in the order of the study."""
    layers = dict.fromkeys(trial.layer for trial in results.trials)
    return dict(zip(layers, itertools.cycle(zip(COLOURS, _MARKERS, strict=True)), strict=False))


def _complete(results: Results) -> list[tuple[Trial, float]]:
    """Completed trials and their monitored metric in the search, as it is printed."""
    done = [(t, results.selected_by(t)) for t in results.trials if t.state == "COMPLETE"]
    return [(t, results.scale * mean) for t, mean in done if mean is not None]


def _bars(results: Results, trial: Trial, mean: float) -> Point:
    ends = trial.ci95
    return (0.0, 0.0) if ends is None else (mean - results.scale * ends[0], results.scale * ends[1] - mean)


def _front(points: Sequence[Point], right: float, sign: int) -> list[Point]:
    """Corners of the line through the best up to each latency."""
    corners: list[Point] = []
    for x, y in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not corners or sign * y > sign * corners[-1][1]:
            corners += [*([(x, corners[-1][1])] if corners else []), (x, y)]
    return [*corners, (1.1 * right, corners[-1][1])] if corners else []


class _Limits:
    """Ends of the axis of the monitored metric: a trial that learned nothing must not squeeze the others together."""

    def __init__(self, results: Results, trials: Sequence[float], finalists: Sequence[float]) -> None:
        self.results, self.sign = results, results.sign
        values = sorted(self.sign * y for y in [*trials, *finalists])
        typical, self.best = values[len(values) // 4], values[-1]
        worst = min([max(values[0], typical - (self.best - typical)), *(self.sign * y for y in finalists)])
        self.margin = max(0.08 * (self.best - worst), 1e-3 * abs(self.best))
        self.worst = worst - self.margin

    def inside(self, y: float) -> bool:
        return self.sign * y >= self.worst

    def apply(self, axes: Axes) -> None:
        best = self.best + 1.5 * self.margin
        axes.set_ylim(*sorted((self.sign * self.worst, self.sign * (min(best, 100.5) if self.results.unit else best))))
        percent = "%" * self.results.unit
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}{percent}"))
        better = "higher" if self.sign > 0 else "lower"
        axes.set_ylabel(f"{title(self.results.monitor)} ({better} is better)")


def _scatter(
    axes: Axes, points: Sequence[Point], limits: _Limits, colour: str, marker: str, alpha: float = 0.35
) -> None:
    """Marks, and an arrow with the value of each that is beyond the limits."""
    inside = [point for point in points if limits.inside(point[1])]
    xs, ys = [x for x, _ in inside], [y for _, y in inside]
    axes.scatter(xs, ys, s=26, c=colour, marker=marker, alpha=alpha, linewidth=0, zorder=1)
    up = limits.sign > 0
    for x, y in points:
        if not limits.inside(y):
            axes.annotate(
                f"{y:.3g}{'%' * limits.results.unit}",
                (x, 0 if up else 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 14 if up else -20),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=colour,
                arrowprops={"arrowstyle": "->", "color": colour},
            )


def _latency_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.05, high * 1.05)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 30 else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _note(axes: Axes, text: str) -> None:
    axes.text(1, 1.02, text, transform=axes.transAxes, ha="right", fontsize=8, color="0.35")


def _legend(figure: Figure) -> None:
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    names = sorted(handles, key=lambda name: isinstance(handles[name], Line2D))  # layers first
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 5, "frameon": False, "fontsize": 9}
    figure.legend([handles[name] for name in names], names, **place)


def _annotate(
    axes: Axes, points: Sequence[tuple[float, float, str, str]], lines: Sequence[tuple[Point, Point]]
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
            place: dict[str, Any] = {"position": (6 * dx, 9 * far * dy), "ha": ("center", "left", "right")[dx]}
            note.set(**place)
            box = note.get_window_extent()
            outside = frame.x0 > box.x0 or box.x1 > frame.x1 or frame.y0 > box.y0 or box.y1 > frame.y1
            unread = box.count_overlaps(labels) + box.count_overlaps(marks) + outside
            tried.append((unread, box.count_overlaps(strokes) + far, len(tried), place, box))
        unread, _, _, place, box = min(tried, key=lambda candidate: candidate[:3])
        note.set(**place)
        if unread:
            note.remove()
        else:
            labels.append(box)

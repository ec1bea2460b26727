"""Table 1 as a figure: test accuracy against training width."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# colours of Okabe and Ito, which the colour-blind can tell apart
FF_COLOUR = "0.3"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A panel a layer, with FF in each: means with their intervals, and hollow the paper's best of ten."""
    rows = [row for row in found["cells"] if row["metric"] == "G_A"]
    others = sorted({(row["layer"], row["reduction"] or "") for row in rows if row["layer"] != "FF"})
    # dense controls have widths that are nobody's training width
    shown = sorted({row["training_width"] for row in rows if not others or row["layer"] != "FF"})
    dense = [row for row in rows if row["layer"] == "FF" and row["training_width"] in shown]
    figure = Figure(figsize=(2 + 3.4 * max(1, len(others)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(others)), sharey=True, squeeze=False)[0]
    leaf_widths = sorted({row["leaf_width"] for row in rows if row["leaf_width"]}, reverse=True)
    for axes, other in zip(panels, others or [("FF", "")], strict=True):
        _line(axes, dense, "FF", FF_COLOUR, 0)
        for index, leaf_width in enumerate(leaf_widths):
            of = [r for r in rows if (r["layer"], r["reduction"] or "", r["leaf_width"]) == (*other, leaf_width)]
            _line(axes, of, f"leaves or experts of {leaf_width}", COLOURS[index % len(COLOURS)], index + 1)
        axes.plot([], [], "o", color="0.4", markerfacecolor="none", markersize=7, label="printed: best of ten")
        axes.set_title(" ".join(other), fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(shown, [str(width) for width in shown])
        axes.set_xlabel("training width (hidden neurons)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy in percent, hard decisions")
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right center")
    counts = sorted({row["n"] for row in rows}) or [0]
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    told = f"{found['data']}, protocol {found['protocol']}: mean of {seeds} seeds, 95% interval"
    figure.suptitle(told, x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, colour: str, place: int) -> None:
    rows = sorted(rows, key=lambda row: row["training_width"])
    if not rows:
        return
    widths = [row["training_width"] * 1.03**place for row in rows]  # beside each other
    means = [row["mean"] for row in rows]
    half = [0 if row["ci95"] is None else row["ci95"][1] - row["mean"] for row in rows]
    axes.errorbar(widths, means, half, fmt="-o", color=colour, markersize=4, linewidth=1, capsize=2, label=name)
    printed = [(width, row["paper"]) for width, row in zip(widths, rows, strict=True) if row["paper"]]
    if printed:
        axes.plot(*zip(*printed, strict=True), "o", color=colour, markerfacecolor="none", markersize=7)

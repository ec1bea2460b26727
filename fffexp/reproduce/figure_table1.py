"""Table 1 as a figure: test accuracy against training width."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# colours of Okabe and Ito, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A line for FF and each leaf width: mean with its interval, and hollow the paper's best of ten."""
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = [row for row in found["cells"] if row["metric"] == "G_A"]
    # dense controls have widths that are nobody's training width
    shown = sorted({row["training_width"] for row in rows if row["layer"] != "FF"})
    rows = [row for row in rows if not shown or row["training_width"] in shown]
    groups = list(dict.fromkeys((row["layer"], row["leaf_width"], row["reduction"]) for row in reversed(rows)))
    groups.sort(key=lambda group: (group[0], -(group[1] or 0), group[2] or ""))
    for index, (layer, leaf_width, reduction) in enumerate(groups):
        mine = [r for r in rows if (r["layer"], r["leaf_width"], r["reduction"]) == (layer, leaf_width, reduction)]
        mine.sort(key=lambda row: row["training_width"])
        colour, shift = COLOURS[(leaf_width or 0).bit_length() % len(COLOURS)], 1.03 ** (index - len(groups) / 2)
        name = layer if leaf_width is None else f"{layer}, l = {leaf_width}" + (f" ({reduction})" if reduction else "")
        means = [row["mean"] for row in mine]
        half = [0 if row["ci95"] is None else row["ci95"][1] - row["mean"] for row in mine]
        widths = [row["training_width"] * shift for row in mine]
        style = {"FF": "-o", "FFF": "-^"}.get(layer, "-s") if reduction != "sum" else "--v"
        axes.errorbar(widths, means, half, fmt=style, color=colour, markersize=4, linewidth=1, capsize=2, label=name)
        printed = [(width, row["paper"]) for width, row in zip(widths, mine, strict=True) if row["paper"]]
        if printed:
            axes.plot(*zip(*printed, strict=True), "o", color=colour, markerfacecolor="none", markersize=7)
    axes.plot([], [], "o", color="0.4", markerfacecolor="none", markersize=7, label="printed: best of ten")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["training_width"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("training width (hidden neurons)")
    axes.set_ylabel("test accuracy in percent, hard decisions")
    seeds = len(found["seeds"])
    axes.set_title(f"{found['data']}, protocol {found['protocol']}: mean of {seeds} seeds, 95% interval", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

"""Dense layers that a sceptic would hold against an FFF: of equal parameters, inference size and inference time."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fffexp.bench.inference import interleaved
from fffexp.bench.latency import exclusive_timing
from fffexp.bench.limits import environment
from fffexp.layers import FF, FFF, FeedforwardLayer
from fffexp.reproduce import runs
from fffexp.reproduce.cells import SIZES, Cell
from fffexp.study.statistics import paired_tests

KINDS = ("width", "parameters", "inference_size", "inference_time")
BATCH_SIZE = 256
# Candidates for equal time: as fine as timings can tell apart.
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512)


def choose(found: dict[str, Any], wanted: Sequence[Cell]) -> None:
    """Widths of the controls of each FFF, in found["controls"]; those that are there stay, times and all.

    Args:
        found: the table.
        wanted: FFF cells.
    """
    have = {Cell.of(control) for control in found["controls"]}
    in_features, out_features = SIZES[found["data"]]
    for cell in wanted:
        if cell in have:
            continue
        layer = FFF(in_features, out_features, cell.depth or 0, cell.leaf_width or 1).eval()
        width, ratio = _equal_time(layer)
        found["controls"].append(
            {
                **cell.describe(),
                "width": cell.training_width,
                "parameters": max(1, round((layer.parameter_count - out_features) / (in_features + 1 + out_features))),
                "inference_size": layer.inference_size,
                "inference_time": width,
                "time_ratio": ratio,  # of that FF to the FFF
                "backend": layer.inference_backend(),
                "environment": environment([1], "cpu"),
            }
        )


def _equal_time(layer: FeedforwardLayer) -> tuple[int, float]:
    """The widest FF that is no slower, and its time over that of the layer, both medians of interleaved rounds."""
    # of mean 0, so that they spread over the leaves
    batches = list(torch.randn(32, BATCH_SIZE, layer.in_features))
    dense = {str(width): FF(layer.in_features, layer.out_features, width).eval() for width in WIDTHS}
    with exclusive_timing(), torch.inference_mode():
        seconds = interleaved({"layer": layer, **dense}, batches, 1, "cpu")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fitting = [width for width in WIDTHS if medians[str(width)] <= medians["layer"]]
    width = max(fitting, default=WIDTHS[0])
    return width, medians[str(width)] / medians["layer"]


def cells(found: Mapping[str, Any], wanted: Sequence[Cell]) -> list[Cell]:
    """Dense cells that the controls of these need, the widest first."""
    controls = [control for control in found["controls"] if Cell.of(control) in wanted]
    widths = {control[kind] for control in controls for kind in KINDS}
    return [cell for width in sorted(widths, reverse=True) if (cell := Cell("FF", width)) not in wanted]


def comparisons(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Test accuracy of each FFF minus that of each control, paired by seed; a control of two kinds is tested once."""
    made = []
    for control in found["controls"]:
        for width in sorted({control[kind] for kind in KINDS}, reverse=True):
            ours, theirs = (_accuracies(found, cell) for cell in (Cell.of(control), Cell("FF", width)))
            if ours and theirs:
                kinds = [kind for kind in KINDS if control[kind] == width]
                made.append({**control, "kinds": kinds, "ff_width": width, "ours": ours, "theirs": theirs})
    tested = paired_tests([(each.pop("ours"), each.pop("theirs")) for each in made])
    return [each | test._asdict() for each, test in zip(made, tested, strict=True)]


def _accuracies(found: Mapping[str, Any], cell: Cell) -> dict[int, float]:
    return {run["seed"]: 100 * run["test_accuracy"] for run in runs.of(found, cell)}


def report(found: Mapping[str, Any]) -> str:
    """A line for each comparison; "" where there are none."""
    lines = []
    for c in comparisons(found):
        interval = "" if c["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*c["interval"])
        verdict = "no difference shown"
        if c["p"] is not None and c["p"] < 0.05:
            verdict = "FFF is ahead" if c["difference"] > 0 else "FF is ahead"
        equal = "equal " + " and ".join(kind.replace("_", " ") for kind in c["kinds"])
        time = f"{c['time_ratio']:.2f}" if "inference_time" in c["kinds"] else ""
        lines.append(
            f"{c['training_width']:5}{c['leaf_width']:5}  {equal:40}{c['ff_width']:5}{time:>6}"
            f"{c['difference']:+9.2f}{interval:>18}{'' if c['p'] is None else format(c['p'], '.1e'):>10}  {verdict}"
        )
    if not lines:
        return ""
    head = f"{'w':>5}{'leaf':>5}  {'FF of':40}{'width':>5}{'time':>6}{'FFF - FF':>9}{'95% interval':>18}{'p':>10}"
    note = (
        f"Test accuracy in points, paired by seed. Time: of the widest FF that is no slower over that of the FFF, a\n"
        f"batch of {BATCH_SIZE} on one thread.\n"
        "p: paired t-test, adjusted for all lines by Benjamini and Hochberg."
    )
    return "\n".join([head, *lines, note])

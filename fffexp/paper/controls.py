"""Dense layers that a sceptic would hold against an FFF: of equal parameters, inference size and inference time."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fffexp.environment import environment
from fffexp.layers import FF, FFF, FeedforwardLayer
from fffexp.paper import runs
from fffexp.paper.cells import SIZES, Cell
from fffexp.statistics import Interval, Paired, paired_tests
from fffexp.timing import interleaved, rotating

KINDS = ("width", "parameters", "inference_size", "inference_time")
BATCH_SIZE = 256
TIMING_S = 10.0  # for all widths, beside one FFF
TOLERANCE = 1.15  # times that are equal: medians of layers this small differ by a tenth from run to run
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
        times = _times(layer)
        width = equal_in_time(times)
        found["controls"].append(
            {
                **cell.describe(),
                "width": cell.training_width,
                "parameters": max(1, round((layer.parameter_count - out_features) / (in_features + 1 + out_features))),
                "inference_size": layer.inference_size,
                "inference_time": width,
                "time_ratio": times[width],  # of that FF to the FFF
                "time_ratios": times,  # of all widths
                "backend": layer.inference_backend(),
                "environment": environment([1], "cpu"),
            }
        )


def equal_in_time(time_ratios: Mapping[int, float]) -> int:
    """The widest FF at no more than TOLERANCE, of ratios to the FFF's time by width; the narrowest without one."""
    return max((width for width, ratio in time_ratios.items() if ratio <= TOLERANCE), default=min(time_ratios))


def _times(layer: FeedforwardLayer) -> dict[int, float]:
    """Of FF of each width, the faster way to compute it, over that of the layer; medians of interleaved rounds."""
    # of mean 0, so that they spread over the leaves
    batches = list(torch.randn(32, BATCH_SIZE, layer.in_features))
    calls: dict[str, Callable[[torch.Tensor], object]] = {"layer": layer}
    ways: dict[int, list[str]] = {}
    for width in WIDTHS:
        dense = FF(layer.in_features, layer.out_features, width).eval()
        named = {f"{width} {name}": way for name, way in ({"linear": dense} | dense.fast_forms()).items()}
        ways[width] = list(named)
        calls |= named
    with torch.inference_mode():
        rotated = {name: rotating(call, batches) for name, call in calls.items()}
        seconds = interleaved(rotated, TIMING_S, threads=1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {width: min(medians[name] for name in names) / medians["layer"] for width, names in ways.items()}


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


def mixtures(found: Mapping[str, Any]) -> list[tuple[Cell, Cell, Paired]]:
    """Each MoE, the widest FF in the table that evaluates no more neurons, and test accuracy of MoE minus FF."""
    present = runs.cells(found)
    pairs = []
    for cell in present:
        fitting = [of for of in present if of.layer == "FF" and of.training_width <= cell.inference_size]
        if cell.layer in ("NoisyTopKMoE", "SwitchMoE") and fitting:
            pairs.append((cell, max(fitting, key=lambda of: of.training_width)))
    tested = paired_tests([(_accuracies(found, cell), _accuracies(found, dense)) for cell, dense in pairs])
    return [(*pair, test) for pair, test in zip(pairs, tested, strict=True)]


def report(found: Mapping[str, Any]) -> str:
    """Both tables of comparisons, where there are any."""
    return "\n\n".join(part for part in (_trees(found), _mixtures(found)) if part)


def _trees(found: Mapping[str, Any]) -> str:
    lines = []
    for c in comparisons(found):
        equal = "equal " + " and ".join(kind.replace("_", " ") for kind in c["kinds"])
        time = f"{c['time_ratio']:.2f}" if "inference_time" in c["kinds"] else ""
        lines.append(
            f"{c['training_width']:5}{c['leaf_width']:5}  {equal:40}{c['ff_width']:5}{time:>6}"
            f"{_told(c['difference'], c['interval'], c['p'], 'FFF')}"
        )
    if not lines:
        return ""
    head = f"{'w':>5}{'leaf':>5}  {'FF of':40}{'width':>5}{'time':>6}{'FFF - FF':>9}{'95% interval':>18}{'p':>10}"
    note = (
        f"Test accuracy in points, paired by seed. Time: of the widest FF that takes no more than {TOLERANCE} of the\n"
        f"FFF's time, over it, computed in the faster of two ways, a batch of {BATCH_SIZE} on one thread.\n"
        "p: paired t-test, adjusted for all lines by Benjamini and Hochberg."
    )
    return "\n".join([head, *lines, note])


def _mixtures(found: Mapping[str, Any]) -> str:
    lines = [
        f"{cell.training_width:5}{cell.leaf_width:5}  {cell.layer:14}{cell.inference_size:9}{dense.training_width:10}"
        f"{_told(test.difference, test.interval, test.p, 'MoE')}"
        for cell, dense, test in mixtures(found)
    ]
    if not lines:
        return ""
    head = f"{'w':>5}{'leaf':>5}  {'':14}{'neurons':>9}{'FF of':>10}{'MoE - FF':>9}{'95% interval':>18}{'p':>10}"
    note = (
        "Test accuracy in points, paired by seed. neurons: evaluated for one sample, the gate's included; FF: the\n"
        "widest in this table that evaluates no more. p: paired t-test, adjusted for these lines."
    )
    return "\n".join([head, *lines, note])


def _told(difference: float, interval: Interval | None, p: float | None, ours: str) -> str:
    """Difference to FF, interval, p, and what they say."""
    bounds = "" if interval is None else "[{:+.2f}, {:+.2f}]".format(*interval)
    verdict = "no difference shown"
    if p is not None and p < 0.05:
        verdict = f"{ours if difference > 0 else 'FF'} is ahead"
    return f"{difference:+9.2f}{bounds:>18}{'' if p is None else format(p, '.1e'):>10}  {verdict}"

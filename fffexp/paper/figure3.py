"""`fffexp reproduce figure3`: time of inference against the number of blocks (arXiv 2308.14711, figures 3 and 4).

What it should cost: the larger of operations and distinct bytes at a machine's rates, plus a call.
"""

import itertools
import json
from collections import namedtuple
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from fffexp.bench import measure as bench
from fffexp.bench.measure import measure_limits
from fffexp.bench.records import Record
from fffexp.bench.setting import Setting
from fffexp.environment import environment
from fffexp.errors import UserError, refuse
from fffexp.files import save_json

DENSE, MIXTURE, TREE = yaml.safe_load(files("fffexp.paper").joinpath("figure3.yaml").read_text()).values()
# lines of the figure: layer, experts of a sample, colour, marker
LINES = {
    DENSE: (DENSE, 1, "#0072B2", "o"),
    "MoE k=1": (MIXTURE, 1, "#009E73", "s"),
    TREE: (TREE, 1, "#D55E00", "^"),
    "MoE k=2": (MIXTURE, 2, "#56B4E9", "D"),
}


def measure(setting: Setting, ff_depth: int) -> dict[str, Any]:
    """Records by depth, of dense layers to ff_depth; written as they come, and those in the file not measured again.

    UserError if the file is of another measurement.
    """
    (threads,), path, where = setting.threads, setting.json, environment(setting.threads, setting.device)
    torch.set_num_threads(threads)
    sizes = [setting.in_features, setting.out_features, setting.leaf_width]
    kind = {"figure": "figure3", "setting": {"sizes": sizes, "threads": threads, "ff_depth": ff_depth}}
    found: dict[str, Any] = kind | {"environment": where, "limits": {}, "records": []}
    if path is not None and path.exists():
        try:
            found = json.loads(path.read_text())
            differing = [key for key, value in kind.items() if found[key] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--json {path} holds no records of this figure ({error}): give another file") from error
        another = f"holds another measurement ({' and '.join(differing)})"
        refuse((differing, f"--json {path} {another}: give another file, or remove it"))
    done = {(r["depth_of_point"], r["batch_size"], r["k_of_point"]) for r in found["records"]}
    points = [each for each in itertools.product(setting.depths, setting.batch_sizes, (1, 2)) if each not in done]
    if not points:
        return found
    other = [key for key in ("cpu", "torch", "instruction_set") if found["environment"][key] != where[key]]
    refuse((other, f"--json {path}: measured with another {' and '.join(other)}: give another file, or remove it"))
    limits = measure_limits(torch.float32, "cpu")
    found |= {"environment": where, "limits": limits}
    for depth, batch_size, k in points:
        names = [layer for layer, top_k, *_ in LINES.values() if top_k == k and (layer != DENSE or depth <= ff_depth)]
        one = replace(setting, layers=names, depths=[depth], batch_sizes=[batch_size], top_k=k)
        for record in bench.measure("inference", one, {str(threads): limits}):
            found["records"].append(record | {"depth_of_point": depth, "k_of_point": k})
            point = f"2^{depth:<3} batch {batch_size:<5} {record['layer']:8} k={k}"
            print(f"{point} {1e6 * record['median_s']:12.1f} us", flush=True)
        if path:
            save_json(path, found)
    return found


def panels(records: Iterable[Record]) -> dict[int, dict[str, list[Record]]]:
    """Records by batch size and line of the figure, in order of depth; each with its number of blocks."""
    found: dict[int, dict[str, list[Record]]] = {}
    # with one expert, two cannot be chosen
    chosen = (r for r in records if r["top_k"] in (None, r["k_of_point"]))
    for record in sorted(chosen, key=itemgetter("batch_size", "depth_of_point")):
        name = next(name for name, line in LINES.items() if line[:2] == (record["layer"], record["k_of_point"]))
        lines = found.setdefault(record["batch_size"], {})
        lines.setdefault(name, []).append(record | {"blocks": 2 ** record["depth_of_point"]})
    return found


# Seconds of a call, operations and bytes per second that fit best, and how well: R^2 of the log times
Fit = namedtuple("Fit", "call_s flops_per_s bytes_per_s r_squared predicted_s")


def fit(seconds: ArrayLike, flops: ArrayLike, size: ArrayLike, most_flops_per_s: float) -> Fit:
    """Rates under which max(flops / rate, bytes / rate) + call comes closest to the measured times.

    Operations are not faster than most_flops_per_s, what the machine was measured to reach. ValueError for fewer than 4
    points: there are 3 unknowns.
    """
    measured, ops, read = (np.asarray(values, float) for values in (seconds, flops, size))
    if len(measured) < 4:
        raise ValueError(f"{len(measured)} points cannot fit 3 rates: measure at least 4 depths")

    def model(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        call, compute, memory = np.exp(parameters)
        return np.log(call + np.maximum(ops / compute, read / memory))

    log_s, bounds = np.log(measured), (-np.inf, [np.inf, np.log(most_flops_per_s), np.inf])
    rates = min(np.median(ops / measured), 0.9 * most_flops_per_s), np.median(read / measured)
    starts = (np.log([share * measured.min(), *rates]) for share in (0.9, 0.1, 1e-3))
    solutions = (least_squares(lambda p: model(p) - log_s, start, bounds=bounds) for start in starts)
    solved = min(solutions, key=lambda solution: solution.cost).x
    left, total = (float((error**2).sum()) for error in (log_s - model(solved), log_s - log_s.mean()))
    r_squared = 1 - left / total if total else float("nan")
    return Fit._make([*np.exp(solved).tolist(), r_squared, np.exp(model(solved)).tolist()])


def local_slopes(blocks: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """d log time / d log blocks between neighbours: 1 is linear, 0 is constant."""
    return (np.diff(np.log(seconds)) / np.diff(np.log(blocks))).tolist()


def _fit(found: dict[str, Any], name: str, line: Sequence[Record]) -> Fit | None:
    seconds, flops, size = ([r[key] for r in line] for key in ("median_s", "flops", "bytes"))
    fits = name != DENSE and len(line) > 3
    return fit(seconds, flops, size, found["limits"]["gemm_flops_per_s"]) if fits else None


def report(found: dict[str, Any]) -> str:
    """Fits, local slopes, ratios and the break-even table."""
    lines = []
    for batch_size, by_name in panels(found["records"]).items():
        lines.append(f"batch {batch_size}")
        for name, points in by_name.items():
            if len(points) > 1:
                slopes = local_slopes([p["blocks"] for p in points], [p["median_s"] for p in points])
                lines.append(f"  {name:8} local slopes " + " ".join(f"{slope:.2f}" for slope in slopes))
            if model := _fit(found, name, points):
                gflops, gbytes = f"{model.flops_per_s / 1e9:.0f} GFLOP/s", f"{model.bytes_per_s / 1e9:.0f} GB/s"
                cost = f"max(operations / {gflops}, distinct bytes / {gbytes}) + {1e6 * model.call_s:.1f} us"
                lines.append(f"  {'':8} {cost}: R^2 {model.r_squared:.3f}")
        trees = by_name.get(TREE, [])
        lines.append(f"  {TREE:8} counted operations a sample" + "".join(f" {p['flops'] // batch_size}" for p in trees))
        for other in ("speedup_over_ff", "speedup_over_moe"):
            ratios = " ".join(f"2^{p['depth_of_point']}: {p[other]:.4g}x" for p in trees if p[other])
            lines.append(f"  {TREE:8} {other.replace('_', ' ')}: {ratios}")
    lines += ["", f"break-even: the smallest training width at which {TREE} is faster than {DENSE}"]
    return "\n".join([*lines, break_even(found["records"])])


def break_even(records: Sequence[Record]) -> str:
    """One line a batch size."""
    lines = []
    for batch_size, by_name in panels(records).items():
        compared = [r for r in by_name.get(TREE, []) if r["speedup_over_ff"]]
        slower = [r["training_width"] for r in compared if r["speedup_over_ff"] <= 1]
        first = next((r for r in compared if r["training_width"] > max(slower, default=0)), None)
        answer = f"w = {first['training_width']} ({first['speedup_over_ff']:.2f}x)" if first else "none measured"
        lines.append(f"  batch {batch_size:5}: {answer}")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Log-log, a panel a batch size; points are medians, lines the fitted cost."""
    drawn = panels(found["records"])
    figure = Figure(figsize=(6.2 * len(drawn), 4.8), layout="constrained")
    in_features, out_features, leaf_width = found["setting"]["sizes"]
    for axes, (batch_size, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for name, points in lines.items():
            *_, colour, marker = LINES[name]
            blocks, us = ([scale * p[key] for p in points] for key, scale in (("blocks", 1), ("median_s", 1e6)))
            axes.plot(blocks, us, marker, color=colour, label=name)
            model = _fit(found, name, points)
            if model or name == DENSE:
                fitted = [1e6 * s for s in model.predicted_s] if model else us
                axes.plot(blocks, fitted, color=colour, linewidth=1, linestyle="-" if model else ":")
        axes.set_xscale("log", base=2)
        blocks_of = f"number of blocks of {leaf_width} neurons ({DENSE}: width / {leaf_width})"
        axes.set(yscale="log", xlabel=blocks_of, ylabel="time of a batch in us, log scale")
        axes.set_title(f"batch {batch_size}", loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(
        f"Inference {in_features} -> {out_features}, {found['environment']['cpu']}, {found['setting']['threads']} "
        "thread(s); lines: larger of operations and distinct bytes, fitted",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)

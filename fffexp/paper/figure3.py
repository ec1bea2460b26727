"""`fffexp reproduce figure3`: time of inference against the number of blocks (arXiv 2308.14711, figures 3 and 4)."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fffexp.bench.contenders import Point
from fffexp.bench.inference import run_point
from fffexp.bench.machine import measure_limits
from fffexp.bench.records import Record
from fffexp.environment import environment
from fffexp.errors import UserError
from fffexp.files import save_json
from fffexp.paper.cost import Fit, fit, local_slopes

# The paper's FF reach width 32 * 2^5; wider ones are what FFF saves.
FF_DEPTH = 5
POINT_S = 2.0  # of timing, for one batch size and depth
STYLES = {
    "FF": ("#0072B2", "o"),
    "MoE k=1": ("#009E73", "s"),
    "MoE k=2": ("#56B4E9", "D"),
    "FFF": ("#D55E00", "^"),
}


def measure(
    depths: Sequence[int],
    batch_sizes: Sequence[int],
    sizes: tuple[int, int, int],
    threads: int,
    ff_depth: int,
    path: Path | None,
) -> dict[str, Any]:
    """Records by depth; written as they come, and those that the file has are not measured again.

    Raises:
        UserError: the file is of another measurement.
    """
    torch.set_num_threads(threads)
    setting = {"sizes": list(sizes), "threads": threads, "ff_depth": ff_depth}
    kind = {"figure": "figure3", "setting": setting}
    found = _load(path, kind) or {**kind, "environment": {}, "limits": {}, "records": []}
    points = list(itertools.product(depths, batch_sizes, (1, 2)))
    done = {(r["depth_of_point"], r["batch_size"], r["k_of_point"]) for r in found["records"]}
    if done.issuperset(points):
        return found
    where = environment([threads], "cpu")
    for key in ("cpu", "torch", "instruction_set"):
        if found["records"] and found["environment"][key] != where[key]:
            raise UserError(f"--json {path}: measured with another {key}: give another file, or remove it")
    limits = measure_limits(torch.float32, "cpu")
    found |= {"environment": where, "limits": asdict(limits)}
    in_features, out_features, leaf_width = sizes
    for depth, batch_size, k in points:
        if (depth, batch_size, k) in done:
            continue
        names = ["NoisyTopKMoE"] if k == 2 else ["NoisyTopKMoE", "FFF"]
        if k == 1 and depth <= ff_depth:
            names = ["FF", *names]
        point = Point(in_features, out_features, depth, leaf_width, k, torch.float32, "cpu", "auto")
        for record in run_point(names, point, [batch_size], {threads: limits}, seconds=POINT_S):
            found["records"].append(asdict(record) | {"depth_of_point": depth, "k_of_point": k})
            print(f"2^{depth:<3} batch {batch_size:<5} {series(record):8} {1e6 * record.median_s:12.1f} us", flush=True)
        if path:
            save_json(path, found)
    return found


def _load(path: Path | None, kind: dict[str, Any]) -> dict[str, Any] | None:
    if path is None or not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        differing = [key for key, value in kind.items() if found[key] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--json {path} holds no records of this figure ({error}): give another file") from error
    if differing:
        raise UserError(f"--json {path} holds another measurement ({differing[0]}): give another file, or remove it")
    return found


def series(record: Record) -> str:
    """The line of the figure that a record is on."""
    return f"MoE k={record.top_k}" if record.layer == "NoisyTopKMoE" else record.layer


def of(records: Iterable[dict[str, Any]], batch_size: int) -> dict[str, list[dict[str, Any]]]:
    """Records of a batch size by line of the figure, in order of depth; each with its number of blocks."""
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r["depth_of_point"]):
        if record["batch_size"] == batch_size:
            name = f"MoE k={record['k_of_point']}" if record["layer"] == "NoisyTopKMoE" else record["layer"]
            # with one expert, two cannot be chosen
            if record["layer"] != "NoisyTopKMoE" or record["top_k"] == record["k_of_point"]:
                lines[name].append(record | {"blocks": 2 ** record["depth_of_point"]})
    return dict(lines)


def fits(found: dict[str, Any]) -> dict[str, dict[int, Fit]]:
    """Cost model of FFF and MoE, by line and batch size, where there are points enough."""
    result: dict[str, dict[int, Fit]] = defaultdict(dict)
    for batch_size in sorted({r["batch_size"] for r in found["records"]}):
        for name, line in of(found["records"], batch_size).items():
            if name != "FF" and len(line) >= 4:
                seconds, flops, size = ([r[key] for r in line] for key in ("median_s", "flops", "bytes"))
                result[name][batch_size] = fit(seconds, flops, size, found["limits"]["gemm_flops_per_s"])
    return dict(result)


def report(found: dict[str, Any]) -> str:
    """Fits, local slopes, ratios and the break-even table."""
    lines = []
    models = fits(found)
    for batch_size in sorted({r["batch_size"] for r in found["records"]}):
        lines.append(f"batch {batch_size}")
        by_name = of(found["records"], batch_size)
        for name, points in by_name.items():
            if len(points) > 1:
                slopes = local_slopes([p["blocks"] for p in points], [p["median_s"] for p in points])
                lines.append(f"  {name:8} local slopes " + " ".join(f"{slope:.2f}" for slope in slopes))
            if model := models.get(name, {}).get(batch_size):
                gflops, gbytes = model.flops_per_s / 1e9, model.bytes_per_s / 1e9
                lines.append(
                    f"  {'':8} max(operations / {gflops:.0f} GFLOP/s, distinct bytes / {gbytes:.0f} GB/s) "
                    f"+ {1e6 * model.call_s:.1f} us: R^2 {model.r_squared:.3f}"
                )
        fff = by_name.get("FFF", [])
        counted = [p["flops"] // batch_size for p in fff]
        lines.append("  FFF      counted operations a sample " + " ".join(str(c) for c in counted))
        for other in ("speedup_over_ff", "speedup_over_moe"):
            ratios = " ".join(f"2^{p['depth_of_point']}: {p[other]:.4g}x" for p in fff if p[other])
            lines.append(f"  FFF      {other.replace('_', ' ')}: {ratios}")
    lines += [
        "",
        "break-even: the smallest training width at which FFF is faster than FF",
        break_even(found["records"]),
    ]
    return "\n".join(lines)


def break_even(records: Sequence[dict[str, Any]]) -> str:
    """One line a batch size."""
    lines = []
    for batch_size in sorted({r["batch_size"] for r in records}):
        compared = [r for r in of(records, batch_size).get("FFF", []) if r["speedup_over_ff"]]
        slower = [r["training_width"] for r in compared if r["speedup_over_ff"] <= 1]
        first = next((r for r in compared if r["training_width"] > max(slower, default=0)), None)
        answer = f"w = {first['training_width']} ({first['speedup_over_ff']:.2f}x)" if first else "none measured"
        lines.append(f"  batch {batch_size:5}: {answer}")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Log-log, a panel a batch size; points are medians, lines the fitted cost."""
    batch_sizes = sorted({r["batch_size"] for r in found["records"]})
    figure = Figure(figsize=(6.2 * len(batch_sizes), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    models = fits(found)
    for axes, batch_size in zip(figure.subplots(1, len(batch_sizes), squeeze=False)[0], batch_sizes, strict=True):
        for name, points in of(found["records"], batch_size).items():
            colour, marker = STYLES[name]
            blocks = [p["blocks"] for p in points]
            axes.plot(blocks, [1e6 * p["median_s"] for p in points], marker, color=colour, label=name)
            model = models.get(name, {}).get(batch_size)
            if model:
                axes.plot(blocks, [1e6 * s for s in model.predicted_s], color=colour, linewidth=1)
            elif name == "FF":
                axes.plot(blocks, [1e6 * p["median_s"] for p in points], color=colour, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(
            f"number of blocks of {found['setting']['sizes'][2]} neurons (FF: width / {found['setting']['sizes'][2]})"
        )
        axes.set_ylabel("time of a batch in us, log scale")
        axes.set_title(f"batch {batch_size}", loc="left")
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    sizes = found["setting"]["sizes"]
    where = found["environment"]
    figure.suptitle(
        f"Inference {sizes[0]} -> {sizes[1]}, {where['cpu']}, {found['setting']['threads']} thread(s); "
        "lines: larger of operations and distinct bytes, fitted",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

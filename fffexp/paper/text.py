"""`fffexp reproduce text`: layers in a small language model, compared by the rule of studies/paper/text_rates.yaml."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fffexp.environment import environment
from fffexp.layers import feedforward_layers
from fffexp.paper.comparisons import compare, equal_in_time, percent, shares
from fffexp.paper.rows import bounds, section
from fffexp.paper.studies import PaperStudy
from fffexp.report.figures import COLOURS
from fffexp.statistics import format_difference, mean_interval
from fffexp.study.results import Results, Trial
from fffexp.timing import interleaved, rotating
from fffexp.training.experiment import build

EPOCH_STEPS = 300  # of configs/recipe/text_epochs.yaml
NONE, DENSE = "none", "dense 512"  # a share of what the dense layer gains over none is recovered
BATCH_SIZES, CONTEXT = (1, 256), 64  # tokens at once, and before each of them
TIMES = ("layer b1", "layer b256", "model b1", "model b256")
BLOCKS = 2  # of configs/model/gpt.yaml
TIMING_S = 60.0  # for all contenders, at one batch size


def name(trial: Trial) -> str:
    """Of the contender."""
    return str(trial.params["contender"])


def steps(trial: Trial) -> int:
    """Of a training."""
    return int(trial.params["epochs"]) * EPOCH_STEPS


def budgets(results: Results) -> dict[int, dict[str, Trial]]:
    """By steps, the trials that have runs by the name of their contender, in the order of the study."""
    trials = sorted((t for t in results.trials if t.runs), key=lambda t: (steps(t), t.number))
    return {budget: {name(t): t for t in trials if steps(t) == budget} for budget in dict.fromkeys(map(steps, trials))}


def measure_speeds(results: Results, study: PaperStudy) -> None:
    """Time each contender's layer, and its model decoding a token with a cache, on one thread; into `extra`."""
    trials = {name(trial): trial for trial in study.wanted(results)}
    tasks: dict[str, Any] = {key: build(study.arguments(trial, 0)).task.eval() for key, trial in trials.items()}
    layers = {key: next(iter(feedforward_layers(task.network).values()), None) for key, task in tasks.items()}
    speeds: dict[str, dict[str, Any]] = {
        key: {"contender": key, "backend": layer and layer.inference_backend()} for key, layer in layers.items()
    }
    for size in BATCH_SIZES:
        windows = torch.randint(256, (size, CONTEXT))
        calls: dict[str, dict[str, Callable[[], object]]] = {
            "layer": {
                key: rotating(layer, [torch.randn(size, layer.in_features) for _ in range(64)])
                for key, layer in layers.items()
                if layer is not None
            },
            "model": {},
        }
        with torch.inference_mode():
            calls["model"] = {key: task.timed(windows, size) for key, task in tasks.items()}
            for kind, of_kind in calls.items():
                for key, spent in interleaved(of_kind, TIMING_S, threads=1, rounds=(15, 10_000)).items():
                    speeds[key][f"{kind}_b{size}_ms"] = 1e3 * statistics.median(spent)
    where = environment([1], "cpu")
    results.extra["speeds"] = [speed | {"environment": where} for speed in speeds.values()]


def _speeds(results: Results) -> dict[str, Mapping[str, Any]]:
    return {speed["contender"]: speed for speed in results.extra.get("speeds", [])}


def _table(results: Results) -> str:
    per_budget, speeds = budgets(results), _speeds(results)
    last, lines = per_budget[max(per_budget)], []
    for contender in dict.fromkeys(key for trials in per_budget.values() for key in trials):
        found = {budget: trials[contender] for budget, trials in per_budget.items() if contender in trials}
        sizes, speed = found[max(found)].sizes or {}, speeds.get(contender, {})
        means = {budget: mean_interval([*t.by_seed(results.test_monitor).values()]) for budget, t in found.items()}
        three = [last.get(key) for key in (contender, DENSE, NONE)]
        share = shares(results, *three)[1] if all(three) else None  # type: ignore[arg-type] # none is None
        lines.append(
            {"layer": contender, "neurons": sizes.get("inference_size", 0) // BLOCKS}
            | {"kFLOPs": sizes.get("flops_per_sample", 0) / BLOCKS / 1e3}
            | {str(b): f"{means[b][0]:.3f} {bounds(means[b][1], 3) or ''}" if b in means else None for b in per_budget}
            | {"recovered, %": percent(share)}
            | {time: speed.get(f"{time.replace(' ', '_')}_ms") for time in TIMES}
        )
    return section(
        "bits per byte of the test text",
        lines,
        {"kFLOPs": ".1f", **dict.fromkeys(TIMES, ".3f")},
        f"neurons, kFLOPs: of one layer for a token. {', '.join(map(str, per_budget))}: steps of 4,096 bytes; mean and "
        f"95% interval over seeds. recovered: share of what {DENSE} gains over {NONE} at {max(per_budget)} steps, by "
        "Fieller, paired by seed. layer, model: median ms for a batch of 1 and of 256 tokens, one thread; the model "
        f"decodes a token after up to {CONTEXT} others in a key-value cache.",
    )


def _verdict(results: Results) -> str:
    per_budget, speeds = budgets(results), _speeds(results)
    lines = []
    for budget, trials in per_budget.items():
        dense = {key: trial for key, trial in trials.items() if key.startswith("dense") and key in speeds}
        others = {key: trial for key, trial in trials.items() if key not in dense and key in speeds and key != NONE}
        if not dense or not others:
            continue
        pairs = []
        for key, trial in others.items():
            for size in BATCH_SIZES:
                mine = speeds[key][f"layer_b{size}_ms"]
                ratios = {int(t.params["width"]): speeds[k][f"layer_b{size}_ms"] / mine for k, t in dense.items()}
                control = next(t for t in dense.values() if t.params["width"] == equal_in_time(ratios))
                pairs.append((trial, control, (f"b{size}",), ratios[control.params["width"]]))
        lines += [
            {"steps": budget, "layer": name(c.trial), "batch": c.kinds[0], "dense of equal time": name(c.control)}
            | {"its time": f"{c.time_ratio:.2f}", "difference": format_difference(c.test)}
            for c in compare(results, pairs)
        ]
    return section(
        "against the widest dense layer that takes no longer",
        lines,
        text="difference: bits per byte, less is better, paired by seed, p adjusted by Benjamini and Hochberg for all "
        "rows of a budget. its time: of the dense layer over that of the layer, of the layers alone.",
    )


def best_rates(results: Results) -> str:
    """Bits per byte of the validation text at each learning rate."""
    found: dict[str, dict[float, float]] = {}
    for trial in sorted(results.trials, key=lambda t: t.number):
        for value in trial.by_seed(results.monitor).values():
            found.setdefault(name(trial), {})[float(trial.params["lr"])] = value
    rates = sorted({rate for of in found.values() for rate in of})
    lines = [
        {"layer": key, **{f"{rate:g}": of.get(rate) for rate in rates}, "best": f"{min(of, key=of.__getitem__):g}"}
        for key, of in found.items()
    ]
    return section("bits per byte of the validation text, by learning rate", lines, {f"{r:g}": ".3f" for r in rates})


def report(results: Results) -> str:
    """The table of all contenders, and each against dense layers of its time."""
    return "\n\n".join(filter(None, [_table(results), _verdict(results)]))


def draw(results: Results, path: Path) -> None:
    """Bits per byte against the time of the layer for 256 tokens, and against the steps of training."""
    per_budget, speeds = budgets(results), _speeds(results)
    last, colours = per_budget[max(per_budget)], _colours(results)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)

    def value(trial: Trial) -> float:
        return statistics.mean(trial.by_seed(results.test_monitor).values())

    labels = []
    for key, trial in last.items():
        if (ms := speeds.get(key, {}).get("layer_b256_ms")) is not None:
            left.plot(ms, value(trial), "o", color=colours[trial.layer])
            labels.append(left.text(ms, value(trial), key, fontsize=8, color=colours[trial.layer]))
    for key in last:
        course = {budget: value(trials[key]) for budget, trials in per_budget.items() if key in trials}
        right.plot([*course], [*course.values()], "o-", color=colours[last[key].layer], markersize=3, linewidth=1)
        right.annotate(
            key, (max(course), course[max(course)]), (4, 0), textcoords="offset points", fontsize=7, va="center"
        )
    for axes, label in ((left, "ms of a layer for 256 tokens"), (right, "steps of 4,096 bytes")):
        _axes(axes, label)
    if labels:
        adjust_text(labels, ax=left)
    figure.savefig(path, dpi=130)


def _axes(axes: Axes, label: str) -> None:
    axes.set(xlabel=f"{label}, log scale", ylabel="bits per byte of the test text", xscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(results: Results) -> dict[str, str]:
    layers = dict.fromkeys(trial.layer for trial in results.trials)
    return {layer: COLOURS[i % len(COLOURS)] for i, layer in enumerate(layers)}

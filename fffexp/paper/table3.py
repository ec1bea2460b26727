"""What layers in a vision transformer keep (arXiv 2308.14711, section 4.4).

Beside the accuracy that a layer keeps stands what it recovers of the gap between none and the dense one.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fffexp.paper.rows import bounds, describe, is_dense, is_tree, leaf_width, name, note, ordered, width
from fffexp.report.tables import table
from fffexp.statistics import Interval, Paired, format_difference, paired_tests, ratio
from fffexp.study.results import Results, Trial

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH_SIZE = 256
FORMATS = {"width, %": ".1f", "size, %": ".1f", "layer x": ".2f", "model x": ".2f"}
TIMING_S = 60.0  # for all models, and for all layers: a few rounds of models of 70 ms do not order them


def dense_of(results: Results) -> Trial:
    """The baseline: the widest dense layer."""
    return max(filter(is_dense, results.trials), key=width)


def nothing_of(results: Results) -> Trial:
    """The model without feedforward layers."""
    return next(trial for trial in results.trials if not width(trial))


def kept(results: Results) -> dict[int, tuple[tuple[float, Interval] | None, tuple[float, Interval] | None]]:
    """By number: accuracy over the dense layer's, and share of the gap that is recovered, paired by seed."""
    dense, nothing = (each.by_seed(results.test_monitor) for each in (dense_of(results), nothing_of(results)))
    found = {}
    for trial in ordered(results):
        mine = trial.by_seed(results.test_monitor)
        both = sorted(mine.keys() & dense.keys() & nothing.keys())
        found[trial.number] = (
            ratio([mine[s] for s in both], [dense[s] for s in both]),
            ratio([mine[s] - nothing[s] for s in both], [dense[s] - nothing[s] for s in both]),
        )
    return found


def controls(results: Results, tree: Trial) -> list[Trial]:
    """Dense layers of its inference size and of the width of its leaves, and none."""
    size = (tree.sizes or {}).get("inference_size")
    others = sorted((t for t in results.trials if t.runs and not is_tree(t)), key=width, reverse=True)
    of_size = [t for t in others if is_dense(t) and (t.sizes or {}).get("inference_size") == size]
    of_leaf = [t for t in others if is_dense(t) and width(t) == leaf_width(tree) and t not in of_size]
    return [*of_size, *of_leaf, *(t for t in others if not width(t))]


def comparisons(results: Results) -> list[tuple[Trial, Trial, Paired]]:
    """Test accuracy of each tree minus that of each of its controls with a seed in common, paired by seed."""
    accuracies = {trial.number: trial.by_seed(results.test_monitor) for trial in results.trials}
    pairs = [
        (tree, control)
        for tree in filter(is_tree, ordered(results))
        for control in controls(results, tree)
        if accuracies[tree.number].keys() & accuracies[control.number].keys()
    ]
    tests = paired_tests([(accuracies[tree.number], accuracies[control.number]) for tree, control in pairs])
    return [(*pair, test) for pair, test in zip(pairs, tests, strict=True)]


def report_kept(results: Results, shown: Iterable[Trial]) -> str:
    """Accuracy that is kept, at which size and speed; "" where there is nothing to compare with."""
    if not any(width(t) == 0 for t in results.trials) or not any(map(is_dense, results.trials)):
        return ""
    dense, shares = dense_of(results), kept(results)
    speeds = {_key(speed): speed for speed in results.extra.get("speeds", [])}
    lines = []
    for trial in shown:
        if trial.number not in shares:
            continue
        speed = speeds.get(_key(describe(trial)), {})
        line: dict[str, Any] = {"layer": trial.layer, "w": width(trial), "leaf": leaf_width(trial)}
        for title, key in (("width, %", "inference_width"), ("size, %", "inference_size")):
            line[title] = 100 * (trial.sizes or {}).get(key, 0) / (dense.sizes or {})[key]
        for title, share in zip(("of dense, %", "recovered, %"), shares[trial.number], strict=True):
            line[title] = None if share is None else f"{100 * share[0]:.1f} {bounds(share[1], 1, 100)}"
        for title, key in (("layer x", "layer_speedup"), ("model x", "model_speedup")):
            line[title] = speed.get(key)
        lines.append(line)
    return f"accuracy kept\n{table(lines, FORMATS)}\n" + note(
        f"width, size: neurons at inference over the {width(dense)} of the dense layer, without and with those "
        "that route. of dense: accuracy over that of the dense layer; recovered: share of the gap between no "
        "feedforward layers and it, empty where there is none to speak of; 95% intervals by Fieller, paired "
        f"by seed. layer x, model x: speedup over the dense layer, of a layer on the tokens of {BATCH_SIZE} "
        f"images and of the model ({results.extra['blocks']} blocks, the last with one row an image), one "
        "thread."
    )


def report_controls(results: Results, shown: Iterable[Trial]) -> str:
    """Trees beside their controls; "" without any."""
    numbers = {trial.number for trial in shown}
    lines = [
        {"tree": name(tree), "control": name(control), "difference": format_difference(test, 100), "n": test.seeds}
        for tree, control, test in comparisons(results)
        if test.seeds > 1 and {tree.number, control.number} <= numbers
    ]
    if not lines:
        return ""
    note = "Test accuracy in points, tree minus control, paired by seed. p: paired t-test, adjusted for the file."
    return f"controls\n{table(lines)}\n{note}"


def untimed(results: Results) -> bool:
    """Whether a point has no speed: all are then timed in turn, to be compared."""
    have = {_key(speed) for speed in results.extra.get("speeds", [])}
    return any(_key(describe(trial)) not in have for trial in results.trials)


def measure(results: Results, build: Callable[[Trial], tuple["nn.Module", Sequence[int]]]) -> None:
    """Speeds of all points, timed in turn to be compared, in results.extra["speeds"].

    Args:
        results: of the table.
        build: the model of a trial, and the shape of a sample.
    """
    import torch

    from fffexp.environment import environment
    from fffexp.layers import FeedforwardLayer
    from fffexp.timing import interleaved, rotating

    dense, calls = dense_of(results), {}
    layers: dict[int, FeedforwardLayer] = {}
    for trial in results.trials:
        model, shape = build(trial)
        batch = torch.randn(BATCH_SIZE, *shape)
        calls[f"model {trial.number}"] = rotating(model, [torch.randn_like(batch) for _ in range(8)])
        layer = next((module for module in model.modules() if isinstance(module, FeedforwardLayer)), None)
        if layer is not None:
            tokens: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda _, args, to=tokens: to.append(args[0]))
            with torch.inference_mode():
                model(batch)
            handle.remove()
            calls[f"layer {trial.number}"] = rotating(layer, [torch.randn_like(tokens[0]) for _ in range(8)])
            layers[trial.number] = layer
    medians: dict[str, float] = {}
    with torch.inference_mode():
        for kind in ("model", "layer"):
            of_kind = {key: call for key, call in calls.items() if key.startswith(kind)}
            medians |= {k: statistics.median(s) for k, s in interleaved(of_kind, TIMING_S, threads=1).items()}
    where = environment([1], "cpu")

    def speedup(kind: str, trial: Trial) -> dict[str, float | None]:
        mine = medians.get(f"{kind} {trial.number}")
        over = medians[f"{kind} {dense.number}"]
        return {f"{kind}_s": mine, f"{kind}_speedup": None if mine is None else over / mine}

    results.extra["speeds"] = [
        {
            **describe(trial),
            **speedup("layer", trial),
            **speedup("model", trial),
            "backend": layers[trial.number].inference_backend() if trial.number in layers else None,
            "environment": where,
        }
        for trial in results.trials
    ]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("layer", "training_width", "leaf_width"))

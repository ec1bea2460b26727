"""Dense layers that a sceptic would hold against a tree: of equal width, parameters, size and time at inference."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fffexp.paper.rows import describe, is_dense, is_tree, leaf_width, note, ordered, point, width
from fffexp.report.tables import table
from fffexp.statistics import Paired, format_difference, paired_tests
from fffexp.study.results import Results, Trial

if TYPE_CHECKING:
    from torch import nn

BATCH_SIZE = 256
TIMING_S = 10.0  # for all widths, beside one tree
TOLERANCE = 1.15  # times that are equal: medians of layers this small differ by a tenth from run to run


class Comparison(NamedTuple):
    """Test accuracy of a layer minus that of a dense one.

    Attributes:
        trial: the layer.
        dense: what it is compared with.
        kinds: in what they are equal.
        time_ratio: time of the dense layer over that of the other, None where it is not why they are compared.
        test: paired by seed.
    """

    trial: Trial
    dense: Trial
    kinds: list[str]
    time_ratio: float | None
    test: Paired


def equal(tree: Mapping[str, Any], sizes: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """Width of the dense layer that equals a tree in each respect that the sizes tell, where there is one.

    Args:
        tree: its sizes.
        sizes: of dense layers, by their widths.
    """
    found: dict[str, int] = {}
    for kind, key in (("width", "training_width"), ("inference size", "inference_size")):
        found.update((kind, of) for of, each in sizes.items() if each[key] == tree[key])
    apart = {of: abs(each["parameters"] - tree["parameters"]) for of, each in sizes.items()}
    nearest = min(apart, key=lambda of: apart[of], default=0)
    if nearest and apart[nearest] <= sizes[nearest]["parameters"] / nearest / 2:  # within half a neuron
        found["parameters"] = nearest
    return found


def equal_in_time(time_ratios: Mapping[int, float]) -> int:
    """The widest at no more than TOLERANCE, of ratios to the tree's time by width; the narrowest without one."""
    return max((width for width, ratio in time_ratios.items() if ratio <= TOLERANCE), default=min(time_ratios))


def comparisons(results: Results) -> list[Comparison]:
    """Each tree and each of its controls; a control of two kinds is tested once."""
    trials = ordered(results)
    dense = {width(trial): trial for trial in trials if is_dense(trial)}
    times = {_key(record): _ratios(record) for record in results.extra.get("controls", [])}
    pairs = []
    for tree in filter(is_tree, trials):
        widths = equal(tree.sizes or {}, {of: trial.sizes or {} for of, trial in dense.items()})
        if ratios := {of: ratio for of, ratio in times.get(_key(describe(tree)), {}).items() if of in dense}:
            widths["inference time"] = equal_in_time(ratios)
        for of in sorted({*widths.values()} & dense.keys(), reverse=True):
            kinds = [
                kind for kind in ("width", "parameters", "inference size", "inference time") if widths.get(kind) == of
            ]
            pairs.append((tree, dense[of], kinds, ratios[of] if ratios and "inference time" in kinds else None))
    return _tested(results, pairs)


def mixtures(results: Results) -> list[Comparison]:
    """Each mixture of experts, and the widest dense layer of the table that evaluates no more neurons."""
    trials = ordered(results)
    pairs = []
    for trial in trials:
        size = (trial.sizes or {}).get("inference_size", 0)
        fitting = [each for each in trials if is_dense(each) and width(each) <= size]
        if not is_tree(trial) and leaf_width(trial) is not None and fitting:
            pairs.append((trial, max(fitting, key=width), ["inference size"], None))
    return _tested(results, pairs)


def _tested(results: Results, pairs: Sequence[tuple[Trial, Trial, list[str], float | None]]) -> list[Comparison]:
    shared = [
        pair for pair in pairs if {*pair[0].by_seed(results.test_monitor)} & {*pair[1].by_seed(results.test_monitor)}
    ]
    tests = paired_tests([(a.by_seed(results.test_monitor), b.by_seed(results.test_monitor)) for a, b, *_ in shared])
    return [Comparison(*pair, test) for pair, test in zip(shared, tests, strict=True)]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("layer", "training_width", "leaf_width"))


def _ratios(record: Mapping[str, Any]) -> dict[int, float]:
    return {int(of): ratio for of, ratio in record["time_ratios"].items()}


def report_trees(results: Results, shown: Iterable[Trial]) -> str:
    """Trees beside dense layers; "" without any."""
    numbers = {trial.number for trial in shown}
    lines = [
        {
            **point(c.trial),
            "dense layer of equal": ", ".join(c.kinds),
            "its width": width(c.dense),
            "its time": c.time_ratio,
            "difference": format_difference(c.test, 100),
        }
        for c in comparisons(results)
        if c.trial.number in numbers
    ]
    if not lines:
        return ""
    return f"controls\n{table(lines, {'its time': '.2f'})}\n" + note(
        "Test accuracy in points, tree minus dense layer, paired by seed; 95% interval; p of a paired t-test, "
        "adjusted for all comparisons of the file by Benjamini and Hochberg. its time: of the widest dense "
        f"layer that takes no more than {TOLERANCE} of the tree's time, over it, computed in the fastest of "
        f"its forms, batch {BATCH_SIZE}, one thread."
    )


def report_mixtures(results: Results, shown: Iterable[Trial]) -> str:
    """Mixtures beside dense layers; "" without any."""
    numbers = {trial.number for trial in shown}
    lines = [
        {
            **point(c.trial),
            "neurons": (c.trial.sizes or {})["inference_size"],
            "dense width": width(c.dense),
            "difference": format_difference(c.test, 100),
        }
        for c in mixtures(results)
        if c.trial.number in numbers
    ]
    if not lines:
        return ""
    return f"mixtures beside dense layers\n{table(lines)}\n" + note(
        "Test accuracy in points, mixture minus dense layer, paired by seed; p adjusted for all mixtures of "
        "the file. neurons: evaluated for one sample, the gate's included; the dense layer is the widest here "
        "that evaluates no more."
    )


def untimed(results: Results, wanted: Iterable[Trial]) -> list[Trial]:
    """Trees that have not been timed beside the dense layers."""
    have = {_key(record) for record in results.extra.get("controls", [])}
    return [trial for trial in wanted if is_tree(trial) and _key(describe(trial)) not in have]


def measure(results: Results, trees: Sequence[Trial], build: Callable[[Trial], tuple["nn.Module", object]]) -> None:
    """Time trees beside all dense layers of the table; the ratios are kept in results.extra["controls"].

    Args:
        results: of the table.
        trees: without a record.
        build: the model of a trial, which has a single layer, and the shape of a sample.
    """
    import torch

    from fffexp.environment import environment
    from fffexp.layers import FeedforwardLayer
    from fffexp.timing import interleaved, rotating

    def layer(trial: Trial) -> FeedforwardLayer:
        return next(module for module in build(trial)[0].modules() if isinstance(module, FeedforwardLayer))

    dense = {width(trial): layer(trial) for trial in results.trials if is_dense(trial)}
    for trial in trees:
        tree = layer(trial)
        batches = list(torch.randn(32, BATCH_SIZE, tree.in_features))  # of mean 0, so that they spread over the leaves
        calls = {"tree": rotating(tree, batches)}
        forms: dict[int, list[str]] = {}
        for of, own in dense.items():
            named = {f"{of} {form}": call for form, call in ({"linear": own} | own.fast_forms()).items()}
            forms[of] = list(named)
            calls |= {key: rotating(call, batches) for key, call in named.items()}
        with torch.inference_mode():
            seconds = interleaved(calls, TIMING_S, threads=1)
        medians = {key: statistics.median(times) for key, times in seconds.items()}
        results.extra.setdefault("controls", []).append(
            {
                **describe(trial),
                "time_ratios": {of: min(medians[key] for key in keys) / medians["tree"] for of, keys in forms.items()},
                "backend": tree.inference_backend(),
                "environment": environment([1], "cpu"),
            }
        )

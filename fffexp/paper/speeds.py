"""Layers of a table's points timed in turn, to be compared; what was timed is kept in the results."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fffexp.environment import environment
from fffexp.layers import FeedforwardLayer, feedforward_layers
from fffexp.paper.comparisons import BATCH_SIZE, dense_of
from fffexp.paper.rows import Row, describe, is_dense, point_of, width
from fffexp.study.results import Results, Trial
from fffexp.timing import interleaved, rotating

BESIDE_S = 10.0  # of timing, for all dense widths beside one tree
TIMING_S = 60.0  # for all models, and for all layers: a few rounds of models of 70 ms do not order them

Build = Callable[[Trial], tuple[nn.Module, Sequence[int]]]  # the untrained model of a point, and the shape of a sample


def _medians(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    with torch.inference_mode():
        return {key: statistics.median(spent) for key, spent in interleaved(calls, seconds, threads=1).items()}


def _untimed(results: Results, key: str, trials: Iterable[Trial]) -> list[Trial]:
    have = {point_of(record) for record in results.extra.get(key, [])}
    return [trial for trial in trials if point_of(describe(trial)) not in have]


def _layer(model: nn.Module) -> FeedforwardLayer | None:
    return next(iter(feedforward_layers(model).values()), None)


def beside_dense(results: Results, wanted: Iterable[Trial], build: Build) -> None:
    """Trees beside all dense layers of the table, in results.extra["controls"]; a model is one layer."""
    trees = _untimed(results, "controls", (trial for trial in wanted if "depth" in trial.params))
    dense = {width(trial): _layer(build(trial)[0]) for trial in results.trials if trees and is_dense(trial)}
    for trial in trees:
        tree = _layer(build(trial)[0])
        assert tree is not None
        batches = list(torch.randn(32, BATCH_SIZE, tree.in_features))  # of mean 0, so that they spread over the leaves
        calls = {"tree": rotating(tree, batches)}
        for of, own in dense.items():
            forms = {"linear": own} | own.fast_forms()
            calls |= {f"{of} {form}": rotating(call, batches) for form, call in forms.items()}
        medians = _medians(calls, BESIDE_S)
        fastest = {of: min(s for key, s in medians.items() if key.startswith(f"{of} ")) for of in dense}
        record = {
            **describe(trial),
            "time_ratios": {of: seconds / medians["tree"] for of, seconds in fastest.items()},
            "backend": tree.inference_backend(),
            "environment": environment([1], "cpu"),
        }
        results.extra.setdefault("controls", []).append(record)


def in_turn(results: Results, _: Iterable[Trial], build: Build) -> None:
    """All models and their first layers, in results.extra["speeds"]; none where all points have theirs."""
    if not _untimed(results, "speeds", results.trials):
        return
    calls: dict[str, dict[str, Callable[[], object]]] = {"layer": {}, "model": {}}
    speeds: dict[str, Row] = {}
    for trial in results.trials:
        model, shape = build(trial)
        layer, batch, tokens = _layer(model), torch.randn(BATCH_SIZE, *shape), list[Tensor]()
        key = str(trial.number)
        calls["model"][key] = rotating(model, [torch.randn_like(batch) for _ in range(8)])
        if layer is not None:
            with layer.register_forward_pre_hook(lambda _, args, to=tokens: to.append(args[0])), torch.inference_mode():
                model(batch)
            calls["layer"][key] = rotating(layer, [torch.randn_like(tokens[0]) for _ in range(8)])
        speeds[key] = describe(trial) | {"backend": layer and layer.inference_backend()}
    dense, where = dense_of(results), environment([1], "cpu")
    assert dense is not None
    for kind, of_kind in calls.items():
        medians = _medians(of_kind, TIMING_S)
        for key, speed in speeds.items():
            mine = medians.get(key)
            speed |= {f"{kind}_s": mine, f"{kind}_speedup": mine and medians[str(dense.number)] / mine}
    results.extra["speeds"] = [speed | {"environment": where} for speed in speeds.values()]


MEASURE = {"table1": beside_dense, "table3": in_turn}

"""Layers of a table's points timed in turn, to be compared; what was timed is kept in the results."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fffexp import paths, tracking
from fffexp.environment import environment
from fffexp.layers import feedforward_layers
from fffexp.paper.comparisons import BATCH_SIZE, dense_of
from fffexp.paper.rows import Row, describe, is_dense, point_of, width
from fffexp.paper.studies import PaperStudy
from fffexp.study.results import Results, Trial
from fffexp.timing import interleaved, rotating
from fffexp.training.config import read_checkpoint
from fffexp.training.experiment import build
from fffexp.training.language_model import TIMED_CONTEXT

BESIDE_S = 10.0  # of timing, for all dense widths beside one tree
TIMING_S = 60.0  # for all models, and for all layers: a few rounds of models of 70 ms do not order them
BATCH_SIZES = (1, BATCH_SIZE)  # tokens at once in a language model


@torch.inference_mode()
def _medians(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    return {key: statistics.median(spent) for key, spent in interleaved(calls, seconds, threads=1).items()}


def _timed(results: Results, key: str) -> set[Any]:
    return {point_of(record) for record in results.extra.get(key, [])}


def _first(model: nn.Module) -> Any:
    return next(iter(feedforward_layers(model).values()), None)


def _beside_dense(results: Results, study: PaperStudy) -> None:
    wanted, timed = study.wanted(results), _timed(results, "controls")
    trees = [trial for trial in wanted if "depth" in trial.params and point_of(describe(trial)) not in timed]
    dense = [trial for trial in wanted if trees and is_dense(trial)]
    layers = {trial.number: _first(build(study.arguments(trial, 0)).task.eval()) for trial in (*trees, *dense)}
    for trial in trees:
        tree = layers[trial.number]
        batches = list(torch.randn(32, BATCH_SIZE, tree.in_features))  # of mean 0, so that they spread over the leaves
        forms = {width(d): {"linear": layers[d.number]} | layers[d.number].fast_forms() for d in dense}
        calls = {f"{of} {name}": rotating(form, batches) for of, named in forms.items() for name, form in named.items()}
        medians = _medians(calls | {"tree": rotating(tree, batches)}, BESIDE_S)
        ratios = {of: min(medians[f"{of} {name}"] for name in named) / medians["tree"] for of, named in forms.items()}
        more = {"backend": tree.inference_backend(), "environment": environment([1], "cpu")}
        results.extra.setdefault("controls", []).append({**describe(trial), "time_ratios": ratios, **more})


def _in_turn(results: Results, study: PaperStudy) -> None:
    speeds: dict[str, Row] = {str(trial.number): describe(trial) for trial in study.wanted(results)}
    if _timed(results, "speeds").issuperset(map(point_of, speeds.values())):
        return
    calls: dict[str, dict[str, Callable[[], object]]] = {"layer": {}, "model": {}}
    for key, speed in speeds.items():
        made: Any = build(study.arguments(results.trial(int(key)), 0))
        model, tokens = made.task.network.eval(), list[Tensor]()
        layer, batches = _first(model), list(torch.randn(8, BATCH_SIZE, *made.data.in_shape))
        calls["model"][key] = rotating(model, batches)
        speed["backend"] = layer and layer.inference_backend()
        if layer is not None:
            with layer.register_forward_pre_hook(lambda _, args, to=tokens: to.append(args[0])), torch.inference_mode():
                model(batches[0])
            calls["layer"][key] = rotating(layer, [torch.randn_like(tokens[0]) for _ in range(8)])
    dense = dense_of(results)
    assert dense is not None
    for kind, of_kind in calls.items():
        medians = _medians(of_kind, TIMING_S)
        for key, speed in speeds.items():
            mine, base = medians.get(key), medians.get(str(dense.number))
            speed |= {f"{kind}_s": mine, f"{kind}_speedup": mine and base and base / mine}
    where = environment([1], "cpu")
    results.extra["speeds"] = [speed | {"environment": where} for speed in speeds.values()]


def in_language_model(results: Results, study: PaperStudy) -> None:
    """Each contender's first layer on tokens of the validation text, and its model that decodes one, on one thread.

    The weights are those of its longest training, for how many neurons are 0 and which experts are taken depends on
    them. UserError where this tracking store does not have them.
    """
    trials = sorted(study.wanted(results), key=lambda trial: (trial.params["epochs"], trial.number))
    longest: dict[str, Trial] = {trial.params["contender"]: trial for trial in trials}
    speeds: dict[str, Row] = {}
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for key, trial in longest.items():
        run = trial.runs[0]
        made: Any = build(study.arguments(trial, run["seed"]))
        task, layer, tokens = made.task.eval(), _first(made.task), list[Tensor]()
        task.load_state_dict(_trained(run["run_id"]))
        made.data.setup("fit")
        windows = next(iter(made.data.val_dataloader()))[0][:, :TIMED_CONTEXT]
        with torch.inference_mode():
            for size in BATCH_SIZES:
                calls.setdefault(f"model_b{size}", {})[key] = task.timed(windows, size)
            if layer is not None:
                with layer.register_forward_pre_hook(lambda _, args, to=tokens: to.append(args[0])):
                    task(windows)
                mixed = tokens[0].flatten(0, -2)[torch.randperm(windows.numel(), generator=torch.Generator())]
                for size in BATCH_SIZES:
                    calls.setdefault(f"layer_b{size}", {})[key] = rotating(layer, mixed.split(size))
        speeds[key] = {"contender": key, "epochs": trial.params["epochs"]}
        speeds[key]["backend"] = layer and layer.inference_backend()
    for kind, of_kind in calls.items():
        for key, seconds in _medians(of_kind, TIMING_S).items():
            speeds[key][f"{kind}_ms"] = 1e3 * seconds
    where = environment([1], "cpu")
    results.extra["speeds"] = [speed | {"environment": where} for speed in speeds.values()]


def _trained(run_id: str) -> Any:
    return read_checkpoint("run", str(tracking.checkpoint(paths.tracking_uri(), run_id)))["state_dict"]


# trees beside all dense layers, into results.extra["controls"]; all models and their first layers, into "speeds"
MEASURE = {"table1": _beside_dense, "table3": _in_turn}

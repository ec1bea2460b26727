"""`fffexp reproduce conversion`: the layers of a trained vision transformer become trees, and it is not trained again.

Beside each tree stands a dense layer of the tree's inference size, made of the same model in the same way.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fffexp.adapt.distil import convert_feedforward
from fffexp.errors import UserError, refuse
from fffexp.layers import FeedforwardLayer, feedforward_layers
from fffexp.paper.comparisons import compare, in_words, percent, shares
from fffexp.paper.rows import name, note, size
from fffexp.report.tables import table
from fffexp.study.results import Results, Trial
from fffexp.timing import wait_for_timing
from fffexp.training.experiment import BARE, Context, run

SETTING = yaml.safe_load(files("fffexp.paper").joinpath("conversion.yaml").read_text())
MEAN = "mean output"  # in place of the class of the layer: all that is left of it
FEATURES = 128  # of a token; the sizes that are compared do not depend on it


def points(trees: Sequence[str], recipe: str | None) -> list[Trial]:
    """The trained model, the one with mean outputs, and each tree (DEPTHxLEAF) with its control.

    UserError for a tree that cannot be made, or whose control is no smaller than the dense layer.
    """
    dense_width = SETTING["dense_width"]
    found = [_point(training_width=dense_width), Trial(1, "COMPLETE", {"layer": MEAN, "training_width": 0})]
    for text in trees:
        try:
            depth, leaf = map(int, text.split("x"))
            tree = _point(training_width=2**depth * leaf, leaf_width=leaf, depth=depth)
        except ValueError as error:
            raise UserError(f"--trees {text}: give DEPTHxLEAF, such as 4x32 ({error})") from error
        neurons = f"{size(tree)} neurons at inference are no fewer than the {dense_width} of the dense layer"
        refuse((size(tree) >= dense_width, f"--trees {text}: {neurons}: give a smaller tree"))
        found += [tree, _point(training_width=size(tree))]
    for number, trial in enumerate(found):
        trial.number, trial.recipe = number, recipe
    return found


def _point(**params: int) -> Trial:
    layer = _factory(params)(FEATURES, FEATURES)
    return Trial(0, "COMPLETE", {"layer": type(layer).__name__, **params}, sizes=layer.sizes())


def _factory(params: Mapping[str, Any]) -> Callable[[int, int], FeedforwardLayer]:
    kind = resolve_name(SETTING["tree" if "depth" in params else "dense"])
    leaf_width = params.get("leaf_width", params["training_width"])
    return partial(kind.sized, depth=params.get("depth", 0), leaf_width=leaf_width)


def measure(args: list[str], seed: int, trials: Sequence[Trial]) -> None:
    """Train the dense model by the arguments of a fit, convert it to each of `points`, and add a run to each."""
    kept: list[Any] = []  # the task with its best weights, as it was tested, and its data
    keep = LambdaCallback(on_test_end=lambda trainer, task: kept.extend((task.eval(), trainer.datamodule)))
    result = run([*args, f"--seed_everything={seed}"], Context(callbacks=[keep], quiet=True))
    assert result is not None
    (task, data), (dense, mean, *others) = kept, trials
    trained: nn.Module = task.network
    images, batch, steps, lr = (SETTING["distillation"][key] for key in ("images", "batch", "steps", "lr"))
    sample = data.train_data[0][:images].to(task.device)

    def tested(model: nn.Module) -> dict[str, Any]:
        task.network = model
        (found,) = Trainer(devices=1, **BARE).test(task, data, verbose=False)
        return {"seed": seed} | {key: value for key, value in found.items() if key.startswith("test/")}

    metrics = {key: value for key, value in result.metrics.items() if key.startswith(("test/", "val/"))}
    dense.runs.append({"seed": seed, **metrics})
    mean.runs.append(tested(with_mean_outputs(trained, sample)))
    for trial in others:
        torch.manual_seed(seed)
        model = copy.deepcopy(trained)
        with register_module_forward_pre_hook(lambda *_: wait_for_timing()):
            made = convert_feedforward(model, sample.split(batch), _factory(trial.params), steps=steps, lr=lr)
        errors = {"errors": [m.final_error for m in made], "initial_errors": [m.initial_error for m in made]}
        trial.runs.append(tested(model) | errors)
        accuracies = f"{trial.runs[-1]['test/accuracy']:8.2%} of {metrics['test/accuracy']:.2%}"
        print(f"seed {seed}  {name(trial):30}{accuracies}", flush=True)


@torch.no_grad()
def with_mean_outputs(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose feedforward layers give the mean of their outputs on x, whatever they are given."""
    model, means = copy.deepcopy(model).eval(), dict[nn.Module, Tensor]()

    def hook(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        if layer in means:
            return means[layer].expand_as(output)
        means[layer] = output.flatten(0, -2).mean(0)
        return output

    for layer in feedforward_layers(model).values():
        layer.register_forward_hook(hook)
    model(x)
    return model


def report(results: Results) -> str:
    """A row for each converted layer, and whether trees are ahead of their controls."""
    dense, mean, *others = results.trials
    lines = []
    for trial in results.trials:
        mine = trial.by_seed(results.test_monitor).values()
        of_dense, recovered = map(percent, shares(results, trial, dense, mean))
        errors = zip(*(run["errors"] for run in trial.runs if "errors" in run), strict=True)
        lines.append(
            {"layers": name(trial), "width": size(trial, "inference_width"), "size": size(trial)}
            | {"test acc": 100 * sum(mine) / len(mine), "of dense, %": of_dense if trial is not dense else None}
            | {"recovered, %": recovered if trial in others else None}
            | {"error by block": " ".join(f"{sum(part) / len(part):.3f}" for part in errors) or None}
        )
    compared = compare(results, zip(others[::2], others[1::2], strict=True))
    return f"{table(lines, {'test acc': '.2f'})}\n\n{table([*map(in_words, compared)])}\n" + note(
        f"Test accuracy in percent, means of {len(dense.runs)} seeds; the first row was trained. width, size: "
        "neurons at inference, without and with those that route. Each layer was distilled by itself to the "
        "dense layer's outputs; error: mean squared difference over their variance, on images held out. "
        f"{MEAN}: of each layer, whatever its input. recovered: of what the dense layers add to that; both "
        "shares with 95% intervals by Fieller, paired by seed. difference: in points, paired by seed; p: "
        "paired t-test, adjusted for all rows by Benjamini and Hochberg."
    )

"""`fffexp reproduce conversion`: the layers of a trained vision transformer become trees, and it is not trained again.

Beside each tree stands a dense layer of the tree's inference size, made of the same model in the same way.
"""

import copy
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fffexp.adapt.distil import convert_feedforward
from fffexp.adapt.replace import LayerFactory
from fffexp.errors import UserError
from fffexp.layers import FeedforwardLayer
from fffexp.paper.rows import bounds, is_tree, name, note, width
from fffexp.report.tables import table
from fffexp.statistics import format_difference, paired_tests, ratio
from fffexp.study.results import Results, Trial
from fffexp.timing import wait_for_timing
from fffexp.training.experiment import Context, run

SETTING = yaml.safe_load(files("fffexp.paper").joinpath("conversion.yaml").read_text())
MEAN = "mean output"  # in place of the class of the layer: all that is left of it
FEATURES = 128  # of a token; the sizes that are compared do not depend on it


class _Keep(Callback):
    """The task with its best weights, as it was tested, and its data."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.task, self.data = pl_module, trainer.datamodule  # type: ignore[attr-defined] # set by a connector


class Mean(nn.Module):
    """Gives the mean of a layer's outputs on sample data, whatever it is given."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.mean.expand(*x.shape[:-1], -1)


def points(trees: Sequence[str], recipe: str | None) -> list[Trial]:
    """The trained model, the one with mean outputs, and each tree with its control.

    Args:
        trees: DEPTHxLEAF of each.
        recipe: digest of the training.

    Raises:
        UserError: a tree that cannot be made, or whose control is no smaller than the dense layer.
    """
    dense_width = SETTING["dense_width"]
    found = [_point("dense", training_width=dense_width), Trial(1, "COMPLETE", {"layer": MEAN, "training_width": 0})]
    for text in trees:
        try:
            depth, leaf = map(int, text.split("x"))
            tree = _point("tree", training_width=2**depth * leaf, leaf_width=leaf, depth=depth)
        except ValueError as error:
            raise UserError(f"--trees {text}: give DEPTHxLEAF, such as 4x32 ({error})") from error
        size = (tree.sizes or {})["inference_size"]
        if size >= dense_width:
            raise UserError(
                f"--trees {text}: {size} neurons at inference are no fewer than the {dense_width} of the dense layer: "
                "give a smaller tree"
            )
        found += [tree, _point("dense", training_width=size)]
    for number, trial in enumerate(found):
        trial.number, trial.recipe = number, recipe
    return found


def _point(kind: str, **params: int) -> Trial:
    trial = Trial(0, "COMPLETE", {"layer": pkgutil.resolve_name(SETTING[kind]).__name__, **params})
    trial.sizes = factory(trial)(FEATURES, FEATURES).sizes()
    return trial


def factory(trial: Trial) -> Callable[[int, int], FeedforwardLayer]:
    """Makes the layer of a point."""
    if is_tree(trial):
        sizes = {key: trial.params[key] for key in ("depth", "leaf_width")}
        return partial(pkgutil.resolve_name(SETTING["tree"]), **sizes)
    return partial(pkgutil.resolve_name(SETTING["dense"]), width=width(trial))


def measure(args: list[str], seed: int, trials: Sequence[Trial]) -> None:
    """Train the dense model, convert it to each point, and add a run of this seed to each.

    Args:
        args: of the fit of the dense model, without a seed.
        seed: of the training and the conversions.
        trials: as `points` makes them.
    """
    kept = _Keep()
    result = run([*args, f"--seed_everything={seed}"], Context(callbacks=[kept], quiet=True))
    assert result is not None
    task, dense, mean, *others = kept.task.eval(), *trials
    trained: nn.Module = task.get_submodule("network")
    images, batch, steps, lr = (SETTING["distillation"][key] for key in ("images", "batch", "steps", "lr"))
    sample = kept.data.train_data[0][:images].to(task.device)
    metrics = {name: value for name, value in result.metrics.items() if name.startswith(("test/", "val/"))}
    dense.runs.append({"seed": seed, **metrics})
    mean.runs.append({"seed": seed, **_test(kept, with_mean_outputs(trained, sample))})
    for trial in others:
        torch.manual_seed(seed)
        model = copy.deepcopy(trained)
        made = convert_feedforward(model, sample.split(batch), _pausing(factory(trial)), steps=steps, lr=lr)
        errors = {
            "errors": [each.final_error for each in made],
            "initial_errors": [each.initial_error for each in made],
        }
        trial.runs.append({"seed": seed, **_test(kept, model), **errors})
        accuracy = trial.runs[-1]["test/accuracy"]
        print(f"seed {seed}  {name(trial):30}{accuracy:8.2%} of {metrics['test/accuracy']:.2%}", flush=True)


def _test(kept: _Keep, model: nn.Module) -> dict[str, float]:
    task, network = kept.task, kept.task.network
    task.network = model
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    try:
        (found,) = Trainer(devices=1, **quiet).test(task, kept.data, verbose=False)  # type: ignore[arg-type]
    finally:
        task.network = network
    return {key: value for key, value in found.items() if key.startswith("test/")}


@torch.no_grad()
def with_mean_outputs(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose feedforward layers give the mean of their outputs on x, whatever they are given."""
    model = copy.deepcopy(model).eval()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, FeedforwardLayer)}
    means: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, __: object, output: Tensor) -> None:
        means[path] = output.flatten(0, -2).mean(0)

    handles = [layer.register_forward_hook(partial(keep, path)) for path, layer in layers.items()]
    model(x)
    for handle in handles:
        handle.remove()
    for path, mean in means.items():
        model.set_submodule(path, Mean(mean))
    return model


def _pausing(make: LayerFactory) -> LayerFactory:
    """Layers that wait, at each pass, until nobody times."""

    def made(in_features: int, out_features: int) -> FeedforwardLayer:
        layer = make(in_features, out_features)
        layer.register_forward_pre_hook(lambda *_: wait_for_timing())
        return layer

    return made


def report(results: Results) -> str:
    """A row for each converted layer, and whether trees are ahead of their controls."""
    dense, mean, *others = results.trials
    accuracy = {trial.number: trial.by_seed(results.test_monitor) for trial in results.trials}
    whole, least = accuracy[dense.number], accuracy[mean.number]
    lines: list[dict[str, Any]] = []
    for trial in results.trials:
        mine, sizes = accuracy[trial.number], trial.sizes or {"inference_width": 0, "inference_size": 0}
        seeds = sorted(mine)
        line = {"layers": name(trial), "width": sizes["inference_width"], "size": sizes["inference_size"]}
        line["test acc"] = 100 * sum(mine.values()) / len(mine)
        of_dense = ratio([mine[s] for s in seeds], [whole[s] for s in seeds])
        recovered = ratio([mine[s] - least[s] for s in seeds], [whole[s] - least[s] for s in seeds])
        for title, share, there in (
            ("of dense, %", of_dense, trial is not dense),
            ("recovered, %", recovered, trial in others),
        ):
            line[title] = f"{100 * share[0]:.1f} {bounds(share[1], 1, 100)}" if share and there else None
        errors = list(zip(*(run["errors"] for run in trial.runs if "errors" in run), strict=True))
        line["error by block"] = " ".join(f"{sum(part) / len(part):.3f}" for part in errors) or None
        lines.append(line)
    pairs = list(zip(others[::2], others[1::2], strict=True))
    tests = paired_tests([(accuracy[tree.number], accuracy[control.number]) for tree, control in pairs])
    compared = [
        {"tree": name(tree), "control": name(control), "difference": format_difference(test, 100)}
        for (tree, control), test in zip(pairs, tests, strict=True)
    ]
    return f"{table(lines, {'test acc': '.2f'})}\n\n{table(compared)}\n" + note(
        f"Test accuracy in percent, means of {len(whole)} seeds; the first row was trained. width, size: "
        "neurons at inference, without and with those that route. Each layer was distilled by itself to the "
        "dense layer's outputs; error: mean squared difference over their variance, on images held out. "
        f"{MEAN}: of each layer, whatever its input. recovered: of what the dense layers add to that; both "
        "shares with 95% intervals by Fieller, paired by seed. difference: in points, paired by seed; p: "
        "paired t-test, adjusted for all rows by Benjamini and Hochberg."
    )

"""`fffexp reproduce conversion`: the layers of a trained vision transformer become trees, and it is not trained again.

Beside each tree stands a dense layer of the tree's inference size, made of the same model in the same way.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fffexp.adapt.distil import convert_feedforward
from fffexp.adapt.replace import LayerFactory
from fffexp.environment import environment, training_device
from fffexp.errors import UserError
from fffexp.layers import FF, FFF, FeedforwardLayer
from fffexp.paper import runs, table3
from fffexp.paper.cells import Cell
from fffexp.paper.results import load, save
from fffexp.statistics import paired_tests, ratio
from fffexp.timing import wait_for_timing
from fffexp.training.vectorized import EVALUATION_ROWS, Replicas

# Images of the training part that the layers are distilled on.
SAMPLE, BATCH = 8192, 128
STEPS, LR = 2000, 1e-3
CONSTANT = Cell("FF", 0)  # no neurons: its mean output is all that is left of a layer


class Shape(NamedTuple):
    """Of a tree."""

    depth: int
    leaf_width: int

    @property
    def tree(self) -> Cell:
        """The tree itself."""
        return Cell("FFF", 2**self.depth * self.leaf_width, self.leaf_width)

    @property
    def control(self) -> Cell:
        """FF of its inference size."""
        return Cell("FF", self.tree.inference_size)

    def check(self) -> None:
        """Raise UserError, before anything is trained, if the tree cannot be made or its control is no smaller."""
        name = f"--trees {self.depth}x{self.leaf_width}"
        if self.control.training_width >= table3.WIDTH:
            told = f"{self.depth} + {self.leaf_width} neurons at inference are no fewer than the {table3.WIDTH} of FF"
            raise UserError(f"{name}: {told}: give a smaller tree")
        try:
            FFF(table3.FEATURES, table3.FEATURES, self.depth, self.leaf_width)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


def measure(data: str, shapes: Sequence[Shape], seeds: Sequence[int], path: Path | None) -> dict[str, Any]:
    """Train an FF model for each seed, and convert it to each shape; seeds that the file has are left.

    Args:
        data: a name of DATA.
        shapes: of the trees.
        seeds: one model each.
        path: where each seed is written when it is done.

    Raises:
        UserError: the file is of another measurement, of another recipe, or of other trees; or a tree is too large.
    """
    for shape in shapes:
        shape.check()
    how = table3.training(table3.DENSE, data)
    distillation = {"images": SAMPLE, "batch": BATCH, "steps": STEPS, "lr": LR}
    setting: dict[str, Any] = {"conversion": "ViT", "data": data, "recipe": how.recipe(), "distillation": distillation}
    setting |= {"shapes": [list(shape) for shape in shapes], "constant": True}  # an earlier version had no such model
    found = load(path, setting) or {**setting, "environments": [], "runs": []}
    have = {run["seed"] for run in found["runs"]}
    missing = [seed for seed in seeds if seed not in have]
    where = environment([torch.get_num_threads()], training_device())
    if missing and where not in found["environments"]:
        found["environments"].append(where)
    for seed in missing:
        replicas = Replicas(how.args, [seed])
        (dense,) = replicas.train(*how[1:])
        (own,) = replicas.data
        assert dense.test_accuracy is not None
        x, y = own.test_data
        sample = own.train_data[0][:SAMPLE]
        new = [_run(table3.DENSE, seed, dense.test_accuracy)]
        new.append(_run(CONSTANT, seed, _accuracy(without_neurons(replicas.task.network, sample), x, y)))
        for cell in dict.fromkeys(cell for shape in shapes for cell in (shape.tree, shape.control)):
            torch.manual_seed(seed)
            model, factory = copy.deepcopy(replicas.task.network).eval(), table3.layer_factory(cell)
            assert factory is not None
            made = convert_feedforward(model, sample.split(BATCH), _pausing(factory), steps=STEPS, lr=LR)
            accuracy = _accuracy(model, x, y)
            new.append(
                _run(cell, seed, accuracy, [each.final_error for each in made], [each.initial_error for each in made])
            )
            print(f"seed {seed}  {_name(cell):22}{accuracy:8.2%} of {dense.test_accuracy:.2%}", flush=True)
        found["runs"] += new
        save(path, found)
    return found


@torch.no_grad()
def without_neurons(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose FF layers give the mean of their outputs on x, whatever they are given."""
    model = copy.deepcopy(model).eval()
    means: dict[nn.Linear, Tensor] = {}

    def keep(linear: nn.Linear, _: object, output: Tensor) -> None:
        means[linear] = output.flatten(0, -2).mean(0)

    handles = [m.network[-1].register_forward_hook(keep) for m in model.modules() if isinstance(m, FF)]
    model(x)
    for handle in handles:
        handle.remove()
    for linear, mean in means.items():
        linear.weight.zero_()
        linear.bias.copy_(mean)
    return model


def _pausing(factory: LayerFactory) -> LayerFactory:
    """Layers that wait, at each pass, until nobody times."""

    def make(in_features: int, out_features: int) -> FeedforwardLayer:
        layer = factory(in_features, out_features)
        layer.register_forward_pre_hook(lambda *_: wait_for_timing())
        return layer

    return make


def _run(
    cell: Cell, seed: int, accuracy: float, errors: Sequence[float] = (), starts: Sequence[float] = ()
) -> dict[str, Any]:
    return {**asdict(cell), "seed": seed, "test_accuracy": accuracy, "errors": list(errors), "starts": list(starts)}


@torch.inference_mode()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = 0
    for rows, labels in zip(x.split(EVALUATION_ROWS // 16), y.split(EVALUATION_ROWS // 16), strict=True):
        right += int((model(rows).argmax(1) == labels).sum())
    return right / len(y)


def _name(cell: Cell) -> str:
    return f"FF of {cell.training_width}" if cell.layer == "FF" else f"FFF {cell.blocks} leaves of {cell.leaf_width}"


def _of(found: Mapping[str, Any], cell: Cell, key: str = "test_accuracy") -> dict[int, Any]:
    return {run["seed"]: run[key] for run in found["runs"] if Cell.of(run) == cell}


def report(found: Mapping[str, Any]) -> str:
    """A line for each converted layer, and whether trees are ahead of their controls."""
    dense, constant = _of(found, table3.DENSE), _of(found, CONSTANT)
    shapes = [Shape(*shape) for shape in found["shapes"]]
    lines = [
        f"{'layers':22}{'width':>6}{'size':>6}{'accuracy':>10}{'of dense, %':>13}{'95% interval':>18}"
        f"{'recovered, %':>14}{'95% interval':>18}  error by block",
        f"{'FF of 128, trained':22}{table3.WIDTH:6}{table3.WIDTH:6}{_mean_of(dense):10.2f}",
    ]
    for cell in (CONSTANT, *(cell for shape in shapes for cell in (shape.tree, shape.control))):
        mine, errors = _of(found, cell), _of(found, cell, "errors")
        seeds = sorted(mine)
        kept = ratio([mine[seed] for seed in seeds], [dense[seed] for seed in seeds])
        gain, whole = ([of[seed] - constant[seed] for seed in seeds] for of in (mine, dense))
        recovered = None if cell == CONSTANT else ratio(gain, whole)
        by_block = " ".join(f"{sum(part) / len(part):.3f}" for part in zip(*errors.values(), strict=True))
        width = cell.leaf_width or cell.training_width
        start = f"{_name(cell):22}{width:6}{cell.inference_size:6}{_mean_of(mine):10.2f}"
        lines.append(f"{start}{table3.told(kept, 13, 18)}{table3.told(recovered, 14, 18)}  {by_block}".rstrip())
    tests = paired_tests([(_of(found, shape.tree), _of(found, shape.control)) for shape in shapes])
    lines.append("")
    for shape, test in zip(shapes, tests, strict=True):
        lines.append(f"{_name(shape.tree)} - {_name(shape.control)}: {runs.difference(test)}")
    lines.append(
        f"Test accuracy in percent, means of {len(dense)} seeds. width, size: neurons at inference,\n"
        "without and with those that decide. Each layer was distilled by itself to the dense layer's outputs; error:\n"
        "mean squared difference over their variance, on images held out. FF of 0: each layer gives its mean output.\n"
        "recovered: of what the dense layers add to that; both shares by Fieller, paired by seed. p: paired t-test,\n"
        "adjusted for all lines by Benjamini and Hochberg."
    )
    return "\n".join(lines)


def _mean_of(by_seed: Mapping[int, float]) -> float:
    return 100 * sum(by_seed.values()) / len(by_seed)

"""`fffexp reproduce table3`: layers in the blocks of a vision transformer (arXiv 2308.14711, section 4.4).

Beside the accuracy that an FFF keeps stands what it recovers of the gap between no feedforward layers at all and FF.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fffexp.adapt.replace import LayerFactory
from fffexp.environment import environment
from fffexp.layers import FF, FFF, FeedforwardLayer, NoisyTopKMoE
from fffexp.models import ViT
from fffexp.paper import runs
from fffexp.paper.cells import CONFIGS, DATA, PATCHES, Cell, K
from fffexp.paper.paper import printed3
from fffexp.paper.results import save
from fffexp.statistics import Interval, Paired, paired_tests, ratio
from fffexp.timing import exclusive_timing, interleaved, rotating

WIDTH, EXPERT_WIDTH, FEATURES = 128, 16, 128
SHAPES = {"fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
DENSE, NOTHING = Cell("FF", WIDTH), Cell("none", 0)
BATCH_SIZE = 256
TIMING_S = 60.0  # for all models, and for all layers: a few rounds of models of 70 ms do not order them
BLOCKS = 4  # the paper's


def controls(tree: Cell) -> tuple[Cell, Cell, Cell]:
    """FF of its size at inference, FF of its leaf width, and none."""
    return Cell("FF", tree.inference_size), Cell("FF", tree.leaf_width or 0), NOTHING


def cells(leaf_widths: Sequence[int]) -> list[Cell]:
    """FF, none, for each leaf width an FFF with its controls, and a MoE.

    Raises:
        UserError: a leaf width that 128 neurons do not make a power of 2 of.
    """
    trees = [Cell("FFF", WIDTH, leaf_width) for leaf_width in sorted(leaf_widths, reverse=True)]
    narrow = {control for tree in trees for control in controls(tree)} - {DENSE, NOTHING}
    dense = sorted(narrow, key=lambda cell: -cell.training_width)
    return [DENSE, NOTHING, *trees, Cell("NoisyTopKMoE", WIDTH, EXPERT_WIDTH), *dense]


def training(cell: Cell, data: str, blocks: int = BLOCKS, epochs: int | None = None) -> runs.Training:
    """Of a cell; the epochs are the recipe's unless given."""
    pieces = ("model/one_cycle", "model/vit", "recipe/vit")
    args = [*DATA[data], *(f"--config={CONFIGS}/{piece}.yaml" for piece in pieces), *cell.layer_arguments()]
    args += [f"--model.network.init_args.{name}" for name in (f"patch_size={PATCHES[data]}", f"num_blocks={blocks}")]
    if cell.layer == "FFF":
        args.append(f"--config={CONFIGS}/recipe/vit_fff.yaml")
    if cell.layer == "NoisyTopKMoE":
        args.append("--model.aux_weights.importance=0.1")
    if epochs is not None:
        args.append(f"--trainer.max_epochs={epochs}")
    return runs.Training(args, train_accuracy=False)


def measure(
    data: str,
    blocks: int,
    epochs: int | None,
    wanted: Sequence[Cell],
    seeds: Sequence[int],
    jobs: int,
    path: Path | None,
) -> dict[str, Any]:
    """The table; what the file has is not trained again, and each seed is written when it is done.

    Args:
        data: a name of DATA.
        blocks: of the transformer.
        epochs: of a training; those of the recipe if None.
        wanted: cells.
        seeds: of every cell.
        jobs: processes.
        path: where the table is written.

    Raises:
        UserError: the file is of another measurement.
    """
    setting = {"table": "table3", "data": data, "blocks": blocks, "epochs": epochs}
    found = runs.begin(path, setting, lambda cell: training(cell, data, blocks, epochs))
    found.setdefault("speeds", [])
    have = {Cell.of(speed) for speed in found["speeds"]}
    if not have.issuperset(wanted):
        found["speeds"] = _speeds(data, blocks, [*wanted, *have.difference(wanted)])  # all in turn, to be compared
        save(path, found)
    how = {cell: training(cell, data, blocks, epochs) for cell in wanted}
    runs.complete(found, how, seeds, jobs, path, lambda cell: in_paper(cell, data, blocks), together=False)
    return found


def in_paper(cell: Cell, data: str, blocks: int = BLOCKS) -> dict[str, float]:
    """What is printed of a cell, by metric; the table is of CIFAR10 and of 4 blocks alone."""
    printed = (data, blocks) == ("cifar10", BLOCKS) and cell in (DENSE, *cells([32, 16, 8, 4, 2, 1])[2:8])
    return printed3(cell.leaf_width) if printed else {}


def layer_factory(cell: Cell) -> LayerFactory | None:
    """That makes the layer of a cell; None for none."""
    if cell.layer == "FF":
        return partial(FF, width=cell.training_width)
    if cell.layer == "FFF":
        return partial(FFF, depth=cell.depth or 0, leaf_width=cell.leaf_width or 1)
    if cell.layer == "NoisyTopKMoE":
        return partial(NoisyTopKMoE, num_experts=cell.blocks, expert_width=cell.leaf_width or 1, top_k=K)
    return None


def _speeds(data: str, blocks: int, wanted: Sequence[Cell]) -> list[dict[str, Any]]:
    """Sizes of a layer, and medians of the layer's and the model's inference, all in turn, over those of FF."""
    models = {
        cell: ViT(layer_factory(cell), SHAPES[data], 10, PATCHES[data], FEATURES, blocks).eval()
        for cell in {DENSE, *wanted}
    }
    tokens = 1 + SHAPES[data][1] * SHAPES[data][2] // PATCHES[data] ** 2
    layers: dict[Cell, FeedforwardLayer] = {
        cell: next(module for module in model.modules() if isinstance(module, FeedforwardLayer))
        for cell, model in models.items()
        if cell != NOTHING
    }
    with exclusive_timing(), torch.inference_mode():
        model_s = _medians(models, torch.randn(8, BATCH_SIZE, *SHAPES[data]))
        layer_s = _medians(layers, torch.randn(8, BATCH_SIZE * tokens, FEATURES))
    where = environment([1], "cpu")
    return [
        {
            **cell.describe(),
            "sizes": layers[cell].sizes() if cell in layers else None,
            "backend": layers[cell].inference_backend() if cell in layers else None,
            "layer_s": layer_s.get(cell),
            "model_s": model_s[cell],
            "layer_speedup": layer_s[DENSE] / layer_s[cell] if cell in layers else None,
            "model_speedup": model_s[DENSE] / model_s[cell],
            "environment": where,
        }
        for cell in wanted
    ]


def _medians(modules: Mapping[Cell, nn.Module], batches: torch.Tensor) -> dict[Cell, float]:
    named = {str(index): rotating(module, batches) for index, module in enumerate(modules.values())}
    seconds = interleaved(named, TIMING_S, threads=1)
    return {cell: statistics.median(seconds[name]) for cell, name in zip(modules, named, strict=True)}


def kept(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired by seed, for each cell: its accuracy over FF's, and what it closes of the gap from none to FF."""
    made = []
    dense, nothing = _accuracies(found, DENSE), _accuracies(found, NOTHING)
    for cell in runs.cells(found):
        mine = _accuracies(found, cell)
        both = sorted(mine.keys() & dense.keys() & nothing.keys())
        made.append(
            {
                **cell.describe(),
                "ratio": ratio([mine[s] for s in both], [dense[s] for s in both]),
                "recovered": ratio([mine[s] - nothing[s] for s in both], [dense[s] - nothing[s] for s in both]),
            }
        )
    return made


def comparisons(found: Mapping[str, Any]) -> list[tuple[Cell, Cell, Paired]]:
    """Test accuracy of each FFF less that of each of its controls with a seed in common, paired by seed."""
    of = {cell: _accuracies(found, cell) for cell in runs.cells(found)}
    pairs = [
        (tree, control)
        for tree in of
        if tree.layer == "FFF"
        for control in dict.fromkeys(controls(tree))
        if of[tree].keys() & of.get(control, {}).keys()
    ]
    tests = paired_tests([(of[tree], of[control]) for tree, control in pairs])
    return [(*pair, test) for pair, test in zip(pairs, tests, strict=True)]


def _accuracies(found: Mapping[str, Any], cell: Cell) -> dict[int, float]:
    return {run["seed"]: run["test_accuracy"] for run in runs.of(found, cell)}


def report(found: Mapping[str, Any]) -> str:
    """Accuracies, then what is kept of them at which size and speed."""
    rows = [runs.line(row) for row in found["cells"] if row["metric"] == "G_A"]
    head = f"{'layer':13}{'w':>5}{'leaf':>5}{'width':>8}{'size':>8}{'of FF, %':>10}{'95% interval':>18}"
    lines = [head + f"{'recovered, %':>14}{'95% interval':>20}{'layer x':>9}{'model x':>9}"]
    speeds = {Cell.of(speed): speed for speed in found["speeds"]}
    for each in kept(found):
        speed = speeds[Cell.of(each)]
        sizes = speed["sizes"] or {"inference_width": 0, "inference_size": 0}
        shares = "".join(f"{sizes[name] / WIDTH:8.1%}" for name in ("inference_width", "inference_size"))
        start = f"{each['layer']:13}{each['training_width']:5}{each['leaf_width'] or '':>5}{shares}"
        layer = "" if speed["layer_speedup"] is None else f"{speed['layer_speedup']:.2f}"
        kept_of = told(each["ratio"], 10, 18) + told(each["recovered"], 14, 20)
        lines.append(f"{start}{kept_of}{layer:>9}{speed['model_speedup']:9.2f}")
    lines.append(
        f"width, size: neurons at inference over the {WIDTH} of FF, without and with those that decide. of FF:\n"
        "accuracy over that of FF; recovered: share of the gap between no feedforward layers and FF, empty where\n"
        "there is none to speak of; intervals by Fieller, paired by seed. layer x, model x: speedup over FF of a\n"
        f"layer on the tokens of {BATCH_SIZE} images and of the model ({found['blocks']} blocks, the last with one\n"
        "row an image), one thread."
    )
    tested = [
        f"FFF with leaves of {tree.leaf_width} - {control.layer}"
        + (f" of {control.training_width}" if control != NOTHING else "")
        + f": {runs.difference(test)}  ({test.seeds} seeds)"
        for tree, control, test in comparisons(found)
        if test.p is not None
    ]
    if tested:
        tested.append("Test accuracy in points, paired by seed. p: paired t-test, adjusted for these lines.")
    parts = ([runs.HEADER, *rows, runs.LEGEND], lines, tested)
    return "\n\n".join("\n".join(part) for part in parts if part)


def told(found: tuple[float, Interval] | None, width: int, interval_width: int) -> str:
    """A share in percent and its interval, each in a column of that many characters; blank without one."""
    if found is None:
        return " " * (width + interval_width)
    share, (low, high) = found
    return f"{100 * share:{width}.1f}" + f"[{100 * low:.1f}, {100 * high:.1f}]".rjust(interval_width)

"""Trained MLPs to trees: the layers begin from the dense weights and are distilled on sample data, one by one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fffexp.layers import FF, FFF, FeedforwardLayer
from fffexp.models.mlp import LayerFactory
from fffexp.regularization import harden, weighted_losses
from fffexp.replace import MLP, Replacement, Select, find_mlps, put
from fffexp.schedules import Exponential

BATCH_SIZE = 256
HELD_OUT = 0.1  # of the rows
# Rows that neurons are selected on.
SELECTION_ROWS = 4096
# Softer choices at first would undo what the nodes and leaves begin with.
CHOICE_SCALE = Exponential(10.0, 300.0)
# The halves of a tree that is planted are even, and only have to stay so.
BALANCE = {"importance": 0.01}
RIDGE = 1e-3  # of the mean square of what is regressed on


@dataclass(frozen=True)
class Conversion(Replacement):
    """A layer that took the place of a trained MLP.

    Attributes:
        error: mean squared difference to the MLP's output on rows held out, over the variance of that; decided hard.
        start: the same before distillation.
    """

    error: float
    start: float


class _Rows(NamedTuple):
    """What one MLP sees and does: (rows, in), (rows, hidden), (rows, out)."""

    inputs: Tensor
    hidden: Tensor
    outputs: Tensor


def convert_feedforward(
    model: nn.Module,
    batches: Iterable[Any],
    layer_factory: LayerFactory,
    select: Select | None = None,
    steps: int = 2000,
    lr: float = 1e-3,
) -> list[Conversion]:
    """Replace the MLPs of a trained model by layers that do nearly the same.

    A tree's nodes split the inputs in halves along what tells most about the outputs; a leaf takes those neurons of
    the MLP that explain most of the outputs of its half, and an output weight that is fitted to them. All is then
    trained to give the MLP's outputs, with choices that harden. An FF takes neurons in the same way; other layers,
    and all in the place of gated MLPs, begin from their own initialisation.

    Args:
        model: in the state to be kept; its layers are replaced.
        batches: inputs to run it on: a tensor, a tuple of arguments or a mapping of keywords each. All rows (tokens)
            are held in memory.
        layer_factory: (in_features, out_features) -> layer, with the model's activation.
        select: as in `replace_feedforward`.
        steps: of distillation, for each layer; 0 leaves the layers as initialised.
        lr: of AdamW, warmed up and down.

    Returns:
        A conversion for each MLP.

    Raises:
        ValueError: there is no MLP, none that is selected, or no row of data.
    """
    mlps = find_mlps(model, select)
    seen = _watch(model, mlps, batches)
    made = []
    for mlp, rows in zip(mlps, seen, strict=True):
        replacement = put(mlp, layer_factory)
        layer = replacement.new
        mode = layer.training
        kept = int(len(rows.inputs) * (1 - HELD_OUT))
        train, held_out = (_Rows(*(part[of] for part in rows)) for of in (slice(kept), slice(kept, None)))
        _initialise(layer, mlp, train)
        start = _error(layer, held_out)
        _distil(layer, train, steps, lr)
        made.append(Conversion(**vars(replacement), error=_error(layer, held_out), start=start))
        layer.train(mode)
    return made


@torch.no_grad()
def _watch(model: nn.Module, mlps: list[MLP], batches: Iterable[Any]) -> list[_Rows]:
    """Shuffled rows of each MLP."""
    seen: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = [([], [], []) for _ in mlps]
    handles = []
    for mlp, (inputs, hidden, outputs) in zip(mlps, seen, strict=True):

        def up(module: nn.Module, args: Any, output: Tensor, to: list[Tensor] = inputs) -> None:
            to.append(args[0].flatten(0, -2))

        def down(
            module: nn.Module, args: Any, output: Tensor, to: tuple[list[Tensor], list[Tensor]] = (hidden, outputs)
        ) -> None:
            to[0].append(args[0].flatten(0, -2))
            to[1].append(output.flatten(0, -2))

        handles += [mlp.up[0].module.register_forward_hook(up), mlp.down.module.register_forward_hook(down)]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, tuple | list) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    found = []
    for mlp, parts in zip(mlps, seen, strict=True):
        if not parts[0]:
            raise ValueError(f"no data reached {mlp.name or 'the MLP'}: give batches that the model runs on")
        rows = _Rows(*(torch.cat(part) for part in parts))
        order = torch.randperm(len(rows.inputs))
        found.append(_Rows(*(part[order] for part in rows)))
    return found


@torch.no_grad()
def _initialise(layer: FeedforwardLayer, mlp: MLP, rows: _Rows) -> None:
    if len(mlp.up) > 1:  # a gated neuron is no neuron of ours
        if isinstance(layer, FFF):
            _plant(layer, rows)
        return
    weight, bias = mlp.up[0].weights()
    if isinstance(layer, FF):
        chosen, output_weight, output_bias = _neurons(rows, layer.width)
        w1, b1, w2, b2 = layer.network.parameters()
        w1[: len(chosen)], b1[: len(chosen)] = weight[chosen], bias[chosen]
        w2.zero_()
        w2[:, : len(chosen)] = output_weight.T
        b2.copy_(output_bias)
    elif isinstance(layer, FFF):
        leaf_B = _plant(layer, rows)
        leaves = layer.leaves
        for leaf in range(layer.blocks):
            mine = leaf_B == leaf
            if not mine.any():
                continue
            chosen, output_weight, output_bias = _neurons(_Rows(*(part[mine] for part in rows)), layer.leaf_width)
            leaves.hidden_weight[leaf, : len(chosen)] = weight[chosen]
            leaves.hidden_bias[leaf, : len(chosen)] = bias[chosen]
            leaves.output_weight[leaf] = 0
            leaves.output_weight[leaf, : len(chosen)] = output_weight
            leaves.output_bias[leaf] = output_bias


def _plant(tree: FFF, rows: _Rows) -> Tensor:
    """Set the nodes; (rows,) leaf of each row."""
    node_B = torch.zeros(len(rows.inputs), dtype=torch.long, device=rows.inputs.device)
    for node in range(tree.blocks - 1):
        mine = (node_B == node).nonzero().squeeze(1)
        if len(mine) > 1:
            x, y = rows.inputs[mine].double(), rows.outputs[mine].double()
            centre = x.mean(0)
            y = y - y.mean(0)
            _, _, directions = torch.pca_lowrank(y, q=1, center=False)
            weight = _ridge(x - centre, y @ directions[:, :1]).squeeze(1)
            score = (x - centre) @ weight
            spread = score.std().clamp_min(1e-12)
            tree.node_weight[node] = weight / spread
            tree.node_bias[node] = -(centre @ weight + score.median()) / spread
        logits = rows.inputs[mine] @ tree.node_weight[node] + tree.node_bias[node]
        node_B[mine] = 2 * node + 1 + (logits >= 0)
    return node_B - (tree.blocks - 1)


def _neurons(rows: _Rows, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which neurons explain most of the outputs, greedily; (chosen,), (chosen, out), (out,) weights that fit them."""
    hidden, outputs = (part[:SELECTION_ROWS].double() for part in (rows.hidden, rows.outputs))
    means = hidden.mean(0), outputs.mean(0)
    hidden, outputs = hidden - means[0], outputs - means[1]
    left, residual = hidden.clone(), outputs
    chosen: list[int] = []
    for _ in range(min(count, hidden.shape[1])):
        length = left.square().sum(0)
        # what each neuron, less what those before it say, explains of the rest
        gain = (left.T @ residual).square().sum(1) / length.clamp_min(1e-9)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        direction = left[:, best : best + 1] / length[best].clamp_min(1e-9).sqrt()
        residual = residual - direction @ (direction.T @ residual)
        left = left - direction @ (direction.T @ left)
    weight = _ridge(hidden[:, chosen], outputs)
    return torch.tensor(chosen), weight, means[1] - means[0][chosen] @ weight


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """(rows, a), (rows, b) -> (a, b)."""
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-9))
    return torch.linalg.solve(gram, x.T @ y)


def _distil(layer: FeedforwardLayer, rows: _Rows, steps: int, lr: float) -> None:
    harden(layer, 1.0)
    if not steps:
        return
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    variance = rows.outputs.var(0).mean()
    layer.train()
    for step in range(steps):
        harden(layer, step / steps, CHOICE_SCALE)
        some = torch.randint(len(rows.inputs), (BATCH_SIZE,))
        optimizer.zero_grad()
        loss = (layer(rows.inputs[some]) - rows.outputs[some]).square().mean() / variance
        (loss + weighted_losses([layer], BALANCE)).backward()
        layer.routing = None
        optimizer.step()
        schedule.step()
    harden(layer, 1.0)


@torch.no_grad()
def _error(layer: FeedforwardLayer, rows: _Rows) -> float:
    outputs = layer.eval()(rows.inputs)
    return float((outputs - rows.outputs).square().mean() / rows.outputs.var(0).mean())

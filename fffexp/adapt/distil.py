"""Trained MLPs to trees: the layers begin from the dense weights and are distilled on sample data, one by one."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fffexp.adapt.replace import MLP, LayerFactory, Replacement, Select, build, find_mlps, put
from fffexp.layers import FF, FFF, FeedforwardLayer
from fffexp.training.losses import anneal, weighted_aux_losses
from fffexp.training.schedules import Exponential

BATCH_SIZE = 256
HELD_OUT = 0.1  # of the rows
# Rows that neurons are selected on.
SELECTION_ROWS = 4096
# Softer choices at first would undo what the nodes and leaves begin with.
INVERSE_TEMPERATURE = Exponential(10.0, 300.0)
# The halves of a tree that is planted are even, and only have to stay so.
BALANCE = {"importance": 0.01}
RIDGE = 1e-3  # of the mean square of what is regressed on
# That a model's MLPs may have, beside the one of the layer that they are converted to.
ACTIVATIONS = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(), nn.ELU(), nn.ReLU6())
# Another is told when it explains the outputs so many times better: rounding is common to all.
BETTER = 10
ALIKE = 1e-4  # of the variance: the two forms of GELU
ACTIVATION_ROWS = 1000  # that they are compared on


@dataclass(frozen=True)
class Conversion(Replacement):
    """A layer that took the place of a trained MLP.

    Attributes:
        error: mean squared difference to the MLP's output on batches held out, over the variance of that; decided hard.
        start: the same before distillation.
    """

    error: float
    start: float


class _Rows(NamedTuple):
    """What one MLP is given and makes of it: (rows, in), (rows, out)."""

    inputs: Tensor
    outputs: Tensor

    def of(self, which: Tensor | slice) -> "_Rows":
        return _Rows(self.inputs[which], self.outputs[which])

    def sample(self) -> "_Rows":
        return self.of(torch.randperm(len(self.inputs), device=self.inputs.device)[:SELECTION_ROWS])

    def variance(self) -> Tensor:
        """Of the outputs; 1 where they do not vary, so that errors can be divided by it."""
        found = self.outputs.var(0).mean()
        return torch.where(found > 0, found, 1.0)


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
    the MLP that explain most of the outputs of its part, and output weights that are fitted to them. All is then
    trained to give the MLP's outputs, with choices that harden. An FF takes neurons in the same way. In the place of a
    gated MLP, whose neurons are of another kind, leaves and FF keep their own hidden weights and get output weights in
    the same way. Other layers begin from their own initialisation. There is a warning where after the steps the error
    is no less than that of a constant.

    Args:
        model: in the state to be kept; its layers are replaced when all are ready.
        batches: inputs to run it on: a tensor, a tuple of arguments or a mapping of keywords each. All rows (tokens)
            are held in memory; those that `attention_mask` or `src_key_padding_mask` of a mapping leave out are not
            looked at; in nn.TransformerDecoderLayer, and in what is called decoder beside an encoder, it is those that
            `decoder_attention_mask` or `tgt_key_padding_mask` leave out. The last batches, as near a tenth of the rows
            as whole batches allow, are held out.
        layer_factory: (in_features, out_features) -> layer, with the model's activation, or what the layer begins with
            does not fit; there is a warning where the model's is one of torch's common ones.
        select: as in `replace_feedforward`.
        steps: of distillation, for each layer; 0 leaves the layers as initialised.
        lr: of AdamW, warmed up and down.

    Returns:
        A conversion for each MLP.

    Raises:
        ValueError: there is no MLP, none that is selected, data that is too little, not finite or no list of batches,
            or a layer whose gradients are sparse.
    """
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"batches is a {type(batches).__name__}: give a list of batches")
    mlps = find_mlps(model, select)
    ready: list[tuple[MLP, FeedforwardLayer, float, float]] = []
    warned = False
    for mlp, (train, held_out) in zip(mlps, _watch(model, mlps, batches), strict=True):
        layer = build(mlp, layer_factory)
        if layer.sparse_gradients:
            raise ValueError(f"a {type(layer).__name__} with sparse gradients cannot be distilled: leave out sparse")
        mode, dtype = layer.training, next(layer.parameters()).dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        train, held_out = (_Rows(*(part.to(next(layer.parameters()).dtype) for part in of)) for of in (train, held_out))
        _initialise(layer, mlp, train)
        if not warned and (told := _other_activation(layer, mlp, train)):
            warnings.warn(told, stacklevel=2)
            warned = True
        start = _error(layer, held_out)
        _distil(layer, train, steps, lr)
        error = _error(layer, held_out)
        if steps and not error < 1:  # or not a number
            told = f"the layer in the place of {mlp.name or 'the MLP'} has an error of {error:.3g}, a constant has 1"
            warnings.warn(f"{told}: give more steps, or another layer", stacklevel=2)
        ready.append((mlp, layer, start, error))
        layer.to(dtype).train(mode)
    return [Conversion(**vars(put(mlp, layer)), start=start, error=error) for mlp, layer, start, error in ready]


@torch.no_grad()
def _watch(model: nn.Module, mlps: list[MLP], batches: Iterable[Any]) -> list[tuple[_Rows, _Rows]]:
    """For each MLP the rows of most batches, and those of the rest."""
    seen: list[list[_Rows]] = [[] for _ in mlps]
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    decoders = [
        isinstance(mlp.module, nn.TransformerDecoderLayer)
        or (names >= {"encoder", "decoder"} and "decoder" in mlp.name.split("."))
        for mlp in mlps
    ]
    sequence_first = any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())
    with _recording(model, mlps) as calls:
        for batch in batches:
            for call in calls:
                call.clear()
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, tuple | list) else model(batch)
            for call, of, decoder in zip(calls, seen, decoders, strict=True):
                if call:  # an MLP that is called twice sees both
                    kept_BT = _kept(batch, decoder) if isinstance(batch, Mapping) else None
                    both = ([_rows(each[i], kept_BT, sequence_first) for each in call] for i in range(2))
                    of.append(_Rows(*map(torch.cat, both)))
    return [_split(mlp.name, of) for mlp, of in zip(mlps, seen, strict=True)]


def _split(name: str, batches: list[_Rows]) -> tuple[_Rows, _Rows]:
    """What is trained on, and what is held out."""
    name = name or "the MLP"
    if not batches:
        raise ValueError(f"no data reached {name}: give batches that the model runs on")
    rows = _Rows(*map(torch.cat, zip(*batches, strict=True)))
    if not all(part.isfinite().all() for part in rows):
        raise ValueError(
            f"{name} is given or makes values that are not finite: leave out the batches that lead to them"
        )
    count = len(rows.inputs)
    tenth = round(HELD_OUT * count)
    # of the last batch, of the last two, ...
    ends = [end for end in accumulate(len(batch.inputs) for batch in reversed(batches)) if 2 <= end <= count - 2]
    held_out = min(ends, key=lambda end: abs(end - tenth), default=tenth)  # one batch can only be cut
    if not 2 <= held_out <= count - 2:
        raise ValueError(f"{count} rows are too little data for {name}: give more of it")
    return rows.of(slice(count - held_out)), rows.of(slice(count - held_out, None))


def _kept(batch: Mapping[str, Any], decoder: bool) -> Tensor | None:
    """(batch, tokens) those that are no padding, if the batch says so."""
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is not None:
        return torch.as_tensor(mask != 0)
    mask = batch.get("tgt_key_padding_mask" if decoder else "src_key_padding_mask")
    if mask is not None:  # bool, or float, which is added to the attention's logits
        return torch.as_tensor(mask == 0)
    return None


def _rows(x: Tensor, kept_BT: Tensor | None, sequence_first: bool) -> Tensor:
    """(..., features) -> (rows, features), without padding where x has a row for each token."""
    flat = x.flatten(0, -2)
    if kept_BT is None or kept_BT.numel() != len(flat):  # a head has a row for each sequence
        return flat
    if x.shape[:-1] == kept_BT.shape[::-1] and (sequence_first or x.shape[:-1] != kept_BT.shape):
        kept_BT = kept_BT.mT
    return flat[kept_BT.flatten()]


@contextmanager
def _recording(model: nn.Module, mlps: list[MLP]) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """What each MLP is given and makes, call by call, in evaluation and on torch's plain path."""
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in mlps]
    handles = []
    for mlp, call in zip(mlps, calls, strict=True):
        given: list[Tensor] = []

        def up(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, given: list[Tensor] = given) -> None:
            given[:] = [args[0].clone()]

        def down(
            module: nn.Module,
            args: tuple[Tensor, ...],
            output: Tensor,
            given: list[Tensor] = given,
            call: list[tuple[Tensor, Tensor]] = call,
        ) -> None:
            call.append((given[0], output.clone()))

        handles += [mlp.up[0].module.register_forward_hook(up), mlp.down.module.register_forward_hook(down)]
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it goes past the modules
    model.eval()
    try:
        yield calls
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _other_activation(layer: FeedforwardLayer, mlp: MLP, rows: _Rows) -> str | None:
    """What to say if neurons of the MLP are taken to a layer with another activation."""
    if not isinstance(layer, FF | FFF) or mlp.gated:  # takes none of its neurons
        return None
    own = layer.network[1] if isinstance(layer, FF) else layer.leaves.hidden[0]
    some = rows.of(slice(None, None, 1 + len(rows.inputs) // ACTIVATION_ROWS))
    w1, b1, w2, b2 = (part.to(some.inputs.dtype) for linear in (mlp.up[0], mlp.down) for part in linear.weights())

    def error(activation: nn.Module) -> float:
        outputs = activation(some.inputs @ w1.T + b1) @ w2.T + b2
        return float((outputs - some.outputs).square().mean() / some.variance())

    nearest = min(ACTIVATIONS, key=error)
    if error(own) < BETTER * max(error(nearest), ALIKE):
        return None
    return (
        f"the activation of {mlp.name or 'the MLP'} is {nearest}, that of its {type(layer).__name__} is {own}, for"
        f" which the MLP's neurons are a poor start: give the layer activation=nn.{type(nearest).__name__}"
    )


@torch.no_grad()
def _initialise(layer: FeedforwardLayer, mlp: MLP, rows: _Rows) -> None:
    layer.eval()
    weight, bias = (part.to(rows.inputs.dtype) for part in mlp.up[0].weights())
    if isinstance(layer, FF):
        w1, b1, w2, b2 = layer.network.parameters()
        some = rows.sample()
        if mlp.gated:  # its neurons are products: ours stay as initialised, and what they put out is fitted
            weight, bias = w1, b1
        hidden = layer.network[1](some.inputs @ weight.T + bias)
        chosen, output_weight, output_bias = _neurons(hidden, some, layer.width)
        w1[: len(chosen)], b1[: len(chosen)] = weight[chosen], bias[chosen]
        w2.zero_()
        w2[:, : len(chosen)] = output_weight.T
        b2.copy_(output_bias)
    elif isinstance(layer, FFF):
        leaf_B, leaves = _plant(layer, rows), layer.leaves
        for leaf in range(layer.num_experts):
            mine = leaf_B == leaf
            some = (rows.of(mine) if mine.any() else rows).sample()
            if mlp.gated:
                weight, bias = leaves.hidden_weight[leaf], leaves.hidden_bias[leaf]
            hidden = leaves.hidden(some.inputs @ weight.T + bias)
            chosen, output_weight, output_bias = _neurons(hidden, some, layer.leaf_width)
            leaves.hidden_weight[leaf, : len(chosen)] = weight[chosen]
            leaves.hidden_bias[leaf, : len(chosen)] = bias[chosen]
            leaves.output_weight[leaf] = 0
            leaves.output_weight[leaf, : len(chosen)] = output_weight
            leaves.output_bias[leaf] = output_bias


def _plant(tree: FFF, rows: _Rows) -> Tensor:
    """Set the nodes; (rows,) leaf of each row."""
    # rows that are there many times, as a class token is, would have no half
    _, place = torch.unique(rows.inputs, dim=0, return_inverse=True)
    once = torch.full((int(place.max()) + 1,), len(place), device=place.device)
    once.scatter_reduce_(0, place, torch.arange(len(place), device=place.device), "amin")
    distinct = rows.of(once)
    node_B = torch.zeros(len(distinct.inputs), dtype=torch.long, device=place.device)
    for node in range(tree.num_experts - 1):
        mine = (node_B == node).nonzero().squeeze(1)
        if len(mine) > 1:
            x, y = distinct.inputs[mine].double(), distinct.outputs[mine].double()
            centre = x.mean(0)
            y = y - y.mean(0)
            with torch.random.fork_rng():
                _, _, directions = torch.pca_lowrank(y, q=1, center=False)
            weight = _ridge(x - centre, y @ directions[:, :1]).squeeze(1)
            score = (x - centre) @ weight
            spread = score.std().clamp_min(1e-12)
            tree.node_weight[node] = weight / spread
            tree.node_bias[node] = -(centre @ weight + score.median()) / spread
        logits = distinct.inputs[mine] @ tree.node_weight[node] + tree.node_bias[node]
        node_B[mine] = 2 * node + 1 + (logits >= 0)
    return tree.route(rows.inputs).squeeze(1)


def _neurons(hidden: Tensor, rows: _Rows, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which neurons explain most of the outputs, greedily; (chosen,), (chosen, out), (out,) weights that fit them."""
    hidden, outputs = hidden.double(), rows.outputs.double()
    means = hidden.mean(0), outputs.mean(0)
    hidden, outputs = hidden - means[0], outputs - means[1]
    # of the neurons and with the outputs, less what the chosen ones explain
    own, common = hidden.T @ hidden, hidden.T @ outputs
    least = 1e-9 * own.diagonal().max().clamp_min(1e-30)
    chosen: list[int] = []
    for _ in range(min(count, hidden.shape[1])):
        gain = common.square().sum(1) / own.diagonal().clamp_min(least)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        share = own[:, best] / own[best, best].clamp_min(least)
        common = common - share[:, None] * common[best]
        own = own - share[:, None] * own[best]
    weight = _ridge(hidden[:, chosen], outputs)
    return torch.tensor(chosen), weight, means[1] - means[0][chosen] @ weight


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """(rows, a), (rows, b) -> (a, b)."""
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-9))
    return torch.linalg.solve(gram, x.T @ y)


@torch.enable_grad()
def _distil(layer: FeedforwardLayer, rows: _Rows, steps: int, lr: float) -> None:
    anneal(layer, 1.0)
    if not steps:
        return
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    variance = rows.variance()
    layer.train()
    for step in range(steps):
        anneal(layer, step / steps, INVERSE_TEMPERATURE)
        some = rows.of(torch.randint(len(rows.inputs), (BATCH_SIZE,)))
        loss = (layer(some.inputs) - some.outputs).square().mean() / variance
        (loss + weighted_aux_losses([layer], BALANCE)).backward()
        layer.routing = None
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    anneal(layer, 1.0)


@torch.no_grad()
def _error(layer: FeedforwardLayer, rows: _Rows) -> float:
    outputs = layer.eval()(rows.inputs)
    return float((outputs - rows.outputs).square().mean() / rows.variance())

"""Convert trained MLPs: each new layer starts from the dense weights and is distilled on sample data."""

import warnings
from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fffexp.adapt.find import Select, find_mlps
from fffexp.adapt.mlp import MLP
from fffexp.adapt.probe import required, watched
from fffexp.adapt.replace import Replacements, build, put
from fffexp.layers.base import FeedforwardLayer, LayerFactory
from fffexp.training.losses import anneal, auxiliary_loss
from fffexp.training.schedules import Exponential

HELD_OUT = 0.1  # of the rows
BATCH_SIZE, SELECTION_ROWS = 256, 4096  # rows that a step trains on, and that neurons are selected on
INVERSE_TEMPERATURE = Exponential(10.0, 300.0)  # of configs/recipe/fff_distil.yaml
RIDGE = 1e-3  # of the mean square of the regressors
# Activations that a model's MLPs are compared with, on so many rows, to warn where the new layer has another one.
ACTIVATIONS, ACTIVATION_ROWS = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(), nn.ELU(), nn.ReLU6()), 1000
# Another is reported if it explains the outputs so many times better; less of the variance is rounding.
BETTER, ALIKE = 10, 1e-4
Rows = tuple[Tensor, Tensor]  # inputs and outputs of an MLP: (rows, in), (rows, out)


def convert_feedforward(
    model: nn.Module,
    batches: Iterable[Any],
    layer_factory: LayerFactory,
    select: Select | None = None,
    steps: int = 2000,
    lr: float = 1e-3,
) -> Replacements:
    """Replace the MLPs of a trained model by layers that compute nearly the same.

    A tree's nodes split the inputs in halves along the direction that explains most of the outputs. A leaf, or a dense
    layer, takes the MLP's neurons that explain most of its outputs, with output weights fitted to them; for a gated MLP
    (another kind of neuron) the hidden weights stay as initialised. Other layers start from their own initialisation.
    Then the layer is trained to reproduce the MLP's outputs, annealed to hard routing. A final error that is not below
    that of a constant gives a warning.

    Of a batch the model is called with: a tensor; of a tuple or list the first items, as many as `forward` requires, so
    that the labels of (x, y) are left out; of a mapping the entries that `forward` names, all if it takes `**kwargs`.
    Tensors are moved to its device. All rows (tokens) are kept in memory, without padding according to a mapping's
    `attention_mask` or `src_key_padding_mask`; for nn.TransformerDecoderLayer, and for a module called decoder beside
    an encoder, `decoder_attention_mask` or `tgt_key_padding_mask`. The last batches, as near a tenth of the rows as
    whole batches allow, are held out.

    Args:
        model: in the state to be kept; its layers are replaced when all are ready.
        batches: sample data: a DataLoader or a list of batches.
        layer_factory: (in_features, out_features) -> layer, of the model's activation; another gives a warning.
        select: as in `replace_feedforward`.
        steps: of distillation, for each layer; 0 leaves the layers as initialised.
        lr: peak learning rate of AdamW, one cycle.

    Raises:
        ValueError: as `replace_feedforward`; too little data, data that is not finite, one batch instead of a list, or
            a layer that cannot be trained so (sparse gradients, a gate without gradients).
    """
    _refuse_one_batch(model, batches)
    mlps, left = find_mlps(model, select)
    ready: list[tuple[MLP, FeedforwardLayer, float, float]] = []
    warned = False
    for mlp, (train, held_out) in zip(mlps, _watch(model, mlps, batches), strict=True):
        layer = build(mlp, layer_factory)
        if layer.sparse_gradients:
            kind = type(layer).__name__
            raise ValueError(f"a {kind} with sparse gradients cannot be distilled: train all its leaves")
        layer.check_trainable()
        mode, dtype = layer.training, next(layer.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)
        layer.to(wide)
        train, held_out = ((x.to(wide), y.to(wide)) for x, y in (train, held_out))
        _initialise(layer, mlp, *train)
        warned = warned or _warn_of_activation(layer, mlp, *train)
        initial = _error(layer, *held_out)
        _distil(layer, *train, steps, lr)
        final = _error(layer, *held_out)
        if steps and not final < 1:  # or not a number
            found = f"the layer that replaces {mlp.name or 'the MLP'} has an error of {final:.3g}, a constant has 1"
            warnings.warn(f"{found}: use more steps, or another layer", stacklevel=2)
        ready.append((mlp, layer.to(dtype).train(mode), initial, final))
    return put(model, ready, left)


def _refuse_one_batch(model: nn.Module, batches: Any) -> None:
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"batches is a {type(batches).__name__}: give a list of batches")
    tensors = isinstance(batches, tuple | list) and all(isinstance(batch, Tensor) for batch in batches)
    kinds = {(batch.dtype, batch.dim()) for batch in batches} if tensors else ()
    if tensors and (len(kinds) > 1 or len(batches) == required(model) > 1):
        shapes = ", ".join(f"{tuple(batch.shape)} {batch.dtype}" for batch in batches)
        raise ValueError(f"batches is one batch ({shapes}): give a list of batches, [batch]")


def _arguments(model: nn.Module, batch: Any, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
    taken = {p.name: p.kind for p in signature(model.forward).parameters.values()}
    args, kwargs = batch if isinstance(batch, tuple | list) else [batch], {}
    if isinstance(batch, Mapping):
        names = batch if Parameter.VAR_KEYWORD in taken.values() else taken.keys() & batch.keys()
        args, kwargs = [], {name: batch[name] for name in names}
    elif Parameter.VAR_POSITIONAL not in taken.values():
        args = args[: max(1, required(model))]
    kwargs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    return [value.to(device) if isinstance(value, Tensor) else value for value in args], kwargs


@torch.no_grad()
def _watch(model: nn.Module, mlps: list[MLP], batches: Iterable[Any]) -> list[tuple[Rows, Rows]]:
    paired = {"encoder", "decoder"} <= {part for name, _ in model.named_modules() for part in name.split(".")}
    sequence_first = any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())
    seen: list[list[Rows]] = [[] for _ in mlps]
    with watched(model, {linear.module for mlp in mlps for linear in (mlp.linears[0], mlp.linears[-1])}) as events:
        model.eval()
        for batch in batches:
            events.clear()
            args, kwargs = _arguments(model, batch, mlps[0].linears[0].weight.device)
            model(*args, **kwargs)
            for mlp, rows in zip(mlps, seen, strict=True):
                decoder = isinstance(mlp.module, nn.TransformerDecoderLayer)
                decoder |= paired and "decoder" in mlp.name.split(".")
                first, last = mlp.linears[0].module, mlp.linears[-1].module
                # an MLP that is called twice sees both
                x = [_rows(given, kwargs, decoder, sequence_first) for part, given, _ in events if part is first]
                y = [_rows(made, kwargs, decoder, sequence_first) for part, _, made in events if part is last]
                rows += [(torch.cat(x), torch.cat(y))] if x else []
    return [_split(mlp.name or "the MLP", rows) for mlp, rows in zip(mlps, seen, strict=True)]


def _rows(x: Tensor, batch: Mapping[str, Any], decoder: bool, sequence_first: bool) -> Tensor:
    # (..., features) -> (rows, features), without the padding that the batch marks
    flat, attended = x.flatten(0, -2), batch.get("decoder_attention_mask" if decoder else "attention_mask")
    padding = batch.get("tgt_key_padding_mask" if decoder else "src_key_padding_mask")
    # padding is bool, or float, which is added to the attention's logits
    kept_BT = attended != 0 if attended is not None else padding == 0 if padding is not None else None
    if kept_BT is None or kept_BT.numel() != len(flat):  # a head has a row for each sequence
        return flat
    if x.shape[:-1] == kept_BT.shape[::-1] and (sequence_first or x.shape[:-1] != kept_BT.shape):
        kept_BT = kept_BT.t()
    return flat[kept_BT.flatten()]


def _split(name: str, batches: list[Rows]) -> tuple[Rows, Rows]:
    if not batches:
        raise ValueError(f"no data reached {name}: give batches that the model runs on")
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"inputs or outputs of {name} are not finite: leave out the batches that cause it")
    count, tenth = len(x), round(HELD_OUT * len(x))
    # of the last batch, of the last two, ...
    ends = [end for end in accumulate(len(batch[0]) for batch in reversed(batches)) if 2 <= end <= count - 2]
    held_out = min(ends, key=lambda end: abs(end - tenth), default=tenth)  # one batch can only be cut
    if not 2 <= held_out <= count - 2:
        raise ValueError(f"{count} rows are too little data for {name}: give more batches")
    return (x[:-held_out], y[:-held_out]), (x[-held_out:], y[-held_out:])


@torch.no_grad()
def _warn_of_activation(layer: FeedforwardLayer, mlp: MLP, x: Tensor, y: Tensor) -> bool:
    dense = layer.summands()[0].dense_blocks()
    if dense is None or mlp.gated:  # takes none of its neurons
        return False
    (_, own), (x, y) = dense, (part[:: 1 + len(part) // ACTIVATION_ROWS] for part in (x, y))
    w1, b1, w2, b2 = (part.to(x.dtype) for linear in mlp.linears for part in (linear.weight, linear.bias))
    errors = {
        activation: float((activation(x @ w1.T + b1) @ w2.T + b2 - y).square().mean() / (y.var(0).mean() or 1.0))
        for activation in (*ACTIVATIONS, own)
    }
    nearest = min(ACTIVATIONS, key=errors.__getitem__)
    if different := errors[own] >= BETTER * max(errors[nearest], ALIKE):
        warnings.warn(
            f"the activation of {mlp.name or 'the MLP'} is {nearest}, that of its {type(layer).__name__} is "
            f"{own}, for which the MLP's neurons are a poor start: give the layer "
            f"activation=nn.{type(nearest).__name__}",
            stacklevel=4,
        )
    return different


@torch.no_grad()
def _initialise(layer: FeedforwardLayer, mlp: MLP, x: Tensor, y: Tensor) -> None:
    layer.eval()
    for part in layer.summands():  # each begins from what those before it leave
        _start(part, mlp, x, y)
        y = y - part(x)


def _start(layer: FeedforwardLayer, mlp: MLP, x: Tensor, y: Tensor) -> None:
    if (dense := layer.dense_blocks()) is None:
        return
    # each input once: rows that occur many times, as a class token does, cannot be halved
    _, place, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
    first = place.argsort(stable=True)[counts.cumsum(0) - counts]
    layer.set_router(x[first], y[first], _halves)
    (blocks, activation), block_B = dense, layer.route(x)[:, 0]
    weight, bias = mlp.linears[0].weight.to(x.dtype), mlp.linears[0].bias.to(x.dtype)
    for index, (w1, b1, w2, b2) in enumerate(zip(*blocks, strict=True)):
        mine = block_B == index
        mine = (mine if mine.any() else ~mine).nonzero().squeeze(1)
        some = mine[torch.randperm(len(mine), device=x.device)[:SELECTION_ROWS]]
        if mlp.gated:  # its neurons are products: ours stay as initialised, and their output weights are fitted
            weight, bias = w1, b1
        chosen, output_weight, b2[:] = _neurons(activation(x[some] @ weight.T + bias), y[some], len(b1))
        w1[: len(chosen)], b1[: len(chosen)] = weight[chosen], bias[chosen]
        w2.zero_()[: len(chosen)] = output_weight


def _halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # (in,), () of the hyperplane that halves the rows, along what explains most of y
    x, y = x.double(), y.double()
    centre = x.mean(0)
    x, y = x - centre, y - y.mean(0)
    with torch.random.fork_rng():
        _, _, directions = torch.pca_lowrank(y, q=1, center=False)
    weight = _ridge(x, y @ directions[:, :1]).squeeze(1)
    score = x @ weight
    spread = score.std().clamp_min(1e-12)
    return weight / spread, -(centre @ weight + score.median()) / spread


def _neurons(hidden: Tensor, outputs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    # greedily, those that explain most of the outputs: (chosen,), and fitted (chosen, out) weight, (out,) bias
    hidden, outputs = hidden.double(), outputs.double()
    means = hidden.mean(0), outputs.mean(0)
    hidden, outputs = hidden - means[0], outputs - means[1]
    # covariances of the neurons, and with the outputs; of the latter and the variances, less what the chosen explain
    own, common = hidden.T @ hidden, hidden.T @ outputs
    left, least = own.diagonal().clone(), 1e-9 * own.diagonal().max().clamp_min(1e-30)
    count = min(count, len(own))
    explained = own.new_zeros(count, len(own))  # rows of a pivoted Cholesky factor
    chosen: list[int] = []
    for index in range(count):
        gain = common.square().sum(1) / left.clamp_min(least)
        gain[chosen] = -1
        best = int(gain.argmax())
        row = (own[best] - explained[:index, best] @ explained[:index]) / left[best].clamp_min(least).sqrt()
        common.addcmul_(row[:, None], common[best] / left[best].clamp_min(least).sqrt(), value=-1)
        explained[index], left = row, left - row.square()
        chosen.append(best)
    weight = _ridge(hidden[:, chosen], outputs)
    return torch.tensor(chosen), weight, means[1] - means[0][chosen] @ weight


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-9))
    return torch.linalg.solve(gram, x.T @ y)


@torch.enable_grad()
def _distil(layer: FeedforwardLayer, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(1, steps))
    variance = y.var(0).mean() or 1.0  # where it never varies
    layer.train()
    for step in range(steps):
        anneal(layer, step / steps, INVERSE_TEMPERATURE)
        some = torch.randint(len(x), (BATCH_SIZE,))
        loss = (layer(x[some]) - y[some]).square().mean() / variance
        (loss + auxiliary_loss(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    anneal(layer, 1.0)


@torch.no_grad()
def _error(layer: FeedforwardLayer, x: Tensor, y: Tensor) -> float:
    return float((layer.eval()(x) - y).square().mean() / (y.var(0).mean() or 1.0))

"""Convert trained MLPs: each new layer starts from the dense weights and is distilled on sample data."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fffexp.adapt.find import modes_restored, required
from fffexp.adapt.replace import MLP, LayerFactory, Replacement, Select, build, find_mlps, put
from fffexp.layers import FeedforwardLayer
from fffexp.training.losses import anneal, auxiliary_loss
from fffexp.training.schedules import Exponential

BATCH_SIZE = 256
HELD_OUT = 0.1  # of the rows
SELECTION_ROWS = 4096  # rows that neurons are selected on
INVERSE_TEMPERATURE = Exponential(10.0, 300.0)  # of configs/recipe/fff_distil.yaml
RIDGE = 1e-3  # of the mean square of the regressors
# Activations that a model's MLPs are compared with, to warn where the new layer has another one.
ACTIVATIONS = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(), nn.ELU(), nn.ReLU6())
BETTER = 10  # another activation is reported if it explains the outputs this many times better
ALIKE = 1e-4  # of the variance: a smaller difference is rounding, or the two forms of GELU
ACTIVATION_ROWS = 1000  # rows that they are compared on


@dataclass(frozen=True)
class Conversion(Replacement):
    """A layer that replaced a trained MLP.

    Attributes:
        initial_error: error before distillation.
        final_error: mean squared difference to the MLP's output on held-out batches with hard routing, divided by the
            variance of that output.
    """

    initial_error: float
    final_error: float


class _Rows(NamedTuple):
    """Inputs and outputs of one MLP: (rows, in), (rows, out)."""

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
    """Replace the MLPs of a trained model by layers that compute nearly the same.

    A tree's nodes split the inputs in halves along the direction that explains most of the outputs. A leaf takes the
    MLP's neurons that explain most of the outputs of its part, with output weights fitted to them. Then the layer is
    trained to reproduce the MLP's outputs, annealed to hard routing. A dense layer takes neurons in the same way. For a
    gated MLP (another kind of neuron) the hidden weights stay as initialised and the output weights are fitted. Other
    layers start from their own initialisation. A warning is given where the final error is not below that of a
    constant.

    A batch is what a DataLoader gives. The model is called with:

    - a tensor: that tensor;
    - a tuple or list: its first items, as many as `forward` requires, so that the labels of (x, y) are left out;
    - a mapping: the entries that `forward` names, all of them if it takes `**kwargs`.

    Tensors are moved to the device of the model. All rows (tokens) are kept in memory, without padding according to a
    mapping's `attention_mask` or `src_key_padding_mask`; for nn.TransformerDecoderLayer, and for a module called
    decoder beside an encoder, `decoder_attention_mask` or `tgt_key_padding_mask`. The last batches, as near a tenth of
    the rows as whole batches allow, are held out.

    Args:
        model: in the state to be kept; its layers are replaced when all are ready.
        batches: sample data: a DataLoader or a list of batches.
        layer_factory: (in_features, out_features) -> layer. Use the model's activation: neurons do not fit another
            one, and there is a warning if the model's is one of torch's common ones.
        select: as in `replace_feedforward`.
        steps: of distillation, for each layer; 0 leaves the layers as initialised.
        lr: peak learning rate of AdamW, one cycle.

    Returns:
        A conversion for each MLP.

    Raises:
        ValueError: no MLP, none selected, too little data, data that is not finite, one batch instead of a list, or a
            layer that cannot be trained so (sparse gradients, a gate without gradients).
    """
    _check_batches(model, batches)
    mlps = find_mlps(model, select)
    ready: list[tuple[MLP, FeedforwardLayer, float, float]] = []
    warned = False
    for mlp, (train, held_out) in zip(mlps, _watch(model, mlps, batches), strict=True):
        layer = build(mlp, layer_factory)
        if layer.sparse_gradients:
            raise ValueError(
                f"a {type(layer).__name__} with sparse gradients cannot be distilled: train all of its leaves"
            )
        layer.check_trainable()
        mode, dtype = layer.training, next(layer.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)
        layer.to(wide)
        train, held_out = (_Rows(*(part.to(wide) for part in rows)) for rows in (train, held_out))
        _initialise(layer, mlp, train)
        if not warned and (message := _other_activation(layer, mlp, train)):
            warnings.warn(message, stacklevel=2)
            warned = True
        initial = _error(layer, held_out)
        _distil(layer, train, steps, lr)
        final = _error(layer, held_out)
        if steps and not final < 1:  # or not a number
            message = f"the layer that replaces {mlp.name or 'the MLP'} has an error of {final:.3g}, a constant has 1"
            warnings.warn(f"{message}: use more steps, or another layer", stacklevel=2)
        ready.append((mlp, layer, initial, final))
        layer.to(dtype).train(mode)
    return [Conversion(**vars(put(mlp, layer)), initial_error=i, final_error=f) for mlp, layer, i, f in ready]


def _check_batches(model: nn.Module, batches: Any) -> None:
    """Refuse what is one batch."""
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"batches is a {type(batches).__name__}: give a list of batches")
    if not isinstance(batches, tuple | list) or not all(isinstance(batch, Tensor) for batch in batches):
        return
    kinds = {(batch.dtype, batch.dim()) for batch in batches}
    if len(kinds) > 1 or len(batches) == required(model) > 1:
        shapes = ", ".join(f"{tuple(batch.shape)} {batch.dtype}" for batch in batches)
        raise ValueError(f"batches is one batch ({shapes}): give a list of batches, [batch]")


def _arguments(model: nn.Module, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Which of a batch goes to the model, by position and by name: see convert_feedforward."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    parameters = signature(model.forward).parameters.values()
    if isinstance(batch, Mapping):
        everything = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        return (), {key: move(value) for key, value in batch.items() if everything or key in names}
    if not isinstance(batch, tuple | list):
        return (move(batch),), {}
    everything = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
    count = len(batch) if everything else max(1, required(model))
    return tuple(move(value) for value in batch[:count]), {}


@torch.no_grad()
def _watch(model: nn.Module, mlps: list[MLP], batches: Iterable[Any]) -> list[tuple[_Rows, _Rows]]:
    """For each MLP the rows of most batches, and those held out."""
    seen: list[list[_Rows]] = [[] for _ in mlps]
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    decoders = [
        isinstance(mlp.module, nn.TransformerDecoderLayer)
        or (names >= {"encoder", "decoder"} and "decoder" in mlp.name.split("."))
        for mlp in mlps
    ]
    sequence_first = any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())
    device = mlps[0].down.weights()[0].device
    with _recording(model, mlps) as calls:
        for batch in batches:
            for call in calls:
                call.clear()
            args, kwargs = _arguments(model, batch, device)
            model(*args, **kwargs)
            for call, rows, decoder in zip(calls, seen, decoders, strict=True):
                if call:  # an MLP that is called twice sees both
                    kept_BT = _kept(kwargs, decoder)
                    both = ([_rows(each[i], kept_BT, sequence_first) for each in call] for i in range(2))
                    rows.append(_Rows(*map(torch.cat, both)))
    return [_split(mlp.name or "the MLP", rows) for mlp, rows in zip(mlps, seen, strict=True)]


def _split(name: str, batches: list[_Rows]) -> tuple[_Rows, _Rows]:
    """Rows to train on, and rows held out."""
    if not batches:
        raise ValueError(f"no data reached {name}: give batches that the model runs on")
    rows = _Rows(*map(torch.cat, zip(*batches, strict=True)))
    if not all(part.isfinite().all() for part in rows):
        raise ValueError(f"inputs or outputs of {name} are not finite: leave out the batches that cause it")
    count = len(rows.inputs)
    tenth = round(HELD_OUT * count)
    # of the last batch, of the last two, ...
    ends = [end for end in accumulate(len(batch.inputs) for batch in reversed(batches)) if 2 <= end <= count - 2]
    held_out = min(ends, key=lambda end: abs(end - tenth), default=tenth)  # one batch can only be cut
    if not 2 <= held_out <= count - 2:
        raise ValueError(f"{count} rows are too little data for {name}: give more batches")
    return rows.of(slice(count - held_out)), rows.of(slice(count - held_out, None))


def _kept(batch: Mapping[str, Any], decoder: bool) -> Tensor | None:
    """(batch, tokens) True where there is no padding, if the batch says so."""
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
    """(input, output) of each call of each MLP, in evaluation and on torch's plain path."""
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in mlps]
    given: dict[int, Tensor] = {}
    handles = []
    for i, mlp in enumerate(mlps):

        def up(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, i: int = i) -> None:
            given[i] = args[0].clone()

        def down(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, i: int = i) -> None:
            calls[i].append((given[i], output.clone()))

        handles += [mlp.up[0].module.register_forward_hook(up), mlp.down.module.register_forward_hook(down)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it bypasses the modules
    try:
        with modes_restored(model):
            model.eval()
            yield calls
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _other_activation(layer: FeedforwardLayer, mlp: MLP, rows: _Rows) -> str | None:
    """A warning if neurons of the MLP are copied to a layer with another activation."""
    dense = layer.dense_blocks()
    if dense is None or mlp.gated:  # takes none of its neurons
        return None
    _, own = dense
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
    if (dense := layer.dense_blocks()) is None:
        return
    blocks, activation = dense
    layer.set_router(*_distinct(rows), _halves)
    block_B = layer.route(rows.inputs)[:, 0]
    weight, bias = (part.to(rows.inputs.dtype) for part in mlp.up[0].weights())
    for index, (w1, b1, w2, b2) in enumerate(zip(*blocks, strict=True)):
        mine = block_B == index
        some = (rows.of(mine) if mine.any() else rows).sample()
        if mlp.gated:  # its neurons are products: ours stay as initialised, and their output weights are fitted
            weight, bias = w1, b1
        hidden = activation(some.inputs @ weight.T + bias)
        chosen, output_weight, output_bias = _neurons(hidden, some, len(b1))
        w1[: len(chosen)], b1[: len(chosen)] = weight[chosen], bias[chosen]
        w2.zero_()
        w2[: len(chosen)] = output_weight
        b2.copy_(output_bias)


def _distinct(rows: _Rows) -> _Rows:
    """Each input once: rows that occur many times, as a class token does, cannot be halved."""
    _, place = torch.unique(rows.inputs, dim=0, return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(place), device=place.device)
    first.scatter_reduce_(0, place, torch.arange(len(place), device=place.device), "amin")
    return rows.of(first)


def _halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, in), (rows, out) -> (in,), () hyperplane that halves the rows, along what explains most of y."""
    x, y = x.double(), y.double()
    centre = x.mean(0)
    y = y - y.mean(0)
    with torch.random.fork_rng():
        _, _, directions = torch.pca_lowrank(y, q=1, center=False)
    weight = _ridge(x - centre, y @ directions[:, :1]).squeeze(1)
    score = (x - centre) @ weight
    spread = score.std().clamp_min(1e-12)
    return weight / spread, -(centre @ weight + score.median()) / spread


def _neurons(hidden: Tensor, rows: _Rows, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedily, the neurons that explain most of the outputs: (chosen,), fitted (chosen, out) weight, (out,) bias."""
    hidden, outputs = hidden.double(), rows.outputs.double()
    means = hidden.mean(0), outputs.mean(0)
    hidden, outputs = hidden - means[0], outputs - means[1]
    # covariances of the neurons, and with the outputs, less what the chosen ones explain
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
        (loss + auxiliary_loss(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    anneal(layer, 1.0)


@torch.no_grad()
def _error(layer: FeedforwardLayer, rows: _Rows) -> float:
    outputs = layer.eval()(rows.inputs)
    return float((outputs - rows.outputs).square().mean() / rows.variance())

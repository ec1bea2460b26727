"""Feedforward layers in models that exist: the MLPs of a model are found, checked and replaced."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from fffexp.adapt.find import bends, bent, by_row, elementwise, events_of, probe_rows, required, run, same
from fffexp.layers import FeedforwardLayer
from fffexp.layers.base import SIZES

LayerFactory = Callable[[int, int], FeedforwardLayer]
Select = Callable[[str, nn.Module], bool]
# By what names a block of OPT, BART and the like holds a linear layer, an activation and a linear layer.
HELD = ("fc1", "activation_fn", "fc2")
# and the probability at which a function, no module, drops the hidden values
DROPPED = "activation_dropout"


@dataclass(frozen=True)
class Replacement:
    """A layer that took the place of an MLP.

    Attributes:
        name: path of the MLP in the model.
        old: what it was: the MLP, or where that was no module of its own, its linear layers.
        new: the layer.
        old_sizes: sizes of the MLP, by the names of `FeedforwardLayer.sizes`.
        new_sizes: those of the layer.
    """

    name: str
    old: nn.Module
    new: FeedforwardLayer
    old_sizes: Mapping[str, int]
    new_sizes: Mapping[str, int]


class Linear(NamedTuple):
    """What an nn.Linear or a Conv1D of transformers, whose weight is transposed, maps."""

    module: nn.Module
    in_features: int
    out_features: int

    def weights(self) -> tuple[Tensor, Tensor]:
        """(out_features, in_features), and (out_features,) bias."""
        weight, bias = self.module.weight, self.module.bias
        assert isinstance(weight, Tensor)
        if not isinstance(self.module, nn.Linear):
            weight = weight.T
        return weight, bias if isinstance(bias, Tensor) else weight.new_zeros(self.out_features)


class MLP(NamedTuple):
    """Linear layers that are an MLP, one up and one down, or gated: two up, or one of twice the width, and one down."""

    name: str
    module: nn.Module  # what is judged by `select`
    up: list[Linear]
    down: Linear
    put: Callable[[FeedforwardLayer], nn.Module]  # does it, and returns what was there

    @property
    def gated(self) -> bool:
        """Whether it is a product that goes down."""
        return len(self.up) > 1 or self.up[0].out_features != self.down.in_features

    def sizes(self) -> dict[str, int]:
        """As of a layer, by the names of `FeedforwardLayer.sizes`."""
        linears = [*self.up, self.down]
        parameters = sum(p.numel() for linear in linears for p in linear.module.parameters())
        flops = 2 * sum(linear.in_features * linear.out_features for linear in linears)
        return dict(zip(SIZES, (*[self.down.in_features] * 4, parameters, flops), strict=True))


def replace_feedforward(
    model: nn.Module, layer_factory: LayerFactory, select: Select | None = None
) -> list[Replacement]:
    """Put a layer in the place of each MLP of a model, which is changed.

    Known are: modules of two linear layers with an activation between them (timm, GPT-2, FF), gated ones of three
    (Llama; Phi-3, with two in one), pairs within an nn.Sequential, nn.TransformerEncoderLayer and
    nn.TransformerDecoderLayer, the `intermediate` and `output` of BERT and its kin, and the linear layers that a block
    of OPT, BART and the like holds itself; a classification head of this form is one of them. That nothing else
    happens between an MLP's input and its output is made sure by running it on a few rows (but not that a block uses
    hidden values of its MLP for nothing else). Dropout within an MLP goes with it: give the factory's layer its own; a
    dropout module behind it stays. The new layers can be trained where the MLP was frozen, and share no weights with
    other modules where it did. An MLP of another form stays as it is, without a word: look at the list that is
    returned.

    Args:
        model: the whole of it: what holds an nn.TransformerEncoder's layers has to know of them.
        layer_factory: (in_features, out_features) -> layer; takes device, dtype and mode of what it replaces.
        select: (path, module) -> whether that MLP is replaced; all are unless given. The module is the MLP's own, or
            else the one that holds its linear layers.

    Returns:
        What was replaced, in the order of the model's modules.

    Raises:
        ValueError: there is no MLP, or none that is selected, its weights are on the meta device, or the factory makes
            something else than a layer of the sizes that it is given.
    """
    mlps = find_mlps(model, select)
    layers = [build(mlp, layer_factory) for mlp in mlps]  # all can be made, or nothing is changed
    return [put(mlp, layer) for mlp, layer in zip(mlps, layers, strict=True)]


def find_mlps(model: nn.Module, select: Select | None) -> list[MLP]:
    """Those that are selected.

    Raises:
        ValueError: there is no MLP, or none that is selected, or its weights are on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where nothing can be run: give it weights first")
    found = list(_mlps(model))
    if not found:
        raise ValueError(f"{type(model).__name__} holds no MLP of a known form (see replace_feedforward)")
    chosen = [mlp for mlp in found if select is None or select(mlp.name, mlp.module)]
    if not chosen:
        names = ", ".join(mlp.name or "(the model itself)" for mlp in found)
        raise ValueError(f"select takes none of the MLPs: {names}")
    return chosen


def build(mlp: MLP, layer_factory: LayerFactory) -> FeedforwardLayer:
    """A layer for the place of the MLP."""
    weight = mlp.up[0].module.weight  # what comes in is of its type; T5 in float16 keeps the other in float32
    assert isinstance(weight, Tensor)
    sizes = mlp.up[0].in_features, mlp.down.out_features
    layer = layer_factory(*sizes)
    if not isinstance(layer, FeedforwardLayer):
        raise ValueError(f"layer_factory makes a {type(layer).__name__}, which is no FeedforwardLayer of fffexp")
    if (made := (layer.in_features, layer.out_features)) != sizes:
        raise ValueError(
            f"layer_factory makes a layer of {made[0]} -> {made[1]} for {mlp.name or 'the model'}, an MLP of"
            f" {sizes[0]} -> {sizes[1]}: use the in_features and out_features that it is given"
        )
    return layer.to(weight.device, weight.dtype).train(mlp.module.training)


def put(mlp: MLP, layer: FeedforwardLayer) -> Replacement:
    """The layer in the place of the MLP."""
    return Replacement(mlp.name, mlp.put(layer), layer, mlp.sizes(), layer.sizes())


def _mlps(model: nn.Module) -> Iterator[MLP]:
    """All, each once and the outer before the inner."""
    taken: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in taken or isinstance(module, FeedforwardLayer):
            if module not in taken and (mlp := _of_its_own(name, module, model)):  # a dense layer
                yield mlp
            taken.update(module.modules())
        elif isinstance(module, nn.Sequential):
            yield from _within_sequential(name, module)
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            yield from _of_torch(name, module, model)
        elif isinstance(getattr(module, "intermediate", None), nn.Module) and (mlps := list(_of_bert(name, module))):
            yield from mlps
        elif mlp := _of_its_own(name, module, model):
            taken.update(module.modules())
            yield mlp
        else:
            yield from _within_block(name, module)


def _linear(module: nn.Module) -> Linear | None:
    if isinstance(module, nn.Linear):
        return Linear(module, module.in_features, module.out_features)
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return Linear(module, *weight.shape)
    return None


def _within_sequential(name: str, sequential: nn.Sequential) -> Iterator[MLP]:
    """A linear layer, an activation, perhaps dropout, and a linear layer; the next MLP begins behind that."""
    children = [(key, child) for key, child in sequential._modules.items() if child is not None]
    begun: tuple[int, Linear] | None = None
    activated = False
    for index, (_, child) in enumerate(children):
        linear = _linear(child)
        if linear and begun and activated and begun[1].out_features == linear.in_features:
            first, up = begun
            keys = [key for key, _ in children[first : index + 1]]
            path = f"{name}.{keys[0]}".removeprefix(".")
            yield MLP(path, sequential, [up], linear, partial(_fill, sequential, keys))
            begun = None
        elif linear:
            begun, activated = (index, linear), False
        elif begun and elementwise(child):
            activated = activated or bends(child)
        else:
            begun = None


def _fill(sequential: nn.Sequential, keys: list[str], layer: FeedforwardLayer) -> nn.Module:
    """The layer into the first of these children, nothing into the others."""
    old = nn.Sequential(*(sequential.get_submodule(key) for key in keys))
    for key, module in zip(keys, [layer, *(nn.Identity() for _ in keys[1:])], strict=True):
        setattr(sequential, key, module)
    return old


def _of_torch(
    name: str, block: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, model: nn.Module
) -> Iterator[MLP]:
    up, down = _linear(block.linear1), _linear(block.linear2)
    if not up or not down:  # replaced before
        return

    def put(layer: FeedforwardLayer) -> nn.Module:
        old = nn.ModuleList([block.linear1, block.linear2])
        passing = {key: nn.Identity() for key in ("dropout", "activation", "linear2")}
        for key, module in {"linear1": layer, **passing}.items():
            setattr(block, key, module)
        if isinstance(block, nn.TransformerEncoderLayer):
            # torch's fused inference reads the weights of the linear layers past their modules
            block.activation_relu_or_gelu = 0
            for holder in model.modules():
                if isinstance(holder, nn.TransformerEncoder) and block in holder.layers:
                    holder.use_nested_tensor = False
        return old

    yield MLP(name, block, [up], down, put)


def _of_bert(name: str, block: nn.Module) -> Iterator[MLP]:
    """`output` adds a residual behind its linear layer, so the layer goes where `intermediate` was."""
    intermediate, output = getattr(block, "intermediate", None), getattr(block, "output", None)
    if not isinstance(intermediate, nn.Module) or not isinstance(output, nn.Module):
        return
    parts = getattr(intermediate, "dense", None), getattr(output, "dense", None)
    up, down = (_linear(part) if isinstance(part, nn.Module) else None for part in parts)
    if not up or not down or up.out_features != down.in_features:
        return
    # that nothing but `dense` and an activation is in the one, and that `dense` is the first thing in the other
    x = probe_rows(up.in_features, up.weights()[0])
    first = run(intermediate, x)
    if not first or not _only(intermediate, [up]) or not same(first[1][0].given, x) or not bent(first[0]):
        return
    # Swin V2 adds the residual elsewhere
    second = run(output, first[0], x[..., :1].expand(2, 3, down.out_features)) or run(output, first[0])
    event = next((event for event in second[1] if event.module is down.module), None) if second else None
    if not event or not same(event.given, first[0]) or not by_row(intermediate, x, first[0]):
        return

    def put(layer: FeedforwardLayer) -> nn.Module:
        old = nn.ModuleList([intermediate, down.module])
        block.intermediate, output.dense = layer, nn.Identity()
        return old

    yield MLP(name, block, [up], down, put)


def _within_block(name: str, block: nn.Module) -> Iterator[MLP]:
    """Linear layers that a block calls one after the other, with an activation between them."""
    parts = [part for key in HELD if isinstance(part := getattr(block, key, None), nn.Module)]
    up, down = (_linear(parts[0]), _linear(parts[2])) if len(parts) == len(HELD) else (None, None)
    if not up or not down or up.out_features != down.in_features:
        return
    if not elementwise(parts[1]) or not bends(parts[1]) or not _in_a_row(block, parts, up):
        return

    def put(layer: FeedforwardLayer) -> nn.Module:
        for key, module in zip(HELD, [layer, nn.Identity(), nn.Identity()], strict=True):
            setattr(block, key, module)
        if hasattr(block, DROPPED):
            setattr(block, DROPPED, 0.0)
        return nn.ModuleList([up.module, down.module])

    yield MLP(name, block, [up], down, put)


def _in_a_row(block: nn.Module, parts: list[nn.Module], up: Linear) -> bool:
    """Whether the parts run once, each on what the one before made; in training too, but for dropout of DROPPED."""
    x = probe_rows(up.in_features, up.weights()[0])
    masks = [None] * (required(block) - 1)  # most encoders want one
    dropped = getattr(block, DROPPED, 0.0)
    if not isinstance(dropped, float | int):  # a module, in whose place no number can be put
        return False
    try:
        if dropped:
            setattr(block, DROPPED, 0.0)
        both = [events_of(block, x, *masks, training=training) for training in (False, True)]
    finally:
        if dropped:
            setattr(block, DROPPED, dropped)
    for ran in both:
        at = [index for index, event in enumerate(ran) if event.module in parts]
        row = ran[at[0] : at[0] + len(parts)] if len(at) == len(parts) else []
        if [event.module for event in row] != parts or not all(same(a.made, b.given) for a, b in pairwise(row)):
            return False
    return True


def _only(module: nn.Module, linears: list[Linear]) -> bool:
    """Whether all parameters are those of the linear layers."""
    own = {id(p) for linear in linears for p in linear.module.parameters()}
    return all(id(p) in own for p in module.parameters())


def _of_its_own(name: str, module: nn.Module, model: nn.Module) -> MLP | None:
    """A module that is an MLP and nothing else, as running it shows."""
    linears = [linear for m in module.modules() if (linear := _linear(m))]
    if len(linears) not in (2, 3) or not _only(module, linears) or module is model:
        return None
    for in_features in dict.fromkeys(linear.in_features for linear in linears):
        x = probe_rows(in_features, linears[0].weights()[0])
        if found := run(module, x):
            break
    else:
        return None
    output, events = found
    ran = [index for index, event in enumerate(events) if _linear(event.module)]
    order = [linear for index in ran if (linear := _linear(events[index].module))]
    if {linear.module for linear in order} != {linear.module for linear in linears} or len(order) != len(linears):
        return None
    *ups, last = (events[index] for index in ran)
    *up, down = order
    behind = [event.module for event in events[ran[-1] + 1 :]]
    in_training = run(module, x, training=True)
    if (
        any(u.in_features != up[0].in_features for u in up)
        or [u.out_features for u in up] not in ([down.in_features] * len(up), [2 * down.in_features])
        or not all(same(event.given, x) for event in ups)
        or not same(last.made, output)
        or not bent(last.given)
        or not all(isinstance(m, nn.Dropout | nn.Identity) for m in behind)
        or not in_training
        or not same(in_training[0], output)
        or not by_row(module, x, output)
    ):
        return None
    dropout = next((m for m in behind if isinstance(m, nn.Dropout)), None)

    def put(layer: FeedforwardLayer) -> nn.Module:
        new = nn.Sequential(layer, dropout) if dropout else layer
        for parent in list(model.modules()):  # a module may have several parents, and names
            for key, child in list(parent._modules.items()):
                if child is module:
                    setattr(parent, key, new)
        return module

    return MLP(name, module, up, down, put)

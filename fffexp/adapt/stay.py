"""What stays as it is in a model, and why."""

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import nn

from fffexp.adapt.block import Block, takes
from fffexp.adapt.mlp import MLP, linear_of
from fffexp.adapt.probe import probe_rows, run, same, state_of
from fffexp.layers import FeedforwardLayer, feedforward_layers

Blocks = Callable[[nn.Module, int], Block]

NO_RESIDUAL = "nothing is added to its output, so it is no block's MLP (select takes it)"


def why_not_safe(mlp: MLP, model: nn.Module, blocks: Blocks) -> str:
    """Why the model might compute something else with a layer that computes what this MLP does; "" if it does not."""
    for linear in mlp.linears:
        if not _is_plain(linear.module):
            return f"a linear layer of it is {_opaque(linear.module)}"
    # a plain nn.Sequential runs its parts in a row, but what holds it may run them in another way
    holder = next((m for m in _around(mlp, model) if type(m).forward is not nn.Sequential.forward), None)
    if mlp.run or not holder:
        return ""
    kind, block = type(holder).__name__, blocks(holder, mlp.widths[0])
    equal = block.takes_a_layer(mlp.parts(holder)) if block.inputs else None
    if equal is None:
        return f"{kind} has a forward of its own, which cannot be run alone" if mlp.run is False else ""
    return "" if equal else f"{kind} does more with its parts than to run them in a row"


def why_no_block(mlp: MLP, model: nn.Module, blocks: Blocks) -> str:
    """Why this is not the MLP of a block; "" if it is, or if that cannot be seen."""
    taken, given = mlp.widths
    if taken != given:
        return f"it makes {given} features of {taken}, so it is no block's MLP (select takes it)"
    own = {p for linear in mlp.linears for p in linear.module.parameters()}
    around = [*_around(mlp, model), model]
    for at, holder in enumerate(around):
        if holder is not model and (block := blocks(holder, taken)).inputs:
            if (added := block.adds(mlp.parts(holder), given)) is None:
                continue
            return "" if added else NO_RESIDUAL
        # it cannot be run: of positions, say, what is around it has other weights, and none for as many features
        others = next((others for m in around[at:] if (others := [*{*m.parameters()} - own])), [])
        return "" if not others or any(p.dim() and takes(p) == taken for p in others) else NO_RESIDUAL
    return ""


def each_reason(left: Mapping[str, str]) -> str:
    """What stays, with each reason once."""
    paths: dict[str, list[str]] = {}
    for path, reason in left.items():
        paths.setdefault(reason, []).append(path or "the model")
    more = {reason: f" (and {len(names) - 1} more)" if len(names) > 1 else "" for reason, names in paths.items()}
    return "; ".join(f"{names[0]}{more[reason]}: {reason}" for reason, names in paths.items())


def is_linear(model: nn.Module) -> bool:
    """Whether linear layers hold all the weights, but for scales and biases: then the model itself is an MLP."""
    own = {p for m in model.modules() if linear_of(m) for p in m.parameters()}
    return all(p in own or p.dim() < 2 for p in model.parameters())


def routed_experts(model: nn.Module) -> dict[str, str]:
    """Modules that hold the weights of several experts in one, by path."""
    ours = {m for layer in feedforward_layers(model).values() for m in layer.modules()}
    shapes: dict[str, list[torch.Size]] = {}
    for name, p in model.named_parameters():
        path, _, _ = name.rpartition(".")
        holder = model.get_submodule(path)
        if p.dim() == 3 and len(p) > 1 and holder not in ours and not isinstance(holder, nn.modules.conv._ConvNd):
            # up and down are in one module, or in one each
            at = path if sum(q.dim() == 3 for q in holder.parameters(recurse=False)) > 1 else path.rpartition(".")[0]
            shapes.setdefault(at, []).append(p.shape)
    return {
        name: f"{type(model.get_submodule(name)).__name__} holds routed experts, which are not replaced"
        for name, sizes in shapes.items()
        if any(_up_and_down(a, b) for a, b in permutations(sizes, 2))
    }


def _up_and_down(a: torch.Size, b: torch.Size) -> bool:
    # (experts, hidden or twice that, features) and (experts, features, hidden), or transposed
    pairs = (a[1:], b[1:]), (a[:0:-1], b[:0:-1])
    return a[0] == b[0] and any(
        up[1] == down[0] > 1 and down[1] > 1 and up[0] in (down[1], 2 * down[1]) for up, down in pairs
    )


def opaque_linears(model: nn.Module) -> dict[str, str]:
    """Layers of an MLP's features that are linear, but not by a weight of floating-point numbers, by path."""
    inside = {m for layer in feedforward_layers(model).values() for m in layer.modules()}
    linears: list[tuple[str, nn.Module, int, int]] = []
    for name, module in model.named_modules():
        weight = linear.weight if (linear := linear_of(module)) else None
        keys = ("in_features", "out_features")
        sizes = weight.shape[::-1] if weight is not None else [getattr(module, key, None) for key in keys]
        if module not in inside and all(isinstance(size, int) for size in sizes):
            linears.append((name, module, *sizes))
            inside |= {*module.modules()}
    left: dict[str, str] = {}
    for first, second in (pair for step in (1, 2) for pair in zip(linears, linears[step:], strict=False)):
        (_, _, taken, hidden), (_, _, back, given) = first, second
        if taken == given != back and hidden in (back, 2 * back):  # gated: two up, or both in one
            left |= {name: f"it is {_opaque(m)}" for name, m, _, _ in (first, second) if not linear_of(m)}
    return left


def _opaque(module: nn.Module) -> str:
    kind = type(module.weight if type(module) is nn.Linear else module)
    name = f"{kind.__name__} of {kind.__module__.partition('.')[0]}"
    if any("lora" in key or key == "base_layer" for key in {**module._modules, **module._parameters}):
        return f"wrapped by an adapter ({name}): merge it first (in peft: model = model.merge_and_unload())"
    return f"quantised, or more than a linear layer ({name}): replace first, quantise afterwards"


def _is_plain(module: nn.Module) -> bool:
    # whether it computes what a linear layer of its weight and bias does
    if type(module).forward is nn.Linear.forward or not isinstance(module, nn.Linear):
        return True
    state = state_of(module)
    x = probe_rows(module.in_features, module.weight)
    return "weight" in state and same(F.linear(x, state["weight"], state.get("bias")), run(module, x)[0])


def _around(mlp: MLP, model: nn.Module) -> Iterator[nn.Module]:
    # the modules that hold its place, from the inner to the outer; the model only if it has to be run
    place, parts = mlp.places[0][0], mlp.name.split(".")
    for end in range(len(parts), 0, -1):
        holder = model.get_submodule(".".join(parts[:end]))
        runs = not isinstance(holder, nn.ModuleList | nn.ModuleDict | FeedforwardLayer)
        if runs and place in holder.modules() and (holder is not model):
            yield holder
    if mlp.run is False and place is model:
        yield model

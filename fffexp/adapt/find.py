"""The MLPs of a model, whoever wrote it: what looks like one is run on a few rows, which shows whether it is one."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from itertools import pairwise, permutations, takewhile
from typing import Any

from torch import nn

from fffexp.adapt.block import Block
from fffexp.adapt.mlp import MLP, linear_of
from fffexp.adapt.probe import activates, bent, by_row, probe_rows, run, same
from fffexp.adapt.stay import each_reason, is_linear, opaque_linears, routed_experts, why_no_block, why_not_safe
from fffexp.layers import FeedforwardLayer

Select = Callable[[str, nn.Module], bool]
DROPPED = "activation_dropout"  # a block of OPT, BART and the like drops by a function, at that probability
TORCH = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer


def find_mlps(model: nn.Module, select: Select | None) -> tuple[list[MLP], dict[str, str]]:
    """Those to replace, each once, the outer before the inner; and why others stay, by path.

    Errors are those of `replace_feedforward`.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where nothing can be run: give it weights first")
    found, left = list[MLP](), routed_experts(model) | opaque_linears(model)
    taken: set[nn.Module] = set()
    blocks = lru_cache(4)(Block)  # experts are in one
    for name, module in ((name, module) for name, module in model.named_modules() if module not in taken):
        mlps = (
            _in_sequential(name, module)
            if isinstance(module, nn.Sequential)
            else _in_torch(name, module, model)
            if isinstance(module, TORCH)
            else _in_bert(name, module) or _checked(name, module, model) or _in_block(name, module)
        )
        own = module.modules() if isinstance(module, FeedforwardLayer) else ()
        taken.update(own, *(mlp.old.modules() for mlp in mlps))
        unsafe = {mlp.name: reason for mlp in mlps if (reason := why_not_safe(mlp, model, blocks))}
        found, left = found + [mlp for mlp in mlps if mlp.name not in unsafe], left | unsafe
    if not found:
        none = f"{type(model).__name__} holds no MLP of a known form (see replace_feedforward)"
        raise ValueError(f"{none}; {each_reason(left)}" if left else none)
    if select:
        chosen = [mlp for mlp in found if select(mlp.name, mlp.module)]
        none = f"select takes none of the MLPs: {', '.join(mlp.name or '(the model)' for mlp in found)}"
    else:
        outside = {} if is_linear(model) else {m.name: why for m in found if (why := why_no_block(m, model, blocks))}
        chosen, left = [mlp for mlp in found if mlp.name not in outside], left | outside
        none = f"no block of {type(model).__name__} holds an MLP (see replace_feedforward); {each_reason(outside)}"
    if not chosen:
        raise ValueError(none)
    return chosen, left


def _held(name: str, holder: nn.Module, keys: Sequence[str], old: nn.Module, *others: tuple[Any, ...]) -> list[MLP]:
    # of the first and the last of these attributes, if they fit; those between pass on what they get
    up, down = linear_of(getattr(holder, keys[0])), linear_of(getattr(holder, keys[-1]))
    if not up or not down or len(up.weight) != down.weight.shape[1]:  # replaced before
        return []
    places = [(holder, key, nn.Identity() if index else None) for index, key in enumerate(keys)]
    return [MLP(name, holder, [up, down], old, [*places, *others])]


def _in_sequential(name: str, sequential: nn.Sequential) -> list[MLP]:
    # a linear layer, an activation, perhaps dropout, and a linear layer; the next MLP begins behind that
    found: list[MLP] = []
    children = [(key, child) for key, child in sequential._modules.items() if child is not None]
    behind, linears = 0, [index for index, (_, child) in enumerate(children) if linear_of(child)]
    in_a_row = None if type(sequential).forward is nn.Sequential.forward else False
    for first, last in pairwise(linears):
        row = dict(children[first : last + 1])
        bends = [activates(child) for _, child in children[first + 1 : last]]
        if first >= behind and True in bends and None not in bends:
            path, old = f"{name}.{children[first][0]}".removeprefix("."), nn.Sequential(*row.values())
            mlps = [mlp._replace(run=in_a_row) for mlp in _held(path, sequential, [*row], old)]
            found, behind = found + mlps, last + 1 if mlps else behind
    return found


def _in_torch(name: str, block: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, model: nn.Module) -> list[MLP]:
    # torch's fused inference reads the weights of the linear layers past their modules
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and block in m.layers]
    nested = [(each, "use_nested_tensor", False) for each in encoders]
    fused = [(block, "activation_relu_or_gelu", 0)] if isinstance(block, nn.TransformerEncoderLayer) else []
    old = nn.ModuleList([block.linear1, block.linear2])
    found = _held(name, block, ("linear1", "activation", "dropout", "linear2"), old, *fused, *nested)
    return [mlp._replace(run=type(block) in TORCH) for mlp in found]


def _in_bert(name: str, block: nn.Module) -> list[MLP]:
    # `output` adds a residual behind its linear layer, so the layer goes where `intermediate` was
    intermediate, output = (block._modules.get(key) for key in ("intermediate", "output"))
    if not intermediate or not output or not (down := linear_of(output._modules.get("dense"))):
        return []
    residual, hidden = (probe_rows(size, down.weight) for size in down.weight.shape)
    # Swin V2 adds the residual elsewhere
    events = [event for inputs in ((hidden, residual), (hidden,)) for event in run(output, *inputs)[1]]
    given = next((given for part, given, _ in events if part is down.module), None)
    places = [(block, "intermediate", None), (output, "dense", nn.Identity())]
    mlps = _checked(name, nn.Sequential(intermediate, down.module), block) if same(hidden, given) else []
    return [mlp._replace(module=block, places=places) for mlp in mlps if not mlp.gated]


def _in_block(name: str, block: nn.Module) -> list[MLP]:
    # it holds linear layer, activation, linear layer itself, and is run with a layer in their place; in training too,
    # but for dropout of DROPPED, in whose place a module that drops cannot be put
    parts = {part: key for key, part in block._modules.items() if part is not None}
    linears = [part for part in parts if linear_of(part)]
    # the order of OPT, BART and the like is another
    activations = [part for part in parts if activates(part)] if len(linears) > 1 else []
    if not activations or not isinstance(getattr(block, DROPPED, 0.0), float | int):
        return []
    dropping, undropping = [(block, DROPPED, 0.0)] if hasattr(block, DROPPED) else [], copy(block)
    setattr(undropping, DROPPED, 0.0)
    for up, down in permutations(linears, 2):
        for activation in activations:
            keys = [parts[part] for part in (up, activation, down)]
            for mlp in _held(name, block, keys, nn.ModuleList([up, down]), *dropping):
                runs = Block(undropping, mlp.widths[0])
                if runs.inputs and runs.takes_a_layer([(undropping, key) for key in keys]):
                    return [mlp._replace(run=True)]
    return []


def _checked(name: str, module: nn.Module, model: nn.Module) -> list[MLP]:
    """The module, if it is an MLP and nothing else; the model itself has no place to put another in."""
    linears = {m: linear for m in module.modules() if (linear := linear_of(m))}
    weights = {parameter for m in linears for parameter in m.parameters()}
    if module is model or len(linears) not in (2, 3) or {*module.parameters()} != weights:
        return []
    for _, weight, _ in linears.values():
        x = probe_rows(weight.shape[1], weight)
        output, events = run(module, x)
        if output is not None:
            break
    ran = [part for part, _, _ in events if part in linears]
    if len(ran) != len(linears) or {*ran} != linears.keys():
        return []
    *up, down = (linears[part] for part in ran)
    *inputs, entered = (given for part, given, _ in events if part in linears)
    behind = [part for part, _, _ in takewhile(lambda event: event[0] is not down.module, reversed(events))]
    left = next(made for part, _, made in events if part is down.module)
    widths, hidden = [len(u.weight) for u in up], down.weight.shape[1]
    known = (
        widths in ([hidden] * len(up), [2 * hidden])
        and all(same(x, given) for given in inputs)
        and same(left, output)
        and bent(entered)
        and all(isinstance(m, nn.Dropout | nn.Identity) for m in behind)
        and same(left, run(module, x, training=True)[0])
        and output.shape[:-1] == x.shape[:-1]
        and by_row(module, x, output)
    )
    # it may have several parents, and names
    places = [(m, key, None) for m in model.modules() for key, child in m._modules.items() if known and child is module]
    dropout = next((m for m in behind if isinstance(m, nn.Dropout)), None)
    return [MLP(name, module, [*up, down], module, places, dropout, gated=widths != [hidden])] if known else []

"""The MLPs of a model, whoever wrote it: what looks like one is run on a few rows, which shows whether it is one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from inspect import Parameter, signature
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fffexp.layers import FeedforwardLayer

Select = Callable[[str, nn.Module], bool]
Event = tuple[nn.Module, Tensor, Tensor]  # a module that ran, what it took and what it gave, as they were then
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # 2e-2 of others
# A block of OPT, BART and the like holds linear layer, activation, linear layer; a function drops at that probability
HELD, DROPPED = ("fc1", "activation_fn", "fc2"), "activation_dropout"


class _Linear(NamedTuple):
    module: nn.Module  # an nn.Linear, or a Conv1D of transformers, whose weight is transposed
    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)


class MLP(NamedTuple):
    """Linear layers that are an MLP, one up and one down, or gated: two up, or one of twice the width, and one down."""

    name: str
    module: nn.Module  # what is judged by `select`
    linears: list[_Linear]  # as they run
    old: nn.Module
    places: list[tuple[nn.Module, str, Any]]  # attributes of modules and what they become; None: the layer
    dropout: nn.Module | None = None  # behind the MLP, where it stays
    gated: bool = False  # a product goes down


def find_mlps(model: nn.Module, select: Select | None) -> list[MLP]:
    """Those that are selected, each once, the outer before the inner; errors as of `replace_feedforward`."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where nothing can be run: give it weights first")
    found: list[MLP] = []
    taken: set[nn.Module] = set()
    for name, module in ((name, module) for name, module in model.named_modules() if module not in taken):
        mlps = (
            _in_sequential(name, module)
            if isinstance(module, nn.Sequential)
            else _in_torch(name, module, model)
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
            else _in_bert(name, module) or _checked(name, module, model) or _in_block(name, module)
        )
        found += mlps
        own = module.modules() if isinstance(module, FeedforwardLayer) else ()
        taken.update(own, *(mlp.old.modules() for mlp in mlps))
    if not found:
        raise ValueError(f"{type(model).__name__} holds no MLP of a known form (see replace_feedforward)")
    chosen = [mlp for mlp in found if select is None or select(mlp.name, mlp.module)]
    if not chosen:
        raise ValueError(f"select takes none of the MLPs: {', '.join(mlp.name or '(the model)' for mlp in found)}")
    return chosen


def _linear(module: Any) -> _Linear | None:
    weight, bias = (getattr(module, key, None) for key in ("weight", "bias"))
    dense = isinstance(module, nn.Linear)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not (dense or type(module).__name__ == "Conv1D"):
        return None
    weight = weight if dense else weight.T
    return _Linear(module, weight, weight.new_zeros(len(weight)) if bias is None else bias)


def _held(name: str, holder: nn.Module, keys: Sequence[str], old: nn.Module, *others: tuple[Any, ...]) -> list[MLP]:
    # of the first and the last of these attributes, if they fit; those between pass on what they get
    up, down = _linear(getattr(holder, keys[0])), _linear(getattr(holder, keys[-1]))
    if not up or not down or len(up.weight) != down.weight.shape[1]:  # replaced before
        return []
    places = [(holder, key, nn.Identity() if index else None) for index, key in enumerate(keys)]
    return [MLP(name, holder, [up, down], old, [*places, *others])]


def _in_sequential(name: str, sequential: nn.Sequential) -> list[MLP]:
    # a linear layer, an activation, perhaps dropout, and a linear layer; the next MLP begins behind that
    found: list[MLP] = []
    children = [(key, child) for key, child in sequential._modules.items() if child is not None]
    behind, linears = 0, [index for index, (_, child) in enumerate(children) if _linear(child)]
    for first, last in pairwise(linears):
        row = dict(children[first : last + 1])
        bends = [_activates(child) for _, child in children[first + 1 : last]]
        if first >= behind and True in bends and None not in bends:
            path, old = f"{name}.{children[first][0]}".removeprefix("."), nn.Sequential(*row.values())
            mlps = _held(path, sequential, [*row], old)
            found, behind = found + mlps, last + 1 if mlps else behind
    return found


def _in_torch(name: str, block: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, model: nn.Module) -> list[MLP]:
    # torch's fused inference reads the weights of the linear layers past their modules
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and block in m.layers]
    nested = [(each, "use_nested_tensor", False) for each in encoders]
    fused = [(block, "activation_relu_or_gelu", 0)] if isinstance(block, nn.TransformerEncoderLayer) else []
    old = nn.ModuleList([block.linear1, block.linear2])
    return _held(name, block, ("linear1", "dropout", "activation", "linear2"), old, *fused, *nested)


def _in_bert(name: str, block: nn.Module) -> list[MLP]:
    # `output` adds a residual behind its linear layer, so the layer goes where `intermediate` was
    intermediate, output = (block._modules.get(key) for key in ("intermediate", "output"))
    if not intermediate or not output or not (down := _linear(output._modules.get("dense"))):
        return []
    residual, hidden = (_probe_rows(size, down.weight) for size in down.weight.shape)
    # Swin V2 adds the residual elsewhere
    events = [event for inputs in ((hidden, residual), (hidden,)) for event in _run(output, *inputs)[1]]
    given = next((given for part, given, _ in events if part is down.module), None)
    places = [(block, "intermediate", None), (output, "dense", nn.Identity())]
    mlps = _checked(name, nn.Sequential(intermediate, down.module), block) if _same(hidden, given) else []
    return [mlp._replace(module=block, places=places) for mlp in mlps if not mlp.gated]


def _in_block(name: str, block: nn.Module) -> list[MLP]:
    # they run once, one after the other, each on what the one before made; in training too, but for dropout of DROPPED
    parts = [part for key in HELD if (part := block._modules.get(key))]
    # in the place of a module that drops no number can be put
    if len(parts) != len(HELD) or not isinstance(getattr(block, DROPPED, 0.0), float | int):
        return []
    dropping = [(block, DROPPED, 0.0)] if hasattr(block, DROPPED) else []
    mlps = _held(name, block, HELD, nn.ModuleList(parts[::2]), *dropping)
    if not mlps or not _activates(parts[1]):
        return []
    weight, undropping = mlps[0].linears[0].weight, copy(block)
    setattr(undropping, DROPPED, 0.0)
    for training in (False, True):
        masks = [None] * (required(block) - 1)  # most encoders want one
        _, events = _run(undropping, _probe_rows(weight.shape[1], weight), *masks, training=training)
        at = [index for index, (part, _, _) in enumerate(events) if part in parts]
        row = events[at[0] : at[0] + len(parts)] if len(at) == len(parts) else []
        passed = all(_same(made, given) for (_, _, made), (_, given, _) in pairwise(row))
        if [part for part, _, _ in row] != parts or not passed:
            return []
    return mlps


def _checked(name: str, module: nn.Module, model: nn.Module) -> list[MLP]:
    """The module, if it is an MLP and nothing else; the model itself has no place to put another in."""
    linears = {m: linear for m in module.modules() if (linear := _linear(m))}
    weights = {parameter for m in linears for parameter in m.parameters()}
    if module is model or len(linears) not in (2, 3) or {*module.parameters()} != weights:
        return []
    for _, weight, _ in linears.values():
        x = _probe_rows(weight.shape[1], weight)
        output, events = _run(module, x)
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
        and all(_same(x, given) for given in inputs)
        and _same(left, output)
        and _bent(entered)
        and all(isinstance(m, nn.Dropout | nn.Identity) for m in behind)
        and _same(left, _run(module, x, training=True)[0])
        and output.shape[:-1] == x.shape[:-1]
        and _by_row(module, x, output)
    )
    # it may have several parents, and names
    places = [(m, key, None) for m in model.modules() for key, child in m._modules.items() if known and child is module]
    dropout = next((m for m in behind if isinstance(m, nn.Dropout)), None)
    return [MLP(name, module, [*up, down], module, places, dropout, gated=widths != [hidden])] if known else []


@contextmanager
def watched(module: nn.Module, parts: Iterable[nn.Module]) -> Iterator[list[Event]]:
    """What these parts of a module do; its modes and the random numbers (of CPU and CUDA) are put back on exit."""
    events: list[Event] = []

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None and isinstance(output, Tensor):
            events.append((part, given.clone(), output.clone()))

    mha = torch.backends.mha
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)  # it bypasses the modules
        for m in module.modules():
            stack.callback(setattr, m, "training", m.training)
        for part in parts:
            stack.enter_context(part.register_forward_hook(note, with_kwargs=True))
        yield events


@torch.no_grad()
def _run(module: nn.Module, *inputs: Tensor | None, training: bool = False) -> tuple[Any, list[Event]]:
    # the output, None if it does not take such inputs, and what the innermost modules did; it is left as it was
    innermost = [m for m in module.modules() if not list(m.children())]
    with watched(module, innermost) as events:
        torch.manual_seed(int(training))  # random numbers are others in training
        module.train(training)
        nn.ModuleList(m for m in innermost if isinstance(m, nn.Dropout)).eval()
        given = tuple(None if x is None else x.clone() for x in inputs)
        with suppress(Exception):  # whatever a module of another kind raises
            return functional_call(module, _state(module), given), events
    return None, []


def _state(module: nn.Module) -> dict[str, Tensor]:
    # copies of its buffers, and the same parameters each time: its own may be such that an activation does not show
    generator = torch.Generator("cpu").manual_seed(0)
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for name, p in module.named_parameters():
        if p.is_floating_point():  # quantised weights are left
            # [i, j] is numbers[i + j]: a number for each weight of a large model would take minutes
            numbers = torch.randn(sum(p.shape) + 1, generator=generator, device="cpu") * min(p.shape, default=1) ** -0.5
            state[name] = numbers.to(p.device, p.dtype).as_strided(p.shape, [1] * p.dim()).contiguous()
    return state


def required(module: nn.Module) -> int:
    """Number of positional arguments of `forward` without a default."""
    positional = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.kind in positional and p.default is p.empty for p in signature(module.forward).parameters.values())


def _probe_rows(features: int, like: Tensor) -> Tensor:
    # (2, 3, features): [0, 2] is the sum of [0, 0] and [0, 1], and [1, 0] is zero
    x = torch.sin(torch.arange(6 * features, device=like.device) * 0.7).to(like.dtype).view(2, 3, features)
    x[0, 2], x[1, 0] = x[0, 0] + x[0, 1], 0
    return x


def _same(a: Tensor, b: Any) -> bool:
    rtol = TOLERANCE.get(a.dtype, 2e-2)
    return isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=rtol / 100)


def _bent(hidden: Tensor) -> bool:
    # whether what a module made of _probe_rows is no affine function of them
    difference = hidden[0, 0] + hidden[0, 1] - hidden[0, 2] - hidden[1, 0]
    # of the largest: where a sum is next to nothing, its rounding is not
    return bool(difference.abs().max() > TOLERANCE.get(hidden.dtype, 2e-2) * hidden.abs().max())


def _by_row(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    # whether each row of the output (2, 3, out) comes from that row of x (2, 3, in) alone
    for kept in ((0, 0), (1, 2)):
        other = x + 0.5
        other[kept] = x[kept]
        found, _ = _run(module, other)
        if found is None or found.shape != output.shape or not _same(output[kept], found[kept]):
            return False
    return True


def _activates(module: nn.Module) -> bool | None:
    # whether it is an activation, which dropout is not; None if it does not compute each element for itself
    if next(module.parameters(), None) is not None:
        return None
    x = 4 * _probe_rows(4, torch.empty(0))  # as far out as a ReLU6 bends
    made, rolled = _run(module, x)[0], _run(module, x.flatten().roll(5).view_as(x))[0]
    if not isinstance(made, Tensor) or made.shape != x.shape:
        return None
    return _bent(made) if _same(made.flatten().roll(5).view_as(x), rolled) else None

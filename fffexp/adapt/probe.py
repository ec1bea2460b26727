"""Modules run on a few rows that are made up, with weights that are made up, and left as they were."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Event = tuple[nn.Module, Tensor, Tensor]  # a module that ran, what it took and what it gave, as they were then
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # 2e-2 of others


@contextmanager
def isolated() -> Iterator[None]:
    """Puts random numbers (of CPU and CUDA) back on exit; without torch's fused attention, which bypasses modules."""
    mha = torch.backends.mha
    enabled = mha.get_fastpath_enabled()
    with torch.random.fork_rng():
        mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            mha.set_fastpath_enabled(enabled)


@contextmanager
def watched(module: nn.Module, parts: Iterable[nn.Module]) -> Iterator[list[Event]]:
    """What these parts of a module do; `isolated`, and its modes are put back on exit."""
    events: list[Event] = []

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None and isinstance(output, Tensor):
            events.append((part, given.clone(), output.clone()))

    with ExitStack() as stack:
        stack.enter_context(isolated())
        for m in module.modules():
            stack.callback(setattr, m, "training", m.training)
        for part in parts:
            stack.enter_context(part.register_forward_hook(note, with_kwargs=True))
        yield events


@torch.no_grad()
def run(module: nn.Module, *inputs: Tensor | None, training: bool = False) -> tuple[Any, list[Event]]:
    """The output, None if it does not take such inputs, and what the innermost modules did; it is left as it was."""
    innermost = [m for m in module.modules() if not list(m.children())]
    with watched(module, innermost) as events:
        torch.manual_seed(int(training))  # random numbers are others in training
        module.train(training)
        nn.ModuleList(m for m in innermost if isinstance(m, nn.Dropout)).eval()
        given = tuple(None if x is None else x.clone() for x in inputs)
        with suppress(Exception):  # whatever a module of another kind raises
            return functional_call(module, state_of(module), given), events
    return None, []


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of its buffers, and parameters that are the same each time: its own may hide an activation."""
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


def probe_rows(features: int, like: Tensor) -> Tensor:
    """(2, 3, features): [0, 2] is the sum of [0, 0] and [0, 1], and [1, 0] is zero."""
    x = torch.sin(torch.arange(6 * features, device=like.device) * 0.7).to(like.dtype).view(2, 3, features)
    x[0, 2], x[1, 0] = x[0, 0] + x[0, 1], 0
    return x


def same(a: Tensor, b: Any) -> bool:
    """Whether these are equal but for rounding."""
    rtol = TOLERANCE.get(a.dtype, 2e-2)
    return isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=rtol / 100)


def bent(hidden: Tensor) -> bool:
    """Whether what a module made of probe_rows is no affine function of them."""
    difference = hidden[0, 0] + hidden[0, 1] - hidden[0, 2] - hidden[1, 0]
    # of the largest: where a sum is next to nothing, its rounding is not
    return bool(difference.abs().max() > TOLERANCE.get(hidden.dtype, 2e-2) * hidden.abs().max())


def by_row(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether each row of the output (2, 3, out) comes from that row of x (2, 3, in) alone."""
    for kept in ((0, 0), (1, 2)):
        other = x + 0.5
        other[kept] = x[kept]
        found, _ = run(module, other)
        if found is None or found.shape != output.shape or not same(output[kept], found[kept]):
            return False
    return True


def activates(module: nn.Module) -> bool | None:
    """Whether it is an activation, which dropout is not; None if it does not compute each element for itself."""
    if next(module.parameters(), None) is not None:
        return None
    x = 4 * probe_rows(4, torch.empty(0))  # as far out as a ReLU6 bends
    made, rolled = run(module, x)[0], run(module, x.flatten().roll(5).view_as(x))[0]
    if not isinstance(made, Tensor) or made.shape != x.shape:
        return None
    return bent(made) if same(made.flatten().roll(5).view_as(x), rolled) else None

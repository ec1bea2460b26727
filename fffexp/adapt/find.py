"""What a module of somebody else's does, seen by running it on a few rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Event(NamedTuple):
    """A submodule that ran, what it took and what it gave, as they were then."""

    module: nn.Module
    given: Tensor
    made: Tensor


def probe_rows(features: int, like: Tensor) -> Tensor:
    """(2, 3, features): [0, 2] is the sum of [0, 0] and [0, 1], and [1, 0] is zero."""
    x = torch.sin(torch.arange(6 * features, device=like.device) * 0.7).to(like.dtype).view(2, 3, features)
    x[0, 2], x[1, 0] = x[0, 0] + x[0, 1], 0
    return x


def run(module: nn.Module, *inputs: Tensor, training: bool = False) -> tuple[Tensor, list[Event]] | None:
    """Its output and the events within, without dropout and with `_weights`; None if it does not take such inputs.

    Args:
        module: anything; it is left as it was.
        inputs: positional arguments.
        training: in training mode, but for its dropout modules, and with other random numbers.
    """
    output, events = _run(module, inputs, training)
    return (output, events) if isinstance(output, Tensor) else None


def events_of(module: nn.Module, *inputs: Tensor | None, training: bool = False) -> list[Event]:
    """Those of `run`, whatever the output is; none if it does not take such inputs."""
    return _run(module, inputs, training)[1]


@torch.no_grad()
def _run(module: nn.Module, inputs: Sequence[Tensor | None], training: bool) -> tuple[Any, list[Event]]:
    events: list[Event] = []

    def note(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None and isinstance(output, Tensor):
            events.append(Event(m, given.clone(), output.clone()))

    leaves = [m for m in module.modules() if not list(m.children())]
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in leaves]
    with _restored(module):
        torch.manual_seed(int(training))
        module.train(training)
        for m in leaves:
            if isinstance(m, nn.Dropout):
                m.eval()
        try:
            output = functional_call(module, _weights(module), tuple(None if x is None else x.clone() for x in inputs))
        except Exception:  # whatever a module of another kind raises
            return None, []
        finally:
            for handle in handles:
                handle.remove()
    return output, events


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Random values for its parameters, the same each time: its own may be such that an activation does not show."""
    generator = torch.Generator("cpu").manual_seed(0)
    weights = {}
    for name, p in module.named_parameters():
        if p.is_floating_point():  # quantised weights are left
            # [i, j] is numbers[i + j]: a number for each weight of a large model would take minutes
            numbers = torch.randn(sum(p.shape) + 1, generator=generator, device="cpu") * min(p.shape, default=1) ** -0.5
            weights[name] = numbers.to(p.device, p.dtype).as_strided(p.shape, [1] * p.dim()).contiguous()
    return weights


@contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """Training and evaluation modes are put back on exit."""
    modes = {m: m.training for m in module.modules()}
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Modes, buffers and random numbers (of CPU and CUDA) are put back on exit."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(), modes_restored(module):
        try:
            yield
        finally:
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


def required(module: nn.Module) -> int:
    """Number of positional arguments of `forward` without a default."""
    positional = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.kind in positional and p.default is p.empty for p in signature(module.forward).parameters.values())


def same(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, and values but for rounding."""
    rtol = _tolerance(a)
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=rtol / 100)


def _tolerance(x: Tensor) -> float:
    return 1e-3 if x.dtype in (torch.float32, torch.float64) else 2e-2


def by_row(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether each row of the output (2, 3, out) comes from that row of x (2, 3, in) alone."""
    if output.shape[:-1] != x.shape[:-1]:
        return False
    for kept in ((0, 0), (1, 2)):
        other = (x + 0.5).clone()
        other[kept] = x[kept]
        found = run(module, other)
        if not found or found[0].shape != output.shape or not same(found[0][kept], output[kept]):
            return False
    return True


def bent(hidden: Tensor) -> bool:
    """Whether what came of `probe_rows` is no affine function of them."""
    difference = hidden[0, 0] + hidden[0, 1] - hidden[0, 2] - hidden[1, 0]
    # of the largest: where a sum is next to nothing, its rounding is not
    return bool(difference.abs().max() > _tolerance(hidden) * hidden.abs().max())


def bends(module: nn.Module) -> bool:
    """Whether a module without parameters is an activation in evaluation, which dropout is not."""
    found = run(module, 4 * probe_rows(4, torch.empty(0)))  # as far out as a ReLU6 bends
    return found is not None and bent(found[0])


def elementwise(module: nn.Module) -> bool:
    """Whether a module without parameters computes each element for itself: an activation, dropout or nothing."""
    if any(True for _ in module.parameters()):
        return False
    x = torch.linspace(-2, 2, 24).view(2, 3, 4)
    found, rolled = run(module, x), run(module, x.flatten().roll(5).view_as(x))
    if not found or not rolled or found[0].shape != x.shape:
        return False
    return same(rolled[0], found[0].flatten().roll(5).view_as(x))

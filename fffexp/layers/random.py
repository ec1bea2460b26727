"""Random numbers of training passes: torch's own, and under torch.vmap those that each seed would draw alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_generators: ContextVar[Sequence[torch.Generator]] = ContextVar("seed generators", default=())


@contextmanager
def seed_generators(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Within it a pass under torch.vmap draws from one generator per row of the mapped dimension.

    A row gets the numbers that it would get alone from the device's default generator in the same state. What is drawn
    from has to have the mapped dimension.
    """
    token = _generators.set(generators)
    try:
        yield
    finally:
        _generators.reset(token)


def normal_like(x: Tensor) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of x."""
    return _draw(partial(torch.randn_like, memory_format=torch.contiguous_format), x)


def uniform_like(x: Tensor) -> Tensor:
    """Numbers from [0, 1) of the shape, dtype and device of x."""
    return _draw(partial(torch.rand_like, memory_format=torch.contiguous_format), x)


class Dropout(nn.Dropout):
    """torch's dropout, which draws for each seed under `seed_generators`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or torch.compiler.is_compiling() or not _generators.get():
            return F.dropout(input, self.p, self.training, self.inplace)
        return input * _draw(partial(_mask, p=self.p), input)


def _mask(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """0 or 1 / (1 - p), as F.dropout draws them."""
    ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    if generator is None:
        return F.dropout(ones, p)
    if not x.is_cuda:
        return ones.bernoulli_(1 - p, generator=generator).div_(1 - p)
    # the fused kernel takes its numbers in an order of its own, and no generator
    default = torch.cuda.default_generators[x.device.index]
    kept = default.get_state()
    default.set_state(generator.get_state())
    mask = F.dropout(ones, p)
    generator.set_state(default.get_state())
    default.set_state(kept)
    return mask


def _draw(draw: Callable[..., Tensor], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not _generators.get():
        return draw(x)  # torch.compile takes no generator
    return _PerSeed.apply(x.detach(), draw)


class _PerSeed(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        return draw(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, draw: Callable[..., Tensor]) -> tuple[Tensor, int]:
        rows, generators = x.unbind(in_dims[0]), _generators.get()
        if len(rows) != len(generators):
            raise ValueError(f"there are {len(generators)} seed generators for {len(rows)} rows of torch.vmap")
        return torch.stack([draw(row, generator=each) for row, each in zip(rows, generators, strict=True)]), 0

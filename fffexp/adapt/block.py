"""What a block does around an MLP: a copy of it is run with the MLP as it is, with a layer in its place, without it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from fffexp.adapt.probe import TOLERANCE, isolated, probe_rows, required, same, state_of

Place = tuple[nn.Module, str]  # a module and its attribute
Put = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]  # (what comes in, the MLP) -> what is given instead
Inputs = list[Tensor | None]
WIDE = 4.0  # values that an MLP gives: a sigmoid behind it shows


class _Pass(NamedTuple):
    output: list[Tensor]
    given: list[Tensor]  # what the MLP took
    made: list[Tensor]  # by each operator, the MLP's left out


class Block:
    """A module around MLPs, and inputs that it runs on; `inputs` is None if none of those tried do.

    Each pass runs a copy, so that neither state nor attributes of the module change.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module, self.state = module, dict[str, Tensor]()
        like = next(p for p in module.parameters() if p.is_floating_point()).new_empty(0)
        self.inputs = next((x for x in self._tried(width, like) if self.run(x)), None)
        if self.inputs is not None:  # weights of its own may hide what happens, zeros above all, and rounding may
            wide = torch.promote_types(like.dtype, torch.float32)
            self.state = {name: x.to(wide) for name, x in state_of(module).items() if x.is_floating_point()}
            inputs = [None if x is None else x.to(wide) for x in self.inputs]
            self.inputs = inputs if self.run(inputs) else None

    def _tried(self, width: int, like: Tensor) -> Iterator[Inputs]:
        # rows of an MLP's width or another, as many of another as the MLP takes (it may mix rows), images of channels
        # first and last; what else is required is nothing, or the same
        taken = [takes(p) for p in self.module.parameters() if p.dim()]
        more = max(0, required(self.module) - 1)
        for features in dict.fromkeys([width, taken[0], taken[-1]]):
            image = probe_rows(features * 16, like)[:, 1].view(2, 4, 4, features)
            tried = [probe_rows(features, like), image.permute(0, 3, 1, 2).contiguous(), image]
            if features != width:  # else a block that cannot be run, as a decoder's, would take minutes to fail
                tried.append(probe_rows(features * width, like)[:, 1].view(2, width, features))
            for x in tried:
                yield [x, *[None] * more]
                if more:
                    yield [x, *[x] * more]

    @torch.no_grad()
    def run(
        self, inputs: Inputs, places: Sequence[Place] = (), put: Put | None = None, training: bool = False
    ) -> _Pass | None:
        """One pass, None if it fails; `put` says what the MLP's first part gives, and the others pass it on."""
        with suppress(Exception), isolated():  # whatever a module of another kind raises
            copies: dict[int, Any] = {id(p): p for p in self.module.parameters()}
            twin = copy.deepcopy(self.module, copies).train(training)
            recorded, given = _Recorded(), list[Tensor]()
            if put:
                _join([(copies[id(holder)], key) for holder, key in places], put, given, recorded)
            torch.manual_seed(0)
            with recorded:
                output = functional_call(twin, self.state, tuple(None if x is None else x.clone() for x in inputs))
            return _Pass(_tensors(output), given, recorded.made)
        return None

    def takes_a_layer(self, places: Sequence[Place]) -> bool | None:
        """Whether it gives the same with a layer in the MLP's place that computes the same; None if it calls none."""
        assert self.inputs is not None
        for training in (False, True):
            before = self.run(self.inputs, training=training)
            after = self.run(self.inputs, places, lambda x, mlp: mlp(x), training)
            if not before or not after:
                return None if not before else False
            if not after.given:
                return None
            if not _alike(before.output, after.output):
                return False
            if not all(map(same, before.output, after.output)):
                return False
        return True

    def adds(self, places: Sequence[Place], width: int) -> bool | None:
        """Whether the MLP's output, of this width, is added to what its input is made of; None if not in this module.

        A sum is a value that an input changes by as much whatever the MLP gives, and the other way round.
        """
        assert self.inputs is not None
        x, *more = self.inputs
        assert x is not None
        passes = [
            self.run([rows, *more], places, partial(_made_up, width, phases))
            for rows in (x, 0.7 * x.flip(-1) + 0.1)
            for phases in ((0.0,), (2.0,), (0.0, 2.0))
        ]
        a, b, mean, other_a, other_b, _ = passes
        if not (a and b and mean and other_a and other_b) or not any(x.numel() for x in a.given):
            return None
        if not _alike(a.given, other_a.given):  # what reaches it depends on the input: an expert
            return None
        if all(map(same, a.given, other_a.given)):  # it is made of something else
            return False
        if any(map(_is_sum, a.made, b.made, other_a.made, other_b.made)):
            return True
        alone = all(map(same, a.output, other_a.output))
        straight = all(same((u + v) / 2, w) for u, v, w in zip(a.output, b.output, mean.output, strict=False))
        return None if alone or straight else False


def takes(parameter: Tensor) -> int:
    """Number of features that a weight (out, in, ...), or a scale of each feature, takes."""
    return parameter.shape[min(1, parameter.dim() - 1)]


def _join(places: list[Place], put: Put, given: list[Tensor], recorded: "_Recorded") -> None:
    parts = [getattr(holder, key) for holder, key in places]
    steps = [part.forward if isinstance(part, nn.Module) else part for part in parts]

    def mlp(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    def first(x: Tensor) -> Tensor:
        given.append(x.clone())
        recorded.on = False
        x = put(x, mlp)
        recorded.on = True
        return x

    for (holder, key), part in zip(places, parts, strict=True):
        where = (part, "forward") if isinstance(part, nn.Module) else (holder, key)
        setattr(*where, first if part is parts[0] else _unchanged)


class _Recorded(TorchDispatchMode):
    """Keeps what each operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.on = list[Tensor](), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.on and isinstance(output, Tensor) and output.is_floating_point():
            self.made.append(output.clone())
        return output


def _unchanged(x: Tensor) -> Tensor:
    return x


def _tensors(output: Any) -> list[Tensor]:
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [output] if isinstance(output, Tensor) else [x for part in parts for x in _tensors(part)]


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return [x.shape for x in a] == [x.shape for x in b]


def _made_up(width: int, phases: Sequence[float], x: Tensor, _: object) -> Tensor:
    # (..., width) of each row its own, the mean of those of the phases
    at = torch.arange(x[..., 0].numel() * width, device=x.device)
    y = sum((torch.sin(at * 1.3 + phase) for phase in phases), torch.zeros(())) * (WIDE / len(phases))
    return y.to(x.dtype).view(*x.shape[:-1], width)


def _is_sum(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> bool:
    # whether these, for two outputs of an MLP and two inputs of its block, are a sum of something of each
    if not a.shape == b.shape == other_a.shape == other_b.shape or not a.numel():
        return False
    least = TOLERANCE.get(a.dtype, 2e-2) * a.abs().max()
    by_output, by_input = a - b, a - other_a
    apart = (by_output - (other_a - other_b)).abs().max() < least
    return bool(apart and ((by_output.abs() > least) & (by_input.abs() > least)).double().mean() > 0.5)

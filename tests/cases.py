"""The layers that the contract tests walk over: a new layer adds its line to CASES."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fffexp.kernels.naive import Blocks
from fffexp.layers import (
    FF,
    FFF,
    PEER,
    ExpertChoiceMoE,
    FeedforwardLayer,
    Forest,
    NoisyTopKMoE,
    Shared,
    SigmoidMoE,
    SparseFF,
    SwitchMoE,
    TreeFF,
)

IN, OUT = 6, 4


@dataclass(frozen=True)
class Case:
    """One layer with options.

    Args:
        layer: the class.
        options: what its constructor takes beyond the two sizes.
        sizes: training width and size, inference width and size, parameters, FLOPs at (IN, OUT), by hand.
    """

    layer: type[FeedforwardLayer]
    options: dict[str, Any]
    sizes: tuple[int, int, int, int, int, int]

    def __str__(self) -> str:
        named = {name: getattr(value, "func", value) for name, value in self.options.items()}
        return "-".join([self.layer.__name__, *(f"{n}{getattr(v, '__name__', v)}" for n, v in named.items())])

    def make(self, seed: int = 0, **options: Any) -> Any:
        """The layer with weights that nothing in it could have chosen: no zeros, no small biases."""
        return randomized(self.layer(IN, OUT, **self.options | options), seed)


def randomized(layer: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return layer


def blocks_of(mlp: Any) -> Blocks:
    return Blocks(mlp.hidden_weight, mlp.hidden_bias, mlp.output_weight, mlp.output_bias)


def copy_block(ff: FF, mlp: Any, index: int) -> FF:
    """Give a dense layer the weights of one leaf or expert."""
    copy_dense(ff, mlp.hidden_weight[index], mlp.hidden_bias[index], mlp.output_weight[index], mlp.output_bias[index])
    return ff


def copy_dense(ff: FF, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> FF:
    first, last = ff.network[0], ff.network[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        for parameter, value in ((first.weight, w1), (first.bias, b1), (last.weight, w2.T), (last.bias, b2)):
            parameter.copy_(value)
    return ff


def inputs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, IN, generator=generator, dtype=torch.float64).to(dtype)


def routing_tensors(layer: FeedforwardLayer) -> dict[str, Tensor]:
    routing = layer.routing
    if routing is None:
        return {}
    parts = routing if isinstance(routing, tuple) else (routing,)
    return {f"{index}.{f.name}": getattr(part, f.name) for index, part in enumerate(parts) for f in fields(part)}


def records(layer: FeedforwardLayer) -> bool:
    """Whether training passes leave a routing behind."""
    return bool(layer.aux_losses or layer.metrics)


def loss_of(layer: FeedforwardLayer, output: Tensor) -> Tensor:
    """A loss that every regulariser takes part in."""
    loss = output.float().square().sum()
    for aux_loss in layer.aux_losses.values():
        loss = loss + aux_loss(layer.routing)
    return loss


class Calls(TorchDispatchMode):
    """Counts the operators that run, and the scalars of the largest tensor that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        returned = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max([self.largest, *(t.numel() for t in returned if isinstance(t, Tensor))])
        return result


def product_forms(layer: FeedforwardLayer, x: Tensor) -> set[bool]:
    """Whether the products with chosen rows that a pass makes are compiled (True) or plain torch's."""
    with Forms() as forms:
        layer(x)
    return forms.seen


class Forms(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bool] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.fffexp.gathered_dots.default, torch.ops.fffexp.gathered_sum.default):
            self.seen.add(args[-1])
        return func(*args, **(kwargs or {}))


CASES = (
    # 6*7 + 7 + 7*4 + 4 parameters, 2 * 7 * (6 + 4) operations
    Case(FF, {"width": 7}, (7, 7, 7, 7, 81, 140)),
    Case(SparseFF, {"width": 7}, (7, 7, 7, 7, 81, 140)),
    # 7 nodes * (6 + 1) + 8 leaves * (6*5 + 5 + 5*4 + 4); 2 * (3*6 + 5*10)
    Case(FFF, {"depth": 3, "leaf_width": 5}, (40, 47, 5, 8, 521, 136)),
    Case(FFF, {"depth": 0, "leaf_width": 7}, (7, 7, 7, 7, 81, 140)),
    # 2 * 5*6 + 5 experts * (6*3 + 3 + 3*4 + 4); 2 * (5*6 + 2*3*10)
    Case(NoisyTopKMoE, {"num_experts": 5, "expert_width": 3, "top_k": 2}, (15, 20, 6, 11, 245, 180)),
    # 2 * 3*6 + 3 experts * (6*2 + 2 + 2*4 + 4); 2 * (3*6 + 3*2*10)
    Case(NoisyTopKMoE, {"num_experts": 3, "expert_width": 2, "top_k": 3}, (6, 9, 6, 9, 114, 156)),
    # 5*6 + 5 experts * (6*3 + 3 + 3*4 + 4); 2 * (5*6 + 3*10)
    Case(SwitchMoE, {"num_experts": 5, "expert_width": 3}, (15, 20, 3, 8, 215, 120)),
    # as of Switch, with two experts a sample: 2 * (5*6 + 2*3*10)
    Case(SigmoidMoE, {"num_experts": 5, "expert_width": 3, "top_k": 2}, (15, 20, 6, 11, 215, 180)),
    Case(ExpertChoiceMoE, {"num_experts": 5, "expert_width": 3, "top_k": 2}, (15, 20, 6, 11, 215, 180)),
    # 18 * (6 + 4) + 2*4 * (6 + 2) + (3 + 6) * 2; 2 * (2*4 * 6 + 2 * (3 + 6) * 2 + 2*3 * 10)
    Case(PEER, {"num_experts": 18, "top_k": 3, "heads": 2, "query_width": 4}, (18, 35, 6, 23, 262, 288)),
    # 2 trees * (3 nodes * (6 + 1) + 4 leaves * (6*3 + 3 + 3*4 + 4)) + 6*2 + 2 + 2*4 + 4
    # 2 trees * 2 * (2*6 + 3*10) + 2 * 2*10
    Case(Forest, {"trees": 2, "depth": 2, "leaf_width": 3, "master_width": 2}, (26, 32, 8, 12, 364, 208)),
    # 2 trees * 7 neurons * (6 + 1 + 4) + 4; 2 * 2*3*10
    Case(TreeFF, {"depth": 3, "num_trees": 2}, (14, 14, 6, 6, 158, 120)),
    # 6*2 + 2 + 2*4 + 4, and 3 nodes * (6 + 1) + 4 leaves * (6*3 + 3 + 3*4 + 4); 2 * 2*10 + 2 * (2*6 + 3*10)
    Case(Shared, {"width": 2, "layer": partial(FFF, depth=2, leaf_width=3)}, (14, 17, 5, 7, 195, 124)),
    # the same and 5*6 + 5 experts * (6*3 + 3 + 3*4 + 4); 2 * 2*10 + 2 * (5*6 + 3*10)
    Case(
        Shared,
        {"width": 2, "layer": partial(SwitchMoE, num_experts=5, expert_width=3)},
        (17, 22, 5, 10, 241, 160),
    ),
)

# Options to draw, and the parameters they should give: (inputs, outputs, **options) -> scalars.
DRAWN: dict[type[FeedforwardLayer], tuple[st.SearchStrategy[dict[str, Any]], Callable[..., int]]] = {
    **dict.fromkeys(
        (FF, SparseFF),
        (
            st.fixed_dictionaries({"width": st.integers(1, 9)}),
            lambda i, o, width: width * (i + 1) + (width + 1) * o,
        ),
    ),
    FFF: (
        st.fixed_dictionaries({"depth": st.integers(0, 5), "leaf_width": st.integers(1, 5)}),
        lambda i, o, depth, leaf_width: (
            (2**depth - 1) * (i + 1) + 2**depth * (leaf_width * (i + 1) + (leaf_width + 1) * o)
        ),
    ),
    NoisyTopKMoE: (
        st.integers(1, 6).flatmap(
            lambda experts: st.fixed_dictionaries(
                {
                    "num_experts": st.just(experts),
                    "expert_width": st.integers(1, 5),
                    "top_k": st.integers(1, experts),
                    "trainable": st.just(False),
                }
            )
        ),
        lambda i, o, num_experts, expert_width, top_k, trainable: (
            num_experts * (2 * i + expert_width * (i + 1) + (expert_width + 1) * o)
        ),
    ),
    Forest: (
        st.fixed_dictionaries(
            {
                "trees": st.integers(1, 3),
                "depth": st.integers(0, 3),
                "leaf_width": st.integers(1, 3),
                "master_width": st.integers(0, 3),
            }
        ),
        lambda i, o, trees, depth, leaf_width, master_width: (
            trees * ((2**depth - 1) * (i + 1) + 2**depth * (leaf_width * (i + 1) + (leaf_width + 1) * o))
            + (master_width * (i + 1 + o) + o if master_width else 0)
        ),
    ),
    TreeFF: (
        st.fixed_dictionaries({"depth": st.integers(1, 8), "num_trees": st.integers(1, 3)}),
        lambda i, o, depth, num_trees: num_trees * (2**depth - 1) * (i + 1 + o) + o,
    ),
    **dict.fromkeys(
        (SigmoidMoE, ExpertChoiceMoE),
        (
            st.integers(2, 6).flatmap(
                lambda experts: st.fixed_dictionaries(
                    {
                        "num_experts": st.just(experts),
                        "expert_width": st.integers(1, 5),
                        "top_k": st.integers(2, experts),
                    }
                )
            ),
            lambda i, o, num_experts, expert_width, top_k: (
                num_experts * (i + expert_width * (i + 1) + (expert_width + 1) * o)
            ),
        ),
    ),
    PEER: (
        st.fixed_dictionaries(
            {
                "num_experts": st.sampled_from([4, 8, 9, 16, 18]),
                "top_k": st.integers(1, 4),
                "heads": st.integers(1, 4),
                "query_width": st.sampled_from([2, 4, 6]),
            }
        ),
        lambda i, o, num_experts, top_k, heads, query_width: (
            num_experts * (i + o)
            + heads * query_width * (i + 2)
            + {4: 4, 8: 6, 9: 6, 16: 8, 18: 9}[num_experts] * query_width // 2
        ),
    ),
    Shared: (
        st.fixed_dictionaries(
            {
                "width": st.integers(1, 5),
                "layer": st.builds(partial, st.just(FFF), depth=st.integers(0, 3), leaf_width=st.integers(1, 3)),
            }
        ),
        lambda i, o, width, layer: width * (i + 1 + o) + o + layer(i, o).parameter_count,
    ),
    SwitchMoE: (
        st.fixed_dictionaries({"num_experts": st.integers(1, 6), "expert_width": st.integers(1, 5)}),
        lambda i, o, num_experts, expert_width: num_experts * (i + expert_width * (i + 1) + (expert_width + 1) * o),
    ),
}

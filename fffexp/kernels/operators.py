"""Operators of inference and soft training that compiled kernels implement: C++ on a CPU, Triton on CUDA.

`fffexp::fff`, `fffexp::selected` and `fffexp::route` take rows (B, I) in float32 or bfloat16. torch.compile,
torch.export and autograd see them; gradients come from the products in grouped.py.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from fffexp.kernels.build import BuildError, build
from fffexp.kernels.grouped import grouped_mm, grouped_outer
from fffexp.routing.blocks import block_counts

# what compiled kernels know, by the names that they use
ACTIVATIONS = {"identity": nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}
ACTIVATIONS |= {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}
_NAMES = {(type(value), vars(value).get("approximate")): name for name, value in ACTIVATIONS.items()}

_TREE = "Tensor x, Tensor node_weight, Tensor node_bias"
_BLOCKS = "Tensor hidden_weight, Tensor hidden_bias, Tensor output_weight, Tensor output_bias, str activation"


def _output(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], others[4].shape[2])


_LIBRARY = torch.library.Library("fffexp", "FRAGMENT")
for _schema, _shaped in {
    f"route({_TREE}) -> Tensor": lambda x, *_: x.new_empty(x.shape[0], dtype=torch.long),
    f"selected(Tensor x, Tensor block, Tensor? weights, {_BLOCKS}) -> Tensor": _output,
    f"fff({_TREE}, {_BLOCKS}) -> Tensor": _output,
    # without the detour through autograd's Python, which takes longer than a small batch
    f"fff_inference({_TREE}, {_BLOCKS}) -> Tensor": _output,
    "soft(Tensor z, Tensor logits, Tensor scale, str activation) -> (Tensor, Tensor)": (
        lambda z, logits, *_: (torch.empty_like(z), torch.empty_like(logits))
    ),
    "soft_backward(Tensor grad_h, Tensor grad_weights, Tensor z, Tensor logits, Tensor scale, Tensor? grad_more, "
    "str activation) -> (Tensor, Tensor)": (
        lambda _0, _1, z, logits, *_: (torch.empty_like(z), torch.empty_like(logits))
    ),
}.items():
    _LIBRARY.define(_schema)
    torch.library.register_fake(f"fffexp::{_schema.partition('(')[0]}", _shaped)

# looked up once: a small batch takes no longer than such a look
_FFF, _FFF_INFERENCE = torch.ops.fffexp.fff.default, torch.ops.fffexp.fff_inference.default
selected = torch.ops.fffexp.selected.default


def fff(x_BI: Tensor, *arguments: Any) -> Tensor:
    """(B, O) of hard inference; the arguments are those of the operator `fffexp::fff`."""
    return _FFF(x_BI, *arguments) if torch.is_grad_enabled() else _FFF_INFERENCE(x_BI, *arguments)


def activation_name(module: nn.Module) -> str | None:
    """What the kernels call this activation, or None if they do not know it."""
    return _NAMES.get((type(module), vars(module).get("approximate")))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # a graph is traced for one backend
def available(backend: str = "native") -> bool:
    """Whether a backend's operators are loaded; the first call builds them, or says once why they cannot be had."""
    return _load(backend)


@functools.cache
def _load(backend: str) -> bool:
    try:
        if backend == "native":
            torch.ops.load_library(build())
        else:
            import fffexp.kernels.triton_kernels  # noqa: F401 # registers them
    except (BuildError, ImportError, OSError) as error:
        print(f"fffexp: {error}; plain PyTorch serves, more slowly", file=sys.stderr)
        return False
    return True


def backend_of(weight: Tensor, activation: str | None) -> str | None:
    """The compiled backend that serves weights like this one: "native", "triton" or None."""
    backend = "native" if weight.is_cpu else "triton" if weight.is_cuda else None
    known = backend and activation is not None and weight.dtype in (torch.float32, torch.bfloat16)
    return backend if known and available(backend) else None


@register_flop_formula(torch.ops.fffexp.route)
def _route_flops(x: torch.Size, nodes: torch.Size, *_: Any, **options: Any) -> int:
    return 2 * x[0] * nodes[0].bit_length() * x[1]


@register_flop_formula(torch.ops.fffexp.selected)
def _selected_flops(_0: Any, block: Sequence[int], _1: Any, hidden: torch.Size, *rest: Any, **options: Any) -> int:
    return 2 * block[0] * block[1] * hidden[1] * (hidden[2] + rest[1][2])


@register_flop_formula([torch.ops.fffexp.fff, torch.ops.fffexp.fff_inference])
def _fff_flops(x: torch.Size, nodes: torch.Size, *rest: Any, **options: Any) -> int:
    return _route_flops(x, nodes) + _selected_flops(x, (x[0], 1), *rest)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _selected_backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    x, block, weights, *blocks = ctx.saved_tensors
    grad_x, grad_weights, *grads = _gradients(grad_BO, x, block, weights, blocks, ctx.activation)
    return grad_x, None, grad_weights, *grads, None


def _fff_backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    x, node_weight, node_bias, *blocks = ctx.saved_tensors
    leaf = torch.ops.fffexp.route(x, node_weight, node_bias)
    grad_x, _, *grads = _gradients(grad_BO, x, leaf.unsqueeze(1), None, blocks, ctx.activation)
    # hard decisions: a node's gradient is zero almost everywhere
    return grad_x, None, None, *grads, None


torch.library.register_autograd("fffexp::selected", _selected_backward, setup_context=_setup)
torch.library.register_autograd("fffexp::fff", _fff_backward, setup_context=_setup)


def _gradients(
    grad_BO: Tensor, x_BI: Tensor, block_BK: Tensor, weights_BK: Tensor | None, blocks: list[Tensor], activation: str
) -> tuple[Tensor | None, ...]:
    # of x, the weights and the blocks' four tensors; hidden activations are computed again, grouped by block
    w1, b1, w2, b2 = blocks
    k = block_BK.shape[1]
    block_R, order_R = block_BK.flatten().sort(stable=True)
    sample_R = order_R // k
    ends_G = block_counts(block_R, len(w1)).cumsum(0)
    x_RI, grad_RO = x_BI[sample_R], grad_BO[sample_R]
    z_RH = grouped_mm(x_RI, w1.mT, ends_G) + b1[block_R]
    h_RH, derive = torch.func.vjp(ACTIVATIONS[activation], z_RH)  # type: ignore[misc] # three with has_aux alone
    grad_weights = None
    if weights_BK is not None:
        y_RO = grouped_mm(h_RH, w2, ends_G) + b2[block_R]
        flat = (y_RO.float() * grad_RO.float()).sum(1)
        grad_weights = torch.zeros_like(flat).index_copy(0, order_R, flat).view_as(weights_BK).to(weights_BK.dtype)
        grad_RO = grad_RO * weights_BK.flatten()[order_R].to(grad_RO.dtype).unsqueeze(1)
    (grad_z,) = derive(grouped_mm(grad_RO, w2.mT, ends_G))
    grad_x = torch.zeros_like(x_BI).index_add(0, sample_R, grouped_mm(grad_z, w1, ends_G))
    grad_b1 = torch.zeros_like(b1).index_add(0, block_R, grad_z)
    grad_b2 = torch.zeros_like(b2).index_add(0, block_R, grad_RO)
    grad_w1, grad_w2 = grouped_outer(grad_z, x_RI, ends_G), grouped_outer(h_RH, grad_RO, ends_G)
    return grad_x, grad_weights, grad_w1, grad_b1, grad_w2, grad_b2

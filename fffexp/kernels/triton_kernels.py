"""The operators of inference on CUDA: one kernel does all for a row; one routes, one evaluates rows grouped by block.

Trees whose nodes are the neurons have a kernel of their own, which walks down them for a row and a span of its outputs.

Shape suffixes: E entries (row times choice), T tiles of entries of one block, G blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fffexp.routing.blocks import block_counts

ROUTE_ROWS, ROUTE_INPUTS, ROW_HIDDEN, ROW_SPAN = 4, 256, 16, 512
TREE_INPUTS, TREE_OUTPUTS = 1024, 1024
TILE_ROWS, TILE_HIDDEN, TILE_INPUTS, TILE_OUTPUTS = 16, 64, 64, 64  # a matrix unit takes 16 rows or more
# Bytes of their leaves or experts that all rows read, up to which each reads its own.
ROW_BYTES = 2**31


@triton.jit
def _load(matrix, r, live, c, columns):
    return tl.load(matrix + r[:, None] * columns + c[None, :], mask=live[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def _leaf(x, weight, bias, r, live, inputs, DEPTH: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr):
    position = tl.zeros([ROWS], tl.int64)
    for level in range(DEPTH):
        node = position + ((1 << level) - 1)
        products = tl.zeros([ROWS, INPUTS], tl.float32)
        for start in range(0, inputs, INPUTS):
            i = start + tl.arange(0, INPUTS)
            a = _load(x, r, live, i, inputs).to(tl.float32)
            products += a * _load(weight, node, live, i, inputs).to(tl.float32)
        logit = tl.sum(products, 1) + tl.load(bias + node, mask=live, other=0.0).to(tl.float32)
        position = 2 * position + (logit >= 0).to(tl.int64)
    return position


@triton.jit
def _route_kernel(x, weight, bias, leaf, rows, inputs, DEPTH: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    tl.store(leaf + r, _leaf(x, weight, bias, r, live, inputs, DEPTH, ROWS, INPUTS), mask=live)


@triton.jit
def _tanh(z):
    return 1 - 2 / (tl.exp(2 * z) + 1)


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # in this form NaN stays NaN
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = 0.5 * z * (1 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    return z


@triton.jit
def _evaluate_kernel(
    x, order, block, first, end, gates, w1, b1, w2, b2, y, choices, inputs, width, outputs,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    begin, stop = tl.load(first + tile), tl.load(end + tile)
    if begin < stop:
        g = tl.load(block + tile)
        e = begin + tl.arange(0, ROWS)
        live = e < stop
        entry = tl.load(order + e, mask=live, other=0)
        sample = entry // choices
        gate = tl.load(gates + entry, mask=live, other=0.0).to(tl.float32) if GATED else tl.full([ROWS], 1, tl.float32)
        for hidden in range(0, width, HIDDEN):
            j = hidden + tl.arange(0, HIDDEN)
            inside = j < width
            z = tl.zeros([ROWS, HIDDEN], tl.float32)
            for start in range(0, inputs, INPUTS):
                i = start + tl.arange(0, INPUTS)
                at = w1 + (g * width + j[None, :]) * inputs + i[:, None]
                w = tl.load(at, mask=inside[None, :] & (i < inputs)[:, None], other=0.0)
                z = tl.dot(_load(x, sample, live, i, inputs), w, z, input_precision=PRECISION)
            z += tl.load(b1 + g * width + j, mask=inside, other=0.0).to(tl.float32)[None, :]
            h = _activated(z, ACTIVATION) * gate[:, None]
            h = tl.where(inside[None, :], h, 0.0)  # an activation need not be 0 at 0
            for start in range(0, outputs, OUTPUTS):
                o = start + tl.arange(0, OUTPUTS)
                known = o < outputs
                w = _load(w2, g * width + j, inside, o, outputs)
                if hidden == 0:
                    part = gate[:, None] * tl.load(b2 + g * outputs + o, mask=known, other=0.0).to(tl.float32)[None, :]
                else:
                    part = _load(y, entry, live, o, outputs)
                part = tl.dot(h.to(w.dtype), w, part, input_precision=PRECISION)
                tl.store(y + entry[:, None] * outputs + o[None, :], part, mask=live[:, None] & known[None, :])


@triton.jit
def _row_kernel(
    x, node_weight, node_bias, block, gates, w1, b1, w2, b2, y, inputs, width, outputs,
    CHOICES: tl.constexpr, DEPTH: tl.constexpr, ROUTED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HIDDEN: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = row + tl.arange(0, 1)
    for choice in range(CHOICES):
        if ROUTED:
            g = tl.load(block + row * CHOICES + choice)
        else:
            g = tl.sum(_leaf(x, node_weight, node_bias, r, r == row, inputs, DEPTH, 1, INPUTS), 0)
        gate = tl.load(gates + row * CHOICES + choice).to(tl.float32) if GATED else 1.0
        for hidden in range(0, width, HIDDEN):
            j = hidden + tl.arange(0, HIDDEN)
            inside = j < width
            z = tl.load(b1 + g * width + j, mask=inside, other=0.0).to(tl.float32)
            for start in range(0, inputs, INPUTS):
                i = start + tl.arange(0, INPUTS)
                a = tl.load(x + row * inputs + i, mask=i < inputs, other=0.0).to(tl.float32)
                z += tl.sum(_load(w1, g * width + j, inside, i, inputs).to(tl.float32) * a[None, :], 1)
            h = tl.where(inside, _activated(z, ACTIVATION) * gate, 0.0)  # an activation need not be 0 at 0
            for start in range(0, outputs, OUTPUTS):
                o = start + tl.arange(0, OUTPUTS)
                known = o < outputs
                part = tl.sum(_load(w2, g * width + j, inside, o, outputs).to(tl.float32) * h[:, None], 0)
                if hidden == 0:
                    part += gate * tl.load(b2 + g * outputs + o, mask=known, other=0.0).to(tl.float32)
                if hidden > 0 or choice > 0:
                    part += tl.load(y + row * outputs + o, mask=known, other=0.0)
                tl.store(y + row * outputs + o, part, mask=known)
                tl.debug_barrier()  # read again for the next neurons, perhaps by another thread


@triton.jit
def _tree_kernel(
    x, node_weight, node_bias, output_weight, output_bias, y, inputs, outputs,
    TREES: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = row + tl.arange(0, 1)
    live = r == row
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.load(output_bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    for tree in range(TREES):
        root = tree * ((1 << DEPTH) - 1)
        node = tl.zeros([1], tl.int64)
        for _ in range(DEPTH):
            products = tl.zeros([1, INPUTS], tl.float32)
            for start in range(0, inputs, INPUTS):
                i = start + tl.arange(0, INPUTS)
                a = _load(x, r, live, i, inputs).to(tl.float32)
                products += a * _load(node_weight, root + node, live, i, inputs).to(tl.float32)
            z = tl.sum(products, 1) + tl.load(node_bias + root + node).to(tl.float32)
            w = _load(output_weight, root + node, live, o, outputs).to(tl.float32)
            total += _activated(z, ACTIVATION)[:, None] * w
            node = 2 * node + 1 + (z >= 0).to(tl.int64)
    tl.store(y + r[:, None] * outputs + o[None, :], total, mask=(o < outputs)[None, :])


def _by_row(x: Tensor, nodes: Any, block: Tensor | None, weights: Tensor | None, blocks: tuple[Any, ...]) -> Tensor:
    # one launch, and a row reads all of its own weights: for batches that gain nothing by grouping
    *tensors, activation = blocks
    (groups, width, inputs), outputs = tensors[0].shape, tensors[2].shape[2]
    choices = 1 if block is None else block.shape[1]
    y = torch.empty(len(x), outputs, dtype=torch.float32, device=x.device)
    given = (x, *(nodes or (x, x)), x if block is None else block, x if weights is None else weights, *tensors)
    if len(x):
        _row_kernel[(len(x),)](
            *(*(tensor.contiguous() for tensor in given), y, inputs, width, outputs),
            *(choices, groups.bit_length() - 1 if nodes else 0, block is not None, weights is not None, activation),
            min(ROW_HIDDEN, triton.next_power_of_2(width)),
            *(min(ROW_SPAN, triton.next_power_of_2(size)) for size in (inputs, outputs)),
        )
    return y.to(x.dtype)


def _few(entries: int, hidden_weight: Tensor, _: Tensor, output_weight: Tensor, *__: Any) -> bool:
    return entries * (hidden_weight[0].nbytes + output_weight[0].nbytes) <= ROW_BYTES


def route(x: Tensor, node_weight: Tensor, node_bias: Tensor) -> Tensor:
    """(B,) leaf of each row by hard decisions."""
    leaf = torch.empty(len(x), dtype=torch.long, device=x.device)
    if len(x):
        given = (tensor.contiguous() for tensor in (x.to(node_weight.dtype), node_weight, node_bias))
        shape = (len(x), x.shape[1], len(node_weight).bit_length(), ROUTE_ROWS, ROUTE_INPUTS)
        _route_kernel[(triton.cdiv(len(x), ROUTE_ROWS),)](*given, leaf, *shape)
    return leaf


def selected(x: Tensor, block: Tensor, weights: Tensor | None, *blocks: Any) -> Tensor:
    """(B, O): for each row its (B, K) blocks, summed by weight; `blocks` are their four tensors and the activation."""
    *tensors, activation = blocks
    x, (batch, choices), (groups, width, inputs) = x.to(tensors[0].dtype), block.shape, tensors[0].shape
    entries, outputs = batch * choices, tensors[2].shape[2]
    if _few(entries, *tensors):
        return _by_row(x, (), block, weights, blocks)
    block_E, order_E = block.flatten().sort(stable=True)
    y = torch.empty(entries, outputs, dtype=torch.float32, device=x.device)
    # Tiles of each block's entries, without asking the device how many there are: the rest are empty.
    count_G = block_counts(block_E, groups)
    end_G, tiles_G = count_G.cumsum(0), (count_G + TILE_ROWS - 1) // TILE_ROWS
    last_G = tiles_G.cumsum(0)
    tile_T = torch.arange(triton.cdiv(entries, TILE_ROWS) + min(groups, entries), device=x.device)
    block_T = torch.searchsorted(last_G, tile_T, right=True).clamp_(max=groups - 1)
    first_T = (end_G - count_G)[block_T] + (tile_T - (last_G - tiles_G)[block_T]) * TILE_ROWS
    gates = x if weights is None else weights
    _evaluate_kernel[(len(tile_T),)](
        *(x.contiguous(), order_E, block_T, first_T, end_G[block_T]),
        *(*(tensor.contiguous() for tensor in (gates, *tensors)), y, choices, inputs, width, outputs),
        *(weights is not None, activation, "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"),
        *(TILE_ROWS, min(TILE_HIDDEN, max(16, triton.next_power_of_2(width))), TILE_INPUTS, TILE_OUTPUTS),
    )
    return y.view(batch, choices, outputs).sum(1).to(x.dtype) if choices > 1 else y.to(x.dtype)


def fff(x: Tensor, node_weight: Tensor, node_bias: Tensor, *blocks: Any) -> Tensor:
    """(B, O) of hard decisions; they are those of `route`, which the backward pass asks as well."""
    return selected(x, route(x, node_weight, node_bias).unsqueeze(1), None, *blocks)


def fff_inference(x: Tensor, node_weight: Tensor, node_bias: Tensor, *blocks: Any) -> Tensor:
    """(B, O) of hard decisions, without gradients."""
    if _few(len(x), *blocks):
        return _by_row(x.to(node_weight.dtype), (node_weight, node_bias), None, None, blocks)
    return fff(x, node_weight, node_bias, *blocks)


def tree_ff(x: Tensor, *arguments: Any) -> Tensor:
    """(B, O) of the neurons on the paths; the arguments are those of the operator."""
    *tensors, activation = arguments
    trees, neurons, inputs = tensors[0].shape
    outputs = len(tensors[3])
    y = torch.empty(len(x), outputs, dtype=tensors[0].dtype, device=x.device)
    if len(x):
        given = (tensor.contiguous() for tensor in (x.to(y.dtype), *tensors))
        spans = (min(most, triton.next_power_of_2(n)) for most, n in ((TREE_INPUTS, inputs), (TREE_OUTPUTS, outputs)))
        shape = (inputs, outputs, trees, neurons.bit_length(), activation, *spans)
        _tree_kernel[(len(x), triton.cdiv(outputs, TREE_OUTPUTS))](*given, y, *shape)
    return y


def tree_ff_inference(x: Tensor, *arguments: Any) -> Tensor:
    """(B, O) as of `tree_ff`, without gradients."""
    return tree_ff(x, *arguments)


def _there(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return function(x, *others)


_LIBRARY = torch.library.Library("fffexp", "IMPL")  # what it registers goes with it
for _function in (route, selected, fff, fff_inference, tree_ff, tree_ff_inference):
    _LIBRARY.impl(_function.__name__, functools.partial(_there, _function), "CUDA")

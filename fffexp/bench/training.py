"""`fffexp bench training`: a soft training step, its forward, backward and optimizer timed apart."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fffexp.bench.contenders import PEER, TOLERANCES, Contender, Point, inputs, make
from fffexp.bench.inference import describe, percentiles, visited_share
from fffexp.bench.machine import Limits
from fffexp.bench.records import Record
from fffexp.layers import FFF, FeedforwardLayer
from fffexp.timing import exclusive_timing, synchronize

SPARSE: tuple[Literal["chosen_leaf", "chosen_path"], ...] = ("chosen_leaf", "chosen_path")
POINT_S = 3.0
MIN_ROUNDS, MAX_ROUNDS = 5, 51
CHECKED_ROWS = 8
# The truth in float64 is computed for layers up to this size.
CHECKED_SCALARS = 2**24


@dataclass
class Step:
    """One training step; SGD, the cheapest optimizer, hides least of what the layer costs."""

    module: nn.Module
    layer: FeedforwardLayer
    device: str

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-9)

    def run(self, x: Tensor, grad: Tensor) -> tuple[float, float, float]:
        """Seconds of forward, backward and optimizer."""
        self.optimizer.zero_grad()
        begun = time.perf_counter()
        output = self.module(x)
        synchronize(self.device)
        forward = time.perf_counter()
        output.backward(grad)
        synchronize(self.device)
        backward = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        done = time.perf_counter()
        self.layer.routing = None
        return forward - begun, backward - forward, done - backward


def run_point(
    names: Sequence[str], point: Point, batch_sizes: Sequence[int], limits: dict[int, Limits], peers: bool
) -> Iterator[Record]:
    """Records of all layers, of one depth, at every batch size and number of threads."""
    for batch_size, threads in itertools.product(batch_sizes, limits):
        torch.set_num_threads(threads)
        contenders = make(names, point, peers)
        contenders += _sparse(contenders, point)
        for contender in contenders:
            if contender.name != PEER:
                contender.layer.train()
                contender.backend = contender.layer.training_backend(inputs(point, 1, 1)[0])
        yield from _measure(contenders, point, batch_size, threads, limits[threads])


def _sparse(contenders: Sequence[Contender], point: Point) -> list[Contender]:
    """The two ways to train the chosen leaves alone, on the weights of the soft FFF."""
    twins = []
    for layer in (c.layer for c in contenders if isinstance(c.layer, FFF) and c.name == "FFF"):
        for mode in SPARSE:
            with torch.device("meta"):
                twin = FFF(point.in_features, point.out_features, point.depth, point.leaf_width, trained=mode)
            twin.leaves, twin.node_weight, twin.node_bias = layer.leaves, layer.node_weight, layer.node_bias
            twin.inverse_temperature = layer.inverse_temperature
            twins.append(Contender(f"FFF {mode}", "sparse", twin, twin, twin.forward_reference))
    return twins


def _measure(
    contenders: list[Contender], point: Point, batch_size: int, threads: int, limits: Limits
) -> Iterator[Record]:
    batches = inputs(point, batch_size, 8)
    errors = {c.name: _check(c, batches[0]) for c in contenders}
    steps = {}
    for contender in contenders:
        module = contender.module
        assert isinstance(module, nn.Module)
        steps[contender.name] = Step(module.train(), contender.layer, point.device)
    grads = inputs(point, batch_size, 8) if point.in_features == point.out_features else None
    grads = grads or [torch.randn(batch_size, point.out_features, dtype=point.dtype, device=point.device)] * 8
    parts: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    with exclusive_timing():
        for x, grad in zip(batches[:2], grads[:2], strict=True):
            for step in steps.values():
                step.run(x, grad)
        begun = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() - begun > POINT_S:
                break
            for name, step in steps.items():
                parts[name].append(step.run(batches[done % 8], grads[done % 8]))
    for contender in contenders:
        yield _record(contender, point, batch_size, threads, limits, parts, errors[contender.name], batches)


def _record(
    contender: Contender,
    point: Point,
    batch_size: int,
    threads: int,
    limits: Limits,
    parts: dict[str, list[tuple[float, float, float]]],
    error: float,
    batches: list[Tensor],
) -> Record:
    layer, name = contender.layer, contender.name
    totals = {each: [sum(part) for part in rounds] for each, rounds in parts.items()}
    forward, backward, optimizer = (statistics.median(column) for column in zip(*parts[name], strict=True))
    sparse, moe = layer.sparse_gradients, name == "NoisyTopKMoE"
    width = layer.inference_width if sparse or moe else layer.training_width
    # forward, the weights' gradients and the hidden activations'; the input needs none
    dense = 2 * width * (point.in_features + point.out_features)
    nodes = 2 * (layer.training_size - layer.training_width) * point.in_features  # a MoE's gate, and its noise
    passes = 4 if moe else 2
    if sparse:
        nodes = 2 * point.depth * point.in_features
        passes = (
            1 if isinstance(layer, FFF) and layer.trained == "chosen_leaf" else 3
        )  # routing, logits, their gradients
    flops = batch_size * (2 * dense + 2 * width * point.out_features + passes * nodes)
    weights = layer.weights_read(batches[0]) if sparse or moe else layer.parameter_count
    scalars = 3 * weights + 2 * batch_size * (point.in_features + point.out_features)
    size = scalars * point.dtype.itemsize

    def over(other: str) -> float | None:
        if other not in totals or other == name:
            return None
        return statistics.median(a / b for a, b in zip(totals[other], totals[name], strict=True))

    return Record(
        task="training",
        **describe(contender, point, batch_size, threads),
        **percentiles(totals[name]),
        flops=flops,
        bytes=size,
        limit_s=max(flops / limits.gemm_flops_per_s, size / limits.read_bytes_per_s),
        max_abs_error=error,
        visited_share=visited_share(layer.route, batches, layer.num_experts) if sparse or moe else 1.0,
        speedup_over_ff=over("FF"),
        speedup_over_moe=over("NoisyTopKMoE") if name == "FFF" else None,
        speedup_over_peer=over(PEER) if name == "FFF" else None,
        forward_s=forward,
        backward_s=backward,
        optimizer_s=optimizer,
        operations_over_ff=(dense + nodes) / dense if name == "FFF" else None,
    )


def _check(contender: Contender, x: Tensor) -> float:
    """Largest error of outputs and gradients of a soft pass over a few rows, as a share of what is allowed.

    Raises:
        RuntimeError: it is too large: nothing of this layer may be timed.
    """
    layer, rows, asked = contender.layer, x[:CHECKED_ROWS], contender.layer.backend
    if layer.parameter_count > CHECKED_SCALARS:
        rows = x[:1]
    soft: Literal["soft", "hard"] = "soft" if layer.has_soft_mode else "hard"
    module: Callable[[Tensor], Tensor] = contender.module
    assert isinstance(module, nn.Module)
    if contender.name == PEER or layer.sparse_gradients:
        module.train()
        soft = "soft" if contender.name == PEER else "hard"
    else:
        layer.routing_mode = "soft"
        layer.eval()  # the noise of a gate is not compared
        if not layer.has_soft_mode:
            layer.backend = "eager"  # what trains, where inference has another
    output = module(rows)
    truth = layer.forward_reference(rows, soft)
    error = float((output.double() - truth).abs().max().detach())
    allowed = TOLERANCES[x.dtype] * max(1.0, float(truth.abs().max().detach()))
    if not error <= allowed:
        raise RuntimeError(f"{contender.name} is off by {error:.3g} in training, allowed {allowed:.3g}: not timed")
    grad = torch.ones_like(output)
    if layer.parameter_count <= CHECKED_SCALARS and contender.name != PEER:
        found, wanted = (
            torch.autograd.grad(
                y, list(layer.parameters()), grad.to(y.dtype), allow_unused=True, materialize_grads=True
            )
            for y in (output, truth)
        )
        chosen = isinstance(layer, FFF) and layer.trained == "chosen_path"
        for (parameter, _), a, b in zip(layer.named_parameters(), found, wanted, strict=True):
            if not b.numel() or (chosen and parameter.startswith("node")):  # hard decisions have no gradient
                continue
            bound = 10 * TOLERANCES[x.dtype] * max(1.0, float(b.abs().max()))
            if not float((a.to_dense().double() - b.double()).abs().max()) <= bound:
                raise RuntimeError(f"{contender.name} has a wrong gradient in training: not timed")
    layer.routing_mode, layer.backend = "auto", asked
    layer.train()
    return error

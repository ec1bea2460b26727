"""Training steps of layers of equal training width: forward, backward and optimizer timed apart."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fffexp.bench.contenders import Contender, Point, make
from fffexp.bench.inference import visited_share
from fffexp.bench.machine import Limits
from fffexp.bench.records import Record, describe, make_record, speedups
from fffexp.timing import interleaved, synchronize

CHECKED_ROWS = 8
# The truth in float64 is computed for layers up to this size.
CHECKED_SCALARS = 2**24


class Step:
    """One training step a call; SGD, the cheapest optimizer, hides least of what the layer costs."""

    def __init__(self, contender: Contender, batches: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.module, self.layer = contender.module.train(), contender.layer
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-9)
        self.inputs = itertools.cycle(zip(batches, grads, strict=True))
        self.parts: list[tuple[float, float, float]] = []  # seconds of forward, backward and optimizer

    def __call__(self) -> None:
        """Run it on the next inputs."""
        x, grad = next(self.inputs)
        self.optimizer.zero_grad()
        times = [time.perf_counter()]
        output = self.module(x)
        self._mark(times, x)
        output.backward(grad)
        self._mark(times, x)
        self.optimizer.step()
        self._mark(times, x)
        self.layer.routing = None
        self.parts.append((times[1] - times[0], times[2] - times[1], times[3] - times[2]))

    def _mark(self, times: list[float], x: Tensor) -> None:
        synchronize(x.device)
        times.append(time.perf_counter())


def run_point(
    names: Sequence[str],
    point: Point,
    batch_sizes: Sequence[int],
    limits: Mapping[int, Limits],
    peers: bool = False,
    done: Callable[[Mapping[str, Any]], bool] = lambda timed: False,
    seconds: float = 3.0,
) -> Iterator[Record]:
    """Records of all layers, of one depth, at every batch size and number of threads; arguments as of inference."""
    contenders = make(names, point, peers)
    for c in [c for c in contenders if not c.is_peer]:
        for name, form in c.layer.training_forms().items():
            contenders.append(Contender(f"{c.name} {name}", "", form, form, form.forward_reference))
    for c in [c for c in contenders if not c.is_peer]:
        c.layer.train()
        c.backend = c.layer.training_backend(point.inputs(1, 1)[0])
    for batch_size, threads in itertools.product(batch_sizes, limits):
        timed = {c.name: describe("training", c, point, batch_size, threads) for c in contenders}
        wanted = {c.name for c in contenders if not done(timed[c.name])}
        records = _measure(contenders, point, timed, limits[threads], seconds) if wanted else []
        yield from (record for record in records if record.layer in wanted)


def _measure(
    contenders: Sequence[Contender], point: Point, timed: Mapping[str, dict[str, Any]], limits: Limits, point_s: float
) -> Iterator[Record]:
    batch_size, threads = (timed[contenders[0].name][name] for name in ("batch_size", "threads"))
    batches = point.inputs(batch_size, 8)
    errors = {c.name: check(c, batches[0]) for c in contenders}
    grads = [torch.randn(batch_size, point.out_features, dtype=point.dtype, device=point.device) for _ in batches]
    steps = {c.name: Step(c, batches, grads) for c in contenders}
    seconds = interleaved(steps, point_s, device=point.device, threads=threads, rounds=(5, 51), block_s=0)
    for c in contenders:
        layer, everything = c.layer, c.layer.trains_all_experts
        forward, backward, optimizer = (
            statistics.median(column) for column in zip(*steps[c.name].parts[-len(seconds[c.name]) :], strict=True)
        )
        weights = layer.parameter_count if everything else layer.weights_read(batches[0])
        scalars = 3 * weights + 2 * batch_size * (point.in_features + point.out_features)
        dense = layer.training_width * (point.in_features + point.out_features)
        deciding = (layer.training_size - layer.training_width) * point.in_features
        yield make_record(
            timed[c.name],
            c,
            seconds,
            limits,
            flops=batch_size * layer.training_flops_per_sample,
            bytes=scalars * point.dtype.itemsize,
            max_abs_error=errors[c.name],
            visited_share=1.0 if everything else visited_share(layer.route, batches, layer.num_experts),
            forward_s=forward,
            backward_s=backward,
            optimizer_s=optimizer,
            operations_over_ff=(dense + deciding) / dense if everything and c.baseline != "ff" else None,
            **speedups(c, contenders, seconds),
        )


def check(contender: Contender, x: Tensor) -> float:
    """Largest error of the outputs of a training pass over a few rows; gradients are checked too.

    Raises:
        UserError: it is larger than the tolerance: nothing of this layer may be timed.
    """
    layer, module, asked = contender.layer, contender.module.train(), contender.layer.backend
    rows = x[: CHECKED_ROWS if layer.parameter_count <= CHECKED_SCALARS else 1]
    decisions: Literal["soft", "hard"] = "hard" if layer.sparse_gradients else "soft"
    if not (contender.is_peer or layer.sparse_gradients):
        layer.routing_mode = decisions
        module.eval()  # the noise of a gate is not compared
        if not layer.has_soft_mode:
            layer.backend = "eager"  # what trains, where inference has another
    try:
        output = module(rows)
        truth = layer.forward_reference(rows, decisions if layer.has_soft_mode else "hard")
        error = contender.compare(output, truth)
        if layer.parameter_count <= CHECKED_SCALARS and not contender.is_peer:
            parameters, grad = list(layer.parameters()), torch.ones_like(output)
            found = torch.autograd.grad(output, parameters, grad, allow_unused=True)
            true = torch.autograd.grad(truth, parameters, grad.to(truth.dtype), allow_unused=True)
            for (name, parameter), a, b in zip(layer.named_parameters(), found, true, strict=True):
                if b is not None:  # hard decisions have no gradient
                    a = torch.zeros_like(parameter) if a is None else a.to_dense()
                    contender.compare(a, b, 10, f"gradient of {name}")
    finally:
        layer.routing_mode, layer.backend = "auto", asked
        module.train()
    return error

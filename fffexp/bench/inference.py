"""`fffexp bench inference`: layers of equal training width, interleaved, beside what the machine could do."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fffexp.bench.contenders import PEER, Contender, Point, fast_ffs, inputs, make
from fffexp.bench.machine import Limits, last_level_cache_bytes
from fffexp.bench.records import Record, of_one
from fffexp.layers import FF
from fffexp.timing import interleaved, median_ratio
from fffexp.timing import rotating as over_batches

POINT_S = 2.0  # of timing, for one point
# Inputs rotate until the weights that they touch exceed so many last-level caches, or are nearly the whole layer.
CACHES, WHOLE = 4, 0.95
MAX_INPUT_BYTES = 2**29


def run_point(
    names: Sequence[str],
    point: Point,
    batch_sizes: Sequence[int],
    limits: dict[int, Limits],
    peers: bool,
) -> Iterator[Record]:
    """Records of all layers, of one depth, at every batch size and number of threads."""
    contenders = make(names, point, peers)
    with torch.inference_mode():
        for batch_size, threads in itertools.product(batch_sizes, limits):
            torch.set_num_threads(threads)
            yield from _measure(contenders, point, batch_size, threads, limits[threads])


def _measure(
    contenders: list[Contender], point: Point, batch_size: int, threads: int, limits: Limits
) -> Iterator[Record]:
    for contender in contenders:
        assert isinstance(contender.module, nn.Module)
        contender.module.eval()
    batches = rotating(contenders, point, batch_size)
    errors = {contender.name: contender.check(batches[0]) for contender in contenders}
    calls: dict[str, Callable[[Tensor], object]] = {c.name: c.module for c in contenders}
    dense = next((c.layer for c in contenders if c.name == "FF"), None)
    others: dict[str, Callable[[Tensor], Tensor]] = {}
    if isinstance(dense, FF):
        others = fast_ffs(dense)
        for other in others.values():
            assert torch.allclose(other(batches[0]), dense(batches[0]), rtol=1e-2, atol=1e-2)
    rotated = {name: over_batches(call, batches) for name, call in (calls | others).items()}
    seconds = interleaved(rotated, POINT_S, device=point.device, threads=threads)
    records = [
        _record(c, point, batch_size, threads, limits, seconds[c.name], errors[c.name], batches) for c in contenders
    ]
    for record in records:
        if "FF" in seconds and record.layer != "FF":
            record.speedup_over_ff = median_ratio(seconds["FF"], seconds[record.layer])
        if record.layer == "FFF":
            if "NoisyTopKMoE" in seconds:
                record.speedup_over_moe = median_ratio(seconds["NoisyTopKMoE"], seconds["FFF"])
            if PEER in seconds:
                record.speedup_over_peer = median_ratio(seconds[PEER], seconds["FFF"])
    ff = of_one(records, "FF")
    if ff:
        name, fastest = min(((n, statistics.median(seconds[n])) for n in others), key=lambda pair: pair[1])
        if fastest < ff.median_s:
            ff.fastest_ff, ff.fastest_ff_s = name, fastest
    yield from records


def rotating(contenders: Sequence[Contender], point: Point, batch_size: int) -> list[Tensor]:
    """Batches whose weights, of each sparse layer, do not fit the caches together, or are the whole layer."""
    sparse = {id(c.layer): c.layer for c in contenders if c.layer.num_experts > 1}.values()
    size = batch_size * point.in_features * point.dtype.itemsize
    most = max(8, MAX_INPUT_BYTES // size)
    count = 8
    while True:
        batches = inputs(point, batch_size, count)
        enough = True
        for layer in sparse:
            touched = layer.weights_read(torch.cat(batches)) * point.dtype.itemsize
            share = visited_share(layer.route, batches, layer.num_experts)
            enough &= touched > CACHES * last_level_cache_bytes() or share >= WHOLE
        if enough or count >= most:
            return batches
        count = min(2 * count, most)


def _record(
    contender: Contender,
    point: Point,
    batch_size: int,
    threads: int,
    limits: Limits,
    seconds: list[float],
    error: float,
    batches: list[Tensor],
) -> Record:
    layer = contender.layer
    scalars = layer.weights_read(batches[0]) + batch_size * (point.in_features + point.out_features)
    flops, size = batch_size * layer.flops_per_sample, scalars * point.dtype.itemsize
    return Record(
        task="inference",
        **describe(contender, point, batch_size, threads),
        **percentiles(seconds),
        flops=flops,
        bytes=size,
        limit_s=max(flops / limits.gemm_flops_per_s, size / limits.read_bytes_per_s),
        max_abs_error=error,
        visited_share=visited_share(layer.route, batches, layer.num_experts),
        peak_bytes=_peak(contender.module, batches[0], point.device),
    )


def describe(contender: Contender, point: Point, batch_size: int, threads: int) -> dict[str, Any]:
    """What a record says of its contender."""
    layer, blocks = contender.layer, 2**point.depth
    moe, dense = contender.name == "NoisyTopKMoE", contender.name == "FF"
    return {
        "layer": contender.name,
        "backend": contender.backend,
        "in_features": point.in_features,
        "out_features": point.out_features,
        "training_width": layer.training_width,
        "inference_width": layer.inference_width,
        "depth": None if moe or dense else point.depth,
        "leaf_width": None if dense else point.leaf_width,
        "num_experts": blocks if moe else None,
        "top_k": min(point.top_k, blocks) if moe else None,
        "batch_size": batch_size,
        "threads": threads,
        "dtype": str(point.dtype).removeprefix("torch."),
        "device": point.device,
    }


def percentiles(seconds: list[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    return {"median_s": statistics.median(seconds), "p10_s": tenths[0], "p90_s": tenths[-1]}


def visited_share(route: Callable[[Tensor], Tensor], batches: list[Tensor], blocks: int) -> float:
    """Of the blocks, those that any of the batches reaches."""
    return len(torch.cat([route(batch).flatten() for batch in batches]).unique()) / blocks


def _peak(module: Callable[[Tensor], object], x: Tensor, device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats()
    module(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()

"""Inference of layers of equal training width, interleaved, beside what the machine could do."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fffexp.bench.contenders import Contender, Point, make
from fffexp.bench.machine import Limits, last_level_cache_bytes
from fffexp.bench.records import Record, describe, make_record, speedups
from fffexp.timing import interleaved, rotating

# Inputs rotate until the weights that they touch exceed so many last-level caches, or are nearly the whole layer.
CACHES, WHOLE = 4, 0.95
MAX_INPUT_BYTES = 2**29


def run_point(
    names: Sequence[str],
    point: Point,
    batch_sizes: Sequence[int],
    limits: Mapping[int, Limits],
    peers: bool = False,
    done: Callable[[Mapping[str, Any]], bool] = lambda timed: False,
    seconds: float = 2.0,
) -> Iterator[Record]:
    """Records of all layers, of one depth, at every batch size and number of threads.

    Args:
        names: public names or class paths of layers.
        point: sizes of the layers.
        batch_sizes: rows of an input.
        limits: what the machine can do, by number of threads.
        peers: whether the reference package joins.
        done: whether there is a record of what `describe` says of a contender: it is timed again only beside others.
        seconds: of timing for one batch size and number of threads.
    """
    contenders = make(names, point, peers)
    for batch_size, threads in itertools.product(batch_sizes, limits):
        timed = {c.name: describe("inference", c, point, batch_size, threads) for c in contenders}
        wanted = {c.name for c in contenders if not done(timed[c.name])}
        records = _measure(contenders, point, timed, limits[threads], seconds) if wanted else []
        yield from (record for record in records if record.layer in wanted)


@torch.inference_mode()
def _measure(
    contenders: list[Contender], point: Point, timed: Mapping[str, dict[str, Any]], limits: Limits, point_s: float
) -> list[Record]:
    batch_size, threads = (timed[contenders[0].name][name] for name in ("batch_size", "threads"))
    records = []
    for contender in contenders:
        contender.module.eval()
    batches = beyond_caches([c.layer for c in contenders], point, batch_size)
    errors = {contender.name: contender.check(batches[0]) for contender in contenders}
    calls: dict[str, Callable[[Tensor], object]] = {c.name: c.module for c in contenders}
    forms: dict[str, list[str]] = {c.name: [] for c in contenders}
    for contender in contenders:
        for name, form in {} if contender.is_peer else contender.layer.fast_forms().items():
            contender.compare(form(batches[0]), contender.module(batches[0]), 1e3, f"output by {name}")
            forms[contender.name].append(name)
            calls[f"{contender.name} {name}"] = form
    rotated = {name: rotating(call, batches) for name, call in calls.items()}
    seconds = interleaved(rotated, point_s, device=point.device, threads=threads)
    for c in contenders:
        scalars = c.layer.weights_read(batches[0]) + batch_size * (point.in_features + point.out_features)
        record = make_record(
            timed[c.name],
            c,
            seconds,
            limits,
            flops=batch_size * c.layer.flops_per_sample,
            bytes=scalars * point.dtype.itemsize,
            max_abs_error=errors[c.name],
            visited_share=visited_share(c.layer.route, batches, c.layer.num_experts),
            peak_bytes=_peak(c.module, batches[0], point.device),
            **speedups(c, contenders, seconds),
        )
        for name in forms[c.name]:
            median = statistics.median(seconds[f"{c.name} {name}"])
            if median < (record.fastest_ff_s or record.median_s):
                record.fastest_ff, record.fastest_ff_s = name, median
        records.append(record)
    return records


def beyond_caches(layers: Sequence[Any], point: Point, batch_size: int) -> list[Tensor]:
    """Batches whose weights, of each sparse layer, do not fit the caches together, or are the whole layer."""
    sparse = {id(layer): layer for layer in layers if layer.num_experts > 1}.values()
    size = batch_size * point.in_features * point.dtype.itemsize
    most = max(8, MAX_INPUT_BYTES // size)
    count = 8
    while True:
        batches = point.inputs(batch_size, count)
        enough = True
        for layer in sparse:
            touched = layer.weights_read(torch.cat(batches)) * point.dtype.itemsize
            share = visited_share(layer.route, batches, layer.num_experts)
            enough &= touched > CACHES * last_level_cache_bytes() or share >= WHOLE
        if enough or count >= most:
            return batches
        count = min(2 * count, most)


def visited_share(route: Callable[[Tensor], Tensor], batches: Sequence[Tensor], experts: int) -> float:
    """Of the leaves or experts, those that any of the batches reaches."""
    return len(torch.cat([route(batch).flatten() for batch in batches]).unique()) / experts


def _peak(module: Callable[[Tensor], object], x: Tensor, device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    module(x)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)

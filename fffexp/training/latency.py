"""Speed metrics of a network: latency and throughput at inference."""

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fffexp.timing import exclusive_timing, interleaved, median_ratio, rotating

# Networks are timed in turn with a dense layer of this width, from as many features to as many. When the speed of the
# machine drifts, the ratio stays.
REFERENCE_WIDTH = 128
BATCH_SIZES = (1, 256, 2048)  # the latency of the smaller ones is measured, and the throughput of the last
ROUNDS = (15, 300)  # enough for a steady median of a fast layer, few for a slow one
# calls of one network follow each other for so long: the first after another network finds its caches cold, which made
# the reference up to 40% slower beside a mixture than beside a dense layer
BLOCK_S = 0.005


def in_rotation(network: nn.Module, rows: Tensor, batch_size: int) -> Callable[[], object]:
    """A call of the network on the next batch of rows (samples, ...), of up to 64 different ones."""
    # rows that do not fill one batch are repeated
    repeated = rows.repeat(math.ceil(batch_size / len(rows)), *[1] * (rows.dim() - 1))
    return rotating(network, [batch for batch in repeated.split(batch_size)[:64] if len(batch) == batch_size])


def measure(network: nn.Module, timed: Callable[[int], Callable[[], object]]) -> dict[str, float]:
    """Speed metrics of a network, of which `timed` makes a call for a batch size."""
    network.eval()
    tensors = [*network.parameters(), *network.buffers(), torch.empty(())]
    floats = (each for each in tensors if each.is_floating_point())
    like, width, results = next(floats).to(tensors[0].device), REFERENCE_WIDTH, dict[str, float]()
    reference = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(like)
    with exclusive_timing(), torch.inference_mode():
        for size in BATCH_SIZES:
            calls: dict[str, Callable[[], object]]
            calls = {"": timed(size), "reference": partial(reference, like.new_ones(size, width))}
            times = interleaved(calls, 0.1, device=like.device, rounds=ROUNDS, block_s=BLOCK_S)
            own, of_reference = map(statistics.median, times.values())
            if size == BATCH_SIZES[-1]:
                results[f"speed/throughput_b{size}"] = size / own
            else:
                results |= {
                    f"speed/latency_b{size}_ms": 1e3 * own,
                    f"speed/reference_latency_b{size}_ms": 1e3 * of_reference,
                    f"speed/latency_b{size}_ratio": median_ratio(times[""], times["reference"]),
                }
    return results

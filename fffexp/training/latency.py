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


def measure(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Speed metrics of a network on inputs (samples, ...), of which batches are taken in rotation."""
    network.eval()
    floats = (parameter for parameter in network.parameters() if parameter.is_floating_point())
    like, width, results = next(floats, torch.empty((), device=inputs.device)), REFERENCE_WIDTH, dict[str, float]()
    reference = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(like)
    with exclusive_timing(), torch.inference_mode():
        for size in BATCH_SIZES:
            # up to 64 different batches; data that does not fill one is repeated
            repeated = inputs.repeat(math.ceil(size / len(inputs)), *[1] * (inputs.dim() - 1))
            batches = [batch for batch in repeated.split(size)[:64] if len(batch) == size]
            calls: dict[str, Callable[[], object]]
            calls = {"": rotating(network, batches), "reference": partial(reference, like.new_ones(size, width))}
            times = interleaved(calls, 0.1, device=inputs.device, rounds=ROUNDS, block_s=BLOCK_S)
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

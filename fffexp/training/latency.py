"""Speed metrics of a network: latency and throughput at inference."""

import math
import statistics

import torch
from torch import Tensor, nn

from fffexp.timing import exclusive_timing, interleaved, median_ratio, rotating

# Latencies are timed beside a dense layer of this width, so that they can be compared when the machine's speed drifts.
REFERENCE_WIDTH = 128
BATCH_SIZES = (1, 256, 2048)  # the latency of the smaller ones is measured, and the throughput of the last
ROUNDS = (15, 300)  # enough for a steady median of a fast layer, few for a slow one


def measure(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Speed metrics of a network on inputs (samples, ...), of which batches are taken in rotation.

    They are interleaved with a dense reference from its inputs to its outputs, where both are tensors of numbers.
    """
    modules, results = {"": network.eval()}, dict[str, float]()
    with exclusive_timing(), torch.inference_mode():
        outputs = network(inputs[:1])
        if inputs.is_floating_point() and isinstance(outputs, Tensor):
            hidden = nn.Linear(inputs[0].numel(), REFERENCE_WIDTH)
            reference = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(REFERENCE_WIDTH, outputs[0].numel()))
            modules["reference_"] = reference.eval().to(next(network.parameters(), outputs))
        for size in BATCH_SIZES:
            # up to 64 different batches; data that does not fill one is repeated
            repeated = inputs.repeat(math.ceil(size / len(inputs)), *[1] * (inputs.dim() - 1))
            batches = [batch for batch in repeated.split(size)[:64] if len(batch) == size]
            calls = {prefix: rotating(module, batches) for prefix, module in modules.items()}
            times = interleaved(calls, 0.1, device=inputs.device, rounds=ROUNDS, block_s=0)
            medians = {prefix: statistics.median(seconds) for prefix, seconds in times.items()}
            if size == BATCH_SIZES[-1]:
                results[f"speed/throughput_b{size}"] = size / medians[""]
                break
            results |= {f"speed/{prefix}latency_b{size}_ms": 1e3 * seconds for prefix, seconds in medians.items()}
            if "reference_" in times:
                results[f"speed/latency_b{size}_ratio"] = median_ratio(times[""], times["reference_"])
    return results

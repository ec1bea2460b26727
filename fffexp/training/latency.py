"""Speed metrics of a network: latency and throughput at inference."""

import math
import statistics

import torch
from torch import Tensor, nn

from fffexp.timing import exclusive_timing, interleaved, median_ratio, rotating

# Latencies are timed beside a dense layer of this width, so that they can be compared when the machine's speed drifts.
REFERENCE_WIDTH = 128
BATCH_SIZES = (1, 256, 2048)
ROUNDS = (15, 300)


def measure(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Speed metrics of a network on real inputs, interleaved with a dense reference from its inputs to its outputs.

    Args:
        network: (batch, ...) -> anything; a tensor, for the latencies of the reference beside.
        inputs: (samples, ...) that batches are taken from in rotation.
    """
    modules = {"": network.eval()}
    results: dict[str, float] = {}
    with exclusive_timing(), torch.inference_mode():
        outputs = network(inputs[:1])
        if inputs.is_floating_point() and isinstance(outputs, Tensor):
            like = next(network.parameters(), outputs)
            modules["reference_"] = _reference(inputs[0].numel(), outputs[0].numel()).to(like.device, like.dtype)
        for batch_size in BATCH_SIZES:
            batches = _batches(inputs, batch_size)
            calls = {prefix: rotating(module, batches) for prefix, module in modules.items()}
            # rounds enough for a steady median of a fast layer, few for a slow one
            times = interleaved(calls, 0.1, device=inputs.device, rounds=ROUNDS, block_s=0)
            medians = {prefix: statistics.median(seconds) for prefix, seconds in times.items()}
            if batch_size == BATCH_SIZES[-1]:
                results[f"speed/throughput_b{batch_size}"] = batch_size / medians[""]
                continue
            for prefix, seconds in medians.items():
                results[f"speed/{prefix}latency_b{batch_size}_ms"] = 1e3 * seconds
            if "reference_" in times:
                results[f"speed/latency_b{batch_size}_ratio"] = median_ratio(times[""], times["reference_"])
    return results


def _reference(in_features: int, out_features: int) -> nn.Module:
    hidden, out = nn.Linear(in_features, REFERENCE_WIDTH), nn.Linear(REFERENCE_WIDTH, out_features)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out).eval()


def _batches(inputs: Tensor, batch_size: int) -> list[Tensor]:
    """Up to 64 different batches; data that does not fill one is repeated."""
    repeated = inputs.repeat(math.ceil(batch_size / len(inputs)), *[1] * (inputs.dim() - 1))
    return [batch for batch in repeated.split(batch_size)[:64] if len(batch) == batch_size]

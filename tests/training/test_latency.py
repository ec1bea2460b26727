"""Speed metrics of a network."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from fffexp.training.latency import in_rotation, measure

MEASURED = {
    *("speed/latency_b1_ms", "speed/latency_b256_ms", "speed/throughput_b2048"),
    *("speed/reference_latency_b1_ms", "speed/reference_latency_b256_ms"),
    *("speed/latency_b1_ratio", "speed/latency_b256_ratio"),
}


@pytest.mark.parametrize("samples", [3, 300])
def test_measure(samples: int) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    shapes: Counter[tuple[int, ...]] = Counter()
    network.register_forward_pre_hook(lambda _, inputs: shapes.update([tuple(inputs[0].shape)]))
    inputs = torch.randn(samples, 3, 4)
    results = measure(network, partial(in_rotation, network, inputs))
    assert set(results) == MEASURED
    assert set(shapes) == {(1, 3, 4), (256, 3, 4), (2048, 3, 4)}
    assert min(shapes.values()) >= 15
    for size in ("b1", "b256"):
        ratio = results[f"speed/latency_{size}_ms"] / results[f"speed/reference_latency_{size}_ms"]
        assert results[f"speed/latency_{size}_ratio"] == pytest.approx(ratio, rel=0.5), "that of the medians, about"
    assert all(p.grad is None for p in network.parameters())
    assert not network.training
    # and it can be trained on
    network(inputs).sum().backward()


@pytest.mark.parametrize(
    "network",
    [
        nn.Embedding(5, 3),
        nn.Identity(),
        nn.Embedding(5, 3, _weight=torch.ones(5, 3, dtype=torch.int8), _freeze=True),
    ],
)
def test_a_network_of_tokens_and_one_without_floats(network: nn.Module) -> None:
    assert set(measure(network, partial(in_rotation, network, torch.randint(5, (300, 7))))) == MEASURED

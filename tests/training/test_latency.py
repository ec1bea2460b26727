"""Speed metrics of a network."""

from collections import Counter

import pytest
import torch
from torch import nn

from fffexp.training.latency import measure

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
    results = measure(network, inputs)
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


def test_a_network_of_tokens_and_one_without_parameters() -> None:
    assert set(measure(nn.Embedding(5, 3), torch.randint(5, (300, 7)))) == MEASURED
    assert set(measure(nn.Identity(), torch.randint(5, (300, 7)))) == MEASURED
    quantised = nn.Embedding(5, 3, _weight=torch.ones(5, 3, dtype=torch.int8), _freeze=True)
    assert set(measure(quantised, torch.randint(5, (300, 7)))) == MEASURED

"""Tasks that a layer of experts can solve and a dense layer of as many active neurons cannot."""

from functools import cache

import torch
from cases import IN, OUT
from torch import Tensor

from fffexp import auxiliary_loss
from fffexp.layers import FF, FeedforwardLayer


def clusters(count: int = 4, rows: int = 512, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, IN) inputs, (rows, OUT) targets of unit variance, and the cluster, which has a linear map of its own."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.nn.functional.normalize(torch.randn(count, IN, generator=generator))
    maps = torch.randn(count, IN, OUT, generator=generator)
    cluster = torch.arange(rows) % count
    inner = torch.randn(rows, IN, generator=generator)
    y = torch.einsum("bi,bio->bo", inner, maps[cluster])
    return 0.5 * inner + centres[cluster], (y - y.mean(0)) / y.std(0), cluster


def train(
    layer: FeedforwardLayer, x: Tensor, y: Tensor, steps: int = 250, lr: float = 0.02, aux_weight: float = 0.0
) -> float:
    """Mean squared error in evaluation after training by all rows at once, with the layer's losses of one weight."""
    optimizer = torch.optim.Adam(layer.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        (loss + auxiliary_loss(layer, dict.fromkeys(layer.aux_losses, aux_weight))).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((layer.eval()(x) - y).square().mean())


@cache
def dense_error() -> float:
    """What a dense layer of 16 neurons comes to on `clusters`."""
    torch.manual_seed(0)
    x, y, _ = clusters()
    return train(FF(IN, OUT, 16), x, y)

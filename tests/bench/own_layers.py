"""Layers of a user's: one file outside the package, as `--layers own_layers.LowRank` finds it."""

from typing import Literal

import torch
from torch import Tensor, nn

from fffexp import FeedforwardLayer


class LowRank(FeedforwardLayer):
    def __init__(self, in_features: int, out_features: int, width: int, rank: int = 2) -> None:
        super().__init__(in_features, out_features)
        self.width, self.rank = width, rank
        self.down, self.up = nn.Linear(in_features, rank), nn.Linear(rank, width)
        self.out = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(torch.relu(self.up(self.down(x))))
        return output

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        down, up, out = ((each.weight.double(), each.bias.double()) for each in (self.down, self.up, self.out))
        return torch.relu((x.double() @ down[0].T + down[1]) @ up[0].T + up[1]) @ out[0].T + out[1]

    @property
    def training_width(self) -> int:
        return self.width

    @property
    def flops_per_sample(self) -> int:
        return 2 * (self.rank * (self.in_features + self.width) + self.width * self.out_features)


class Plain(FeedforwardLayer):
    """Only what every layer has to define."""

    def __init__(self, in_features: int, out_features: int, width: int) -> None:
        super().__init__(in_features, out_features)
        self.up, self.down = nn.Linear(in_features, width), nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.relu(self.up(x)) ** 2)
        return output

    @property
    def training_width(self) -> int:
        return self.up.out_features

    @property
    def flops_per_sample(self) -> int:
        return 2 * self.training_width * (self.in_features + self.out_features)


class Wrong(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class WrongGradient(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.detach() + 0.5 * (y - y.detach())


class Picky(LowRank):
    def __init__(self, in_features: int, out_features: int, angle: float) -> None:
        super().__init__(in_features, out_features, 2)

"""What layers that add up the outputs of others have in common."""

from abc import abstractmethod
from functools import reduce
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from fffexp.layers.base import BlockLayer, FeedforwardLayer


class SummedLayer(BlockLayer):
    """The sum of its parts, which are set as it is set; it alone keeps what they decide."""

    @property
    @abstractmethod
    def parts(self) -> list[FeedforwardLayer]:
        """The layers whose outputs are added, in the order of their leaves or experts."""

    @abstractmethod
    def _decided(self) -> Any:
        """The routing of the pass that the parts have just made; None for none."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        output = reduce(torch.add, [part(x) for part in self.parts])
        if self.training:
            if (decided := self._decided()) is not None:
                self._record(decided, output)
            for part in self.parts:
                part._passes = []
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        # the base class sets its defaults before there are parts
        super().__setattr__(name, value)
        if name in ("routing_mode", "backend", "vectorized") and self._modules:
            for part in self.parts:
                setattr(part, name, value)

    def inference_backend(self) -> str:
        return self.parts[0].inference_backend()

    def training_backend(self, x: Tensor) -> str:
        return self.parts[0].training_backend(x)

    def route(self, x: Tensor) -> Tensor:  # leaves and experts are numbered through
        x, parts = self._checked(x), self.parts
        firsts = accumulate((part.num_experts for part in parts), initial=0)
        return torch.cat([part.route(x) + first for part, first in zip(parts, firsts, strict=False)], 1)

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        return torch.stack([part.forward_reference(x, decisions) for part in self.parts]).sum(0)

    def weights_read(self, x: Tensor) -> int:
        return sum(part.weights_read(x) for part in self.parts)

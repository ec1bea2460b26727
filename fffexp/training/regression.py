"""Regression: squared error."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score

from fffexp.layers.base import LayerFactory
from fffexp.models.mlp import MLP
from fffexp.training.task import Task, from_data


class R2(R2Score):
    """R2Score, which raises for less than two samples; of these it is NaN."""

    def compute(self) -> Tensor:
        return super().compute() if self.total > 1 else self.residual.new_tensor(float("nan"))


class RegressionTask(Task):
    """Mean squared error of (inputs, targets), in the unit of the targets as the data give them.

    Data in memory give standardised targets, unless `normalize_targets` is off: the errors that are logged are then in
    standard deviations of the training part.

    Args:
        layer: which feedforward layer, with all but its in_features and out_features; None for a network without.
        in_shape: shape of one sample; linked to the data.
        num_outputs: numbers to predict for a sample; linked to the data.
        network: which network, with all but its layer, in_shape and num_outputs; MLP unless given.
        kwargs: see Task.
    """

    monitor, mode = "val/mse", "min"

    def __init__(
        self,
        layer: LayerFactory | None,
        in_shape: Sequence[int],
        num_outputs: int,
        network: Callable[[LayerFactory | None, Sequence[int], int], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = (network or MLP)(layer, in_shape, from_data("num_outputs", num_outputs))
        self.check()

    def make_metrics(self) -> dict[str, Metric]:
        return {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2()}

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        outputs = self(x).float()
        return F.mse_loss(outputs, y), outputs.detach(), y

"""Classification: cross-entropy, selected by accuracy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from fffexp.layers.base import LayerFactory
from fffexp.models.mlp import MLP
from fffexp.training.task import Task


class ClassificationTask(Task):
    """Cross-entropy of (inputs, labels). ValueError for an argument out of range, or see Task.check.

    Args:
        layer: which feedforward layer, with all but its in_features and out_features; None for a network without.
        in_shape: shape of one sample; linked to the data.
        num_classes: number of classes; linked to the data.
        label_smoothing: share of the target spread over all classes, in training.
        network: which network, with all but its layer, in_shape and num_classes; MLP unless given.
        kwargs: see Task.
    """

    monitor, mode = "val/accuracy", "max"

    def __init__(
        self,
        layer: LayerFactory | None,
        in_shape: Sequence[int],
        num_classes: int,
        label_smoothing: float = 0.0,
        network: Callable[[LayerFactory | None, Sequence[int], int], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.network = (network or MLP)(layer, in_shape, num_classes)
        self.check()

    def make_metrics(self) -> dict[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)}

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.label_smoothing if self.training else 0.0)
        return loss, logits.detach().argmax(1), y

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().predict_step(batch, batch_idx).argmax(1)

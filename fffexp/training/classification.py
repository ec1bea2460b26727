"""Classification: cross-entropy, selected by accuracy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from fffexp.layers.base import LayerFactory
from fffexp.models.mlp import MLP
from fffexp.training.task import Task, from_data


class ClassificationTask(Task):
    """Cross-entropy of (inputs, labels). ValueError for an argument out of range, or see Task.check.

    Args:
        layer: which feedforward layer, with all but its in_features and out_features; None for a network without.
        in_shape: shape of one sample; linked to the data.
        num_classes: number of classes; linked to the data.
        label_smoothing: share of the target spread over all classes, in training.
        class_weights: weight of the loss of each class; all 1 unless given.
        metrics: further metrics by the names under which they are logged, each with all but its number of classes;
            they get probabilities.
        network: which network, with all but its layer, in_shape and num_classes; MLP unless given.
        kwargs: see Task.
    """

    monitor, mode = "val/accuracy", "max"
    class_weights: Tensor | None

    def __init__(
        self,
        layer: LayerFactory | None,
        in_shape: Sequence[int],
        num_classes: int,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        metrics: Mapping[str, Callable[[int], Metric]] | None = None,
        network: Callable[[LayerFactory | None, Sequence[int], int], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
        num_classes = from_data("num_classes", num_classes)
        weights = torch.ones(num_classes) if class_weights is None else torch.tensor(class_weights)
        if len(weights) != num_classes or not (weights.min() >= 0 and 0 < weights.sum() < float("inf")):
            raise ValueError(f"class_weights are {class_weights}; give {num_classes} numbers that are not negative")
        self.num_classes, self.label_smoothing, self.metrics = num_classes, label_smoothing, dict(metrics or {})
        if "loss" in self.metrics:
            raise ValueError("metrics: 'loss' is the name of the loss itself; give the metric another")
        for name, metric in self.make_metrics().items():  # a ValueError of one that takes no number of classes
            value = metric(torch.eye(num_classes), torch.arange(num_classes))
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(f"metrics.{name}: {type(metric).__name__} gives more than a number; give its average")
        self.register_buffer("class_weights", weights if class_weights else None, persistent=False)
        self.network = (network or MLP)(layer, in_shape, num_classes)
        self.check()

    def make_metrics(self) -> dict[str, Metric]:
        accuracy = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        return {"accuracy": accuracy, **{name: make(self.num_classes) for name, make in self.metrics.items()}}

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits, smoothing = self(x).float(), self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, y, self.class_weights, label_smoothing=smoothing)
        found = logits.detach()
        # classes alone where they do, for they are kept until the end of the epoch
        return loss, found.softmax(1) if self.metrics else found.argmax(1), y

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().predict_step(batch, batch_idx).argmax(1)

"""Training one network with its layers' regularisers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from fffexp.errors import UserError
from fffexp.layers import FeedforwardLayer
from fffexp.models.mlp import MLP, LayerFactory
from fffexp.training.callbacks.hardening import Hardening
from fffexp.training.callbacks.routing import RoutingMonitor
from fffexp.training.callbacks.speed import TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.losses import weighted_aux_losses
from fffexp.training.schedules import Adaptive, Schedule

Batch = tuple[Tensor, Tensor]
NetworkFactory = Callable[[LayerFactory | None, Sequence[int], int], nn.Module]


class ClassificationTask(LightningModule):
    """Cross-entropy plus the regularisers of the layers, each with a scheduled coefficient.

    Validation and test decide hard; validation also tracks the soft accuracy and the gap between the two.

    Args:
        layer: which feedforward layer, with all but its in_features and out_features; None for a network without.
        optimizer: which optimizer, with all but the parameters; AdamW unless given (and not as the default value,
            whose weight decay jsonargparse would hand on to an optimizer that a config names instead).
        lr_scheduler: which scheduler, with all but the optimizer. One that takes `total_steps` and is not given
            it gets the length of the training and is stepped every batch; others are stepped every epoch.
        aux_weights: factor of each regulariser of the layer by its name (FFF: hardening_mean, hardening_sum,
            balance, importance; NoisyTopKMoE: importance, load) and values of what else the layer lets a
            schedule set (FFF: inverse_temperature). A number or a schedule.
        label_smoothing: share of the target spread over all classes.
        network: which network, with all but its layer, in_shape and num_classes; MLP unless given.
        input_noise_std: standard deviation of the normal noise that is added to every input in training.
        in_shape: shape of one sample; linked to the data.
        num_classes: number of classes; linked to the data.

    Raises:
        ValueError: a coefficient that the layer does not know, or a layer that cannot be trained.
    """

    def __init__(
        self,
        layer: LayerFactory | None,
        in_shape: Sequence[int],
        num_classes: int,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        aux_weights: dict[str, float | Schedule] | None = None,
        label_smoothing: float = 0.0,
        input_noise_std: float = 0.0,
        network: NetworkFactory | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
        if not input_noise_std >= 0:
            raise ValueError(f"input_noise_std is {input_noise_std}; it must not be negative")
        self.network = (network or MLP)(layer, in_shape, num_classes)
        self.input_noise_std = input_noise_std
        self.optimizer: OptimizerCallable = optimizer or torch.optim.AdamW
        self.lr_scheduler, self.label_smoothing = lr_scheduler, label_smoothing
        self.schedules = dict(aux_weights or {})
        # what the schedules say now; written by the Hardening callback
        self.aux_weights: dict[str, float] = {}
        self._check_layers()
        self._check_optimizer()
        make_accuracy = partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
        self.train_accuracy, self.val_accuracy = make_accuracy(), make_accuracy()
        self.soft_accuracy, self.test_accuracy = make_accuracy(), make_accuracy()
        self._train_steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes every hook it calls, some 50 a step; Module's own way of setting is slow
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def layers(self) -> dict[str, FeedforwardLayer]:
        """The feedforward layers of the network by their path in it."""
        return {name: m for name, m in self.network.named_modules() if isinstance(m, FeedforwardLayer)}

    def _check_layers(self) -> None:
        known: set[str] = set()
        for layer in self.layers.values():
            layer.check_trainable()
            known |= set(layer.aux_losses) | layer.annealed_buffers
        kind = ", ".join(sorted({type(layer).__name__ for layer in self.layers.values()}))
        adapts = any("entropy" in layer.metrics for layer in self.layers.values())
        for name, schedule in self.schedules.items():
            if isinstance(schedule, Adaptive) and not adapts:
                raise ValueError(f"aux_weights.{name}: {kind} has no choice entropy for an Adaptive schedule")
            if not isinstance(schedule, Schedule) and not 0 <= schedule < float("inf"):
                raise ValueError(f"aux_weights.{name} is {schedule}; it must be finite and not negative")
            if name not in known:
                raise ValueError(
                    f"aux_weights.{name}: {kind} has no such regulariser; it has {', '.join(sorted(known)) or 'none'}"
                )

    def configure_callbacks(self) -> Sequence[Callback]:
        """Set the aux_weights; watch routing, stability and speed."""
        return [Hardening(), RoutingMonitor(), Stability(), TrainingSpeed()]

    def configure_optimizers(self) -> Any:
        """Optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler, interval = self.scheduler(optimizer, lambda: self.trainer.estimated_stepping_batches)
        monitor = getattr(scheduler, "monitor", None)
        return [optimizer], [{"scheduler": scheduler, "interval": interval, "monitor": monitor}]

    def on_train_start(self) -> None:
        """Refuse to go on beyond what a resumed schedule of the learning rate was made for.

        Raises:
            UserError: there are more steps than that.
        """
        steps = self.trainer.estimated_stepping_batches
        for config in self.trainer.lr_scheduler_configs:
            planned = getattr(config.scheduler, "total_steps", None)
            if planned is not None and config.interval == "step" and planned < steps:
                name = type(config.scheduler).__name__
                raise UserError(f"{name} was begun for {planned} steps, not {steps}: resume with the epochs of before")

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: Callable[[], float]) -> tuple[Any, str]:
        """The scheduler, for a training of so many steps, and whether it advances by the "step" or "epoch"."""
        assert self.lr_scheduler is not None
        given = getattr(self.lr_scheduler, "keywords", {})
        if "total_steps" in given and given["total_steps"] is None and given.get("epochs") is None:
            total = steps()
            if not 1 <= total < float("inf"):
                told = "no step to train" if total < 1 else "no end of the training"
                raise UserError(f"there is {told}, which a schedule of the learning rate needs: see trainer.max_epochs")
            scheduler = self.lr_scheduler(optimizer, total_steps=int(total))  # type: ignore[call-arg] # seen above
            return scheduler, "step"
        return self.lr_scheduler(optimizer), "epoch"

    def _check_optimizer(self) -> None:
        # so that a bad setting is told now, not after the data is loaded
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = self.optimizer([parameter])
        if any(layer.sparse_gradients for layer in self.layers.values()):
            parameter.grad = torch.eye(1)[0].to_sparse()
            try:
                optimizer.step()
            except RuntimeError as error:
                name = type(optimizer).__name__
                raise ValueError(
                    f"{name} takes no sparse gradients: give fffexp.LazyAdamW or torch.optim.SGD without momentum"
                ) from error
        if self.lr_scheduler is not None:
            self.scheduler(optimizer, lambda: 100)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *in_shape) -> (batch, num_classes) logits."""
        logits: Tensor = self.network(x)
        return logits

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, *in_shape), (batch,) -> () prediction loss plus regularisers, (batch, num_classes) logits."""
        logits = self(x + self.input_noise_std * torch.randn_like(x) if self.input_noise_std else x)
        prediction = F.cross_entropy(logits.float(), y, label_smoothing=self.label_smoothing)
        return prediction + weighted_aux_losses(self._layer_list, self.aux_weights), logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Prediction loss plus regularisers."""
        x, y = batch
        total, logits = self.loss(x, y)
        # metrics wait for the end of the epoch: updating them every step would cost as much as the step
        self._train_steps.append((total.detach(), logits.detach().argmax(1), y))
        return total

    def on_fit_start(self) -> None:
        """Look the layers up once, not every step."""
        self._layer_list = list(self.layers.values())

    def on_after_backward(self) -> None:
        """Let go of the graph of this step."""
        for layer in self._layer_list:
            layer.routing = None

    def on_train_epoch_end(self) -> None:
        """Log the epoch."""
        losses, predicted, labels = zip(*self._train_steps, strict=True)
        self._train_steps.clear()
        self.train_accuracy(torch.cat(predicted), torch.cat(labels))
        self.log("train/loss", torch.stack(losses).mean())
        self.log("train/accuracy", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Hard accuracy and loss, then soft accuracy where it can differ."""
        x, y = batch
        logits = self(x)
        self.val_accuracy.update(logits, y)
        self.log("val/loss", F.cross_entropy(logits.float(), y), batch_size=len(y))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=len(y))
        if hardening := [layer for layer in self.layers.values() if layer.has_soft_mode]:
            for layer in hardening:
                layer.routing_mode = "soft"
            self.soft_accuracy.update(self(x), y)
            for layer in hardening:
                layer.routing_mode = "auto"

    def on_validation_epoch_end(self) -> None:
        """Log how much is lost by hard decisions."""
        if self.soft_accuracy.update_called:
            soft = self.soft_accuracy.compute()
            self.soft_accuracy.reset()
            self.log("val/soft_accuracy", soft)
            self.log("val/hardening_gap", soft - self.val_accuracy.compute())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Hard accuracy."""
        x, y = batch
        self.test_accuracy.update(self(x), y)
        self.log("test/accuracy", self.test_accuracy, batch_size=len(y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class of each sample."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        predicted: Tensor = self(x).argmax(1)
        return predicted

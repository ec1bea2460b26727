"""What every task has in common: losses, metrics, optimizer and schedules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from fffexp.errors import UserError
from fffexp.layers import FeedforwardLayer, feedforward_layers
from fffexp.layers.base import RoutingMode
from fffexp.layers.random import normal_like
from fffexp.training.callbacks.routing import RoutingMonitor
from fffexp.training.callbacks.schedules import Schedules
from fffexp.training.callbacks.speed import TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.losses import weighted_aux_losses
from fffexp.training.schedules import Adaptive, Schedule

_PLAIN = str | int | float | bool | None


class Task(LightningModule, ABC):
    """A loss to minimise with a network, whose feedforward layers add their weighted auxiliary losses in training.

    Your own task gives its arguments and `**kwargs` to the base, sets `network`, and says what the `loss` of a
    batch is; `monitor`, `mode` and `make_metrics` if it is not the validation loss that counts:

        class Regression(Task):
            def __init__(self, layer: LayerFactory, in_shape: Sequence[int], **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.network = MLP(layer, in_shape, 1)

            def loss(self, batch):
                outputs = self(batch[0]).squeeze(1)
                return F.mse_loss(outputs, batch[1]), outputs, batch[1]

    Training logs `train/loss` (auxiliary losses included), validation and test `val/loss` and `test/loss` (without),
    each also every metric by its name. Validation uses the layers' routing mode, and then measures the soft mode as
    `val/soft_NAME` where a layer has one; `val/hardening_gap` is soft minus hard of what is monitored.

    Args:
        optimizer: which optimizer, with all but the parameters; AdamW unless given (and not as the default value,
            whose weight decay jsonargparse would hand on to an optimizer that a config names instead).
        lr_scheduler: which scheduler, with all but the optimizer. One that takes `total_steps` and is not given
            it gets the length of the training and is stepped every batch; others are stepped every epoch.
        aux_weights: weight of each auxiliary loss of the layers by its name (`layer.aux_losses`), and values of what
            else a layer lets a schedule set (`layer.annealed_buffers`). A number or a schedule.
        input_noise_std: standard deviation of the normal noise that is added to the network's input in training.

    Attributes:
        monitor: the logged metric that selects checkpoints and compares trials.
        mode: whether it is to be minimised or maximised.
        network: set by the subclass.
        aux_weights: the weights of the next training step; set by the schedules.
        lr: replaces the learning rate of the optimizer; for Lightning's LearningRateFinder.

    Raises:
        ValueError: input_noise_std is negative.
    """

    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[Literal["min", "max"]] = "min"
    network: nn.Module

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        aux_weights: dict[str, float | Schedule] | None = None,
        input_noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        # a factory made in Python would end in the checkpoint, which could not be loaded with weights_only
        for name in [name for name, value in self.hparams.items() if not _is_plain(value)]:
            del self.hparams[name]
        if not input_noise_std >= 0:
            raise ValueError(f"input_noise_std is {input_noise_std}; it must not be negative")
        self.input_noise_std = input_noise_std
        self.optimizer: OptimizerCallable = optimizer or torch.optim.AdamW
        self.lr_scheduler = lr_scheduler
        self.schedules = dict(aux_weights or {})
        self.aux_weights: dict[str, float] = {}
        self.lr: float | None = None
        self._planned: tuple[float | None, float] = None, 0
        self._evaluated: dict[str, dict[str, Metric]] = {}
        self._steps: list[tuple[Tensor, ...]] = []
        self._fit_layers: list[FeedforwardLayer] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes every hook it calls, some 50 a step; Module's own way of setting is slow
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """() loss without auxiliary losses, and outputs and targets as the metrics take them.

        Outputs and targets of a whole epoch are kept until its end: give what is small, such as classes, not logits.
        """

    def make_metrics(self) -> dict[str, Metric]:
        """New metrics of (outputs, targets) by the names under which they are logged."""
        return {}

    def inputs(self, batch: Any) -> Tensor:
        """What the network takes of a batch: (samples, ...)."""
        inputs: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
        return inputs

    def samples(self, batch: Any) -> int:
        """Number of samples in a batch."""
        return len(self.inputs(batch))

    @property
    def unit_monitor(self) -> bool:
        """Whether what is monitored is a share, in [0, 1]."""
        metric = self.make_metrics().get(self.monitor.partition("/")[2])
        return metric is not None and (metric.plot_lower_bound, metric.plot_upper_bound) == (0, 1)

    @property
    def layers(self) -> dict[str, FeedforwardLayer]:
        """The feedforward layers of the network by their path in it."""
        return feedforward_layers(self.network)

    def check(self) -> None:
        """Refuse settings that do not fit the network; at the start of a fit, and earlier for an early message.

        Raises:
            UserError: an unknown auxiliary loss, a layer that cannot be trained, an optimizer that does not suit it.
        """
        layers = self.layers.values()
        try:
            for layer in layers:
                layer.check_trainable()
        except ValueError as error:
            raise UserError(str(error)) from error
        known = {name for layer in layers for name in (*layer.aux_losses, *layer.annealed_buffers)}
        kind = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "the network"
        adapts = any("entropy" in layer.metrics for layer in layers)
        for name, schedule in self.schedules.items():
            if isinstance(schedule, Adaptive) and not adapts:
                raise UserError(f"aux_weights.{name}: {kind} has no choice entropy for an Adaptive schedule")
            bounds = schedule.bounds() if isinstance(schedule, Schedule) else (schedule, schedule)
            if wrong := [value for value in bounds if not 0 <= value < float("inf")]:
                raise UserError(f"aux_weights.{name} is {wrong[0]}; it must be finite and not negative")
            if name not in known:
                names = ", ".join(sorted(known)) or "none"
                raise UserError(f"aux_weights.{name}: {kind} has no such auxiliary loss; it has {names}")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = self.optimizer([parameter])
        if any(layer.sparse_gradients for layer in self.layers.values()):
            parameter.grad = torch.eye(1)[0].to_sparse()
            try:
                optimizer.step()
            except RuntimeError as error:
                raise UserError(
                    f"{type(optimizer).__name__} takes no sparse gradients: "
                    "give fffexp.LazyAdamW or torch.optim.SGD without momentum"
                ) from error
        if self.lr_scheduler is not None:
            self.scheduler(optimizer, lambda: 100)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Set the auxiliary weights; watch routing, stability and speed."""
        return [Schedules(), RoutingMonitor(), Stability(), TrainingSpeed()]

    def configure_optimizers(self) -> Any:
        """Optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.lr_scheduler is None:
            return optimizer
        self._planned = self._plan()
        scheduler, interval = self.scheduler(optimizer, lambda: self.trainer.estimated_stepping_batches)
        monitor = getattr(scheduler, "monitor", None)
        return [optimizer], [{"scheduler": scheduler, "interval": interval, "monitor": monitor}]

    def _plan(self) -> tuple[float | None, float]:
        return self.lr, self.trainer.estimated_stepping_batches

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: Callable[[], float]) -> tuple[Any, str]:
        """The scheduler, for a training of so many steps, and whether it advances by the "step" or "epoch"."""
        assert self.lr_scheduler is not None
        given = getattr(self.lr_scheduler, "keywords", {})
        if "total_steps" in given and given["total_steps"] is None and given.get("epochs") is None:
            total = steps()
            if not 1 <= total < float("inf"):
                problem = "no step to train" if total < 1 else "no end of the training"
                raise UserError(
                    f"there is {problem}, which a schedule of the learning rate needs: see trainer.max_epochs"
                )
            scheduler = self.lr_scheduler(optimizer, total_steps=int(total))  # type: ignore[call-arg] # seen above
            return scheduler, "step"
        return self.lr_scheduler(optimizer), "epoch"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, which in mixed precision refuses fused optimizers, with reason only for float16."""
        precision = self.trainer.precision_plugin
        if gradient_clip_val and getattr(precision, "scaler", None) is None:
            algorithm: Any = gradient_clip_algorithm or "norm"
            Precision.clip_gradients(precision, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def setup(self, stage: str) -> None:
        """Check before anything is trained."""
        if stage == "fit":
            self.check()

    def on_fit_start(self) -> None:
        """Look the layers up once, not every step; plan again if a finder changed the batch size or learning rate."""
        self._fit_layers = list(self.layers.values())
        if self.lr_scheduler is not None and self._planned != self._plan():
            self.trainer.strategy.setup_optimizers(self.trainer)

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

    def forward(self, x: Tensor) -> Tensor:
        """(samples, ...) -> what the network makes of it, with noise on the input in training."""
        if self.training and self.input_noise_std:
            x = x + self.input_noise_std * normal_like(x)
        outputs: Tensor = self.network(x)
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss plus weighted auxiliary losses."""
        loss, outputs, targets = self.loss(batch)
        total = loss + weighted_aux_losses(self._step_layers, self.aux_weights)
        # metrics wait for the end of the epoch: updating them every step would cost as much as the step
        self._steps.append((total.detach(), outputs.detach(), targets))
        return total

    def on_after_backward(self) -> None:
        """Let go of the graph of this step."""
        for layer in self._step_layers:
            layer.routing = None

    @property
    def _step_layers(self) -> Iterable[FeedforwardLayer]:
        return self.layers.values() if self._fit_layers is None else self._fit_layers

    def on_validation_epoch_start(self) -> None:
        """Leave out what an aborted pass evaluated."""
        self._evaluated.clear()

    def on_train_epoch_start(self) -> None:
        """Leave out what a finder trained."""
        self._steps.clear()

    def on_train_epoch_end(self) -> None:
        """Log the epoch."""
        if not self._steps:
            return
        losses, outputs, targets = zip(*self._steps, strict=True)
        self._steps.clear()
        self.log("train/loss", torch.stack(losses).mean())
        for name, metric in self.make_metrics().items():
            self.log(f"train/{name}", metric.to(self.device)(torch.cat(outputs), torch.cat(targets)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """In the layers' routing mode, then in the soft mode where there is one."""
        self._evaluate("val/", batch)
        if soft := [layer for layer in self.layers.values() if layer.has_soft_mode]:
            with routing_mode(soft, "soft"):
                self._evaluate("val/soft_", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and how much is lost by hard decisions."""
        values, soft = self._results("val/"), self._results("val/soft_")
        stage, _, name = self.monitor.partition("/")
        if (softly := soft.get(f"{stage}/soft_{name}")) is not None:
            soft["val/hardening_gap"] = softly - values[self.monitor]
        self.log_dict(values, prog_bar=True)
        self.log_dict(soft)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """In the layers' routing mode."""
        self._evaluate("test/", batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_dict(self._results("test/"))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The network's outputs."""
        outputs: Tensor = self(self.inputs(batch))
        return outputs

    def _evaluate(self, prefix: str, batch: Any) -> None:
        loss, outputs, targets = self.loss(batch)
        if prefix not in self._evaluated:
            metrics: dict[str, Metric] = {"loss": MeanMetric(nan_strategy="disable"), **self.make_metrics()}
            self._evaluated[prefix] = {name: metric.to(self.device) for name, metric in metrics.items()}
        for name, metric in self._evaluated[prefix].items():
            if name == "loss":
                metric.update(loss, self.samples(batch))
            else:
                metric.update(outputs, targets)

    def _results(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}{name}": metric.compute() for name, metric in self._evaluated.pop(prefix, {}).items()}


@contextmanager
def routing_mode(layers: Iterable[FeedforwardLayer], mode: RoutingMode) -> Iterator[None]:
    """Set the routing mode of these layers, for a while."""
    before = [(layer, layer.routing_mode) for layer in layers]
    try:
        for layer, _ in before:
            layer.routing_mode = mode
        yield
    finally:
        for layer, own in before:
            layer.routing_mode = own


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)

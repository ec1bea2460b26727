"""What every task has in common: losses, metrics, optimizer and schedules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torchmetrics import Metric

from fffexp.errors import UserError, refuse
from fffexp.layers import FeedforwardLayer, feedforward_layers
from fffexp.layers.random import normal_like
from fffexp.training.callbacks.routing import RoutingMonitor
from fffexp.training.callbacks.schedules import Schedules
from fffexp.training.callbacks.speed import TrainingSpeed
from fffexp.training.callbacks.stability import Stability
from fffexp.training.latency import in_rotation
from fffexp.training.losses import weighted_aux_losses
from fffexp.training.schedules import Adaptive, Constant, Schedule


class Task(LightningModule, ABC):
    """A loss to minimise with a network, whose feedforward layers add their weighted auxiliary losses in training.

    Your own task sets `network` and says what the `loss` of a batch is; and `monitor`, `mode` and `make_metrics`, if
    it is not the validation loss that counts:

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
        optimizer: which optimizer, with all but the parameters; AdamW unless given.
        lr_scheduler: which scheduler, with all but the optimizer. One that takes `total_steps` and is not given
            it gets the length of the training and is stepped every batch; others are stepped every epoch.
        aux_weights: weight of each auxiliary loss of the layers by its name (`layer.aux_losses`), and values of what
            else a layer lets a schedule set (`layer.annealed_buffers`). A number or a schedule.
        input_noise_std: standard deviation of the normal noise that is added to the network's input in training.

    Attributes:
        monitor: the logged metric that selects checkpoints and compares trials, by its `mode`.
        network: set by the subclass.
        aux_weights: the weights of the next training step; set by the schedules.
        lr: replaces the learning rate of the optimizer; for Lightning's LearningRateFinder.
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
        self.input_noise_std, self.lr_scheduler = input_noise_std, lr_scheduler
        # no default value, whose weight decay jsonargparse would hand on to an optimizer that a config names instead
        self.optimizer: OptimizerCallable = optimizer or torch.optim.AdamW
        weights = (aux_weights or {}).items()
        self.schedules = {name: each if isinstance(each, Schedule) else Constant(each) for name, each in weights}
        self.aux_weights: dict[str, float] = {}
        self.lr: float | None = None
        self._passes: dict[str, list[tuple[Tensor, ...]]] = {}  # () or (n,) loss, outputs, targets; by prefix
        self.kept_layers: dict[str, FeedforwardLayer] | None = None  # during a fit, looked up once

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
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def timed(self, rows: Tensor, batch_size: int) -> Callable[[], object]:
        """A call that the speed metrics time, of a batch of rows as `inputs` gives them."""
        return in_rotation(self.network, rows, batch_size)

    @property
    def unit_monitor(self) -> bool:  # whether what is monitored is a share, in [0, 1]
        metric = self.make_metrics().get(self.monitor.partition("/")[2])
        return metric is not None and (metric.plot_lower_bound, metric.plot_upper_bound) == (0, 1)

    @property
    def layers(self) -> dict[str, FeedforwardLayer]:
        """The feedforward layers of the network by their path in it."""
        return feedforward_layers(self.network) if self.kept_layers is None else self.kept_layers

    def check(self) -> None:
        """Raise ValueError for settings that do not fit the network; at the start of a fit, or earlier."""
        for layer in (layers := self.layers.values()):
            layer.check_trainable()
        names = sorted({name for layer in layers for name in (*layer.aux_losses, *layer.annealed_buffers)})
        kind = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "the network"
        for name, schedule in self.schedules.items():
            key, wrong = f"aux_weights.{name}", [bound for bound in schedule.bounds() if not 0 <= bound < float("inf")]
            adaptive = isinstance(schedule, Adaptive) and not any("entropy" in layer.metrics for layer in layers)
            refuse(
                (adaptive, f"{key}: {kind} has no choice entropy for an Adaptive schedule"),
                (wrong, f"{key} is {wrong[0] if wrong else ''}; it must be finite and not negative"),
                (name not in names, f"{key}: {kind} has no such auxiliary loss; it has {', '.join(names) or 'none'}"),
            )
        parameter = nn.Parameter(torch.zeros(1))
        optimizer: torch.optim.Optimizer = self.make_optimizer([parameter])["optimizer"]
        if any(layer.sparse_gradients for layer in layers):
            parameter.grad = torch.eye(1)[0].to_sparse()
            try:
                optimizer.step()
            except RuntimeError as error:
                raise UserError(
                    f"{type(optimizer).__name__} takes no sparse gradients: "
                    "give fffexp.LazyAdamW or torch.optim.SGD without momentum"
                ) from error

    def configure_callbacks(self) -> Sequence[Callback]:
        return [Schedules(), RoutingMonitor(), Stability(self), TrainingSpeed()]

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), self.trainer)

    def make_optimizer(self, parameters: Iterable[nn.Parameter], trainer: Trainer | None = None) -> dict[str, Any]:
        """The optimizer of these parameters, and a scheduler if there is one, as Lightning takes them.

        A scheduler that needs the length of the training has it from the trainer; without one both are tried out.
        """
        optimizer = self.optimizer(parameters)
        for group in optimizer.param_groups if self.lr is not None else ():
            group["lr"] = self.lr
        if (factory := cast(Any, self.lr_scheduler)) is None:
            return {"optimizer": optimizer}
        given, length, interval = getattr(factory, "keywords", {}), dict[str, int](), "epoch"
        if given.get("total_steps", 0) is None and given.get("epochs") is None:
            total = 100 if trainer is None else trainer.estimated_stepping_batches
            end = "step to train" if total < 1 else "end of the training"
            needs = f"there is no {end}, which a schedule of the learning rate needs: see trainer.max_epochs"
            refuse((not 1 <= total < float("inf"), needs))
            length, interval = {"total_steps": int(total)}, "step"
        scheduler = factory(optimizer, **length)
        how = {"scheduler": scheduler, "interval": interval, "monitor": getattr(scheduler, "monitor", None)}
        return {"optimizer": optimizer, "lr_scheduler": how}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # as Lightning does, which in mixed precision refuses fused optimizers, with reason only for float16
        precision, algorithm = self.trainer.precision_plugin, GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        if gradient_clip_val and getattr(precision, "scaler", None) is None:
            Precision.clip_gradients(precision, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def setup(self, stage: str) -> None:
        self.kept_layers = None
        if stage == "fit":
            self.check()

    def on_fit_start(self) -> None:
        self.kept_layers = self.layers
        if any(isinstance(each, (BatchSizeFinder, LearningRateFinder)) for each in self.trainer.callbacks):  # type: ignore[attr-defined] # set by a connector
            self.trainer.strategy.setup_optimizers(self.trainer)  # by what was found

    def on_fit_end(self) -> None:
        self.kept_layers = None

    def on_train_start(self) -> None:
        steps = self.trainer.estimated_stepping_batches
        for config in self.trainer.lr_scheduler_configs:  # which a resumed training restored
            planned = getattr(config.scheduler, "total_steps", None) if config.interval == "step" else None
            begun = f"{type(config.scheduler).__name__} was begun for {planned} steps, not {steps}"
            refuse((planned is not None and planned < steps, f"{begun}: resume with the epochs of before"))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.input_noise_std:
            x = x + self.input_noise_std * normal_like(x)
        return self.network(x)

    def training_loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As `loss`, with the weighted auxiliary losses."""
        loss, outputs, targets = self.loss(batch)
        return loss + weighted_aux_losses(self.layers.values(), self.aux_weights), outputs.detach(), targets

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        total, *found = self.training_loss(batch)
        # metrics wait for the end of the epoch: updating them every step would cost as much as the step
        self._passes.setdefault("train/", []).append((total.detach(), *found))
        return total

    def on_after_backward(self) -> None:
        for layer in self.layers.values():
            layer.routing = None  # frees the graph of this step

    def _evaluate(self, prefix: str, batch: Any) -> None:
        loss, *found = self.loss(batch)
        self._passes.setdefault(prefix, []).append((loss.expand(len(self.inputs(batch))), *found))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val/", batch)
        modes = {layer: layer.routing_mode for layer in self.layers.values() if layer.has_soft_mode}
        try:
            for layer in modes:
                layer.routing_mode = "soft"
            if modes:
                self._evaluate("val/soft_", batch)
        finally:
            for layer, mode in modes.items():
                layer.routing_mode = mode

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test/", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(self.inputs(batch))

    def measure(
        self, prefix: str, losses: tuple[Tensor, ...], outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """What is logged of an epoch's batches under this prefix: the mean loss, and the metrics."""
        made = self.make_metrics()
        found = (torch.cat(outputs), torch.cat(targets)) if made else ()  # without metrics they may have any shape
        metrics = {f"{prefix}{name}": metric.to(self.device)(*found) for name, metric in made.items()}
        return {f"{prefix}loss": torch.hstack(losses).float().mean(), **metrics}

    def _results(self, prefix: str) -> dict[str, Tensor]:
        passes = self._passes.pop(prefix, None)
        return self.measure(prefix, *zip(*passes, strict=True)) if passes else {}

    def on_train_epoch_start(self) -> None:
        self._passes.clear()  # what a finder trained

    def on_validation_epoch_start(self) -> None:
        self._passes = {"train/": self._passes.get("train/", [])}  # without what an aborted pass left

    on_test_epoch_start = on_validation_epoch_start

    def on_train_epoch_end(self) -> None:
        self.log_dict(self._results("train/"))

    def on_validation_epoch_end(self) -> None:
        values, soft = self._results("val/"), self._results("val/soft_")
        if (softly := soft.get(self.monitor.replace("/", "/soft_", 1))) is not None:
            soft["val/hardening_gap"] = softly - values[self.monitor]
        self.log_dict(values, prog_bar=True)
        self.log_dict(soft)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._results("test/"))


def from_data(name: str, value: int | None) -> int:
    """What a task gets from its data, or a ValueError if they do not have it."""
    if value is None:
        kind = "--data.kind regression if the targets are quantities, " * (name == "num_outputs")
        fix = f"give {kind}another task by --model, or other data"
        raise ValueError(f"{name} is missing, for the data have none: {fix}")
    return value


def _is_plain(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, str | int | float | bool | None | Mapping | list | tuple) and all(map(_is_plain, parts))

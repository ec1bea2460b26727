"""How evenly training goes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import ArrayLike
from torch import Tensor

from fffexp.errors import NonFiniteLossError

WINDOW = 100  # steps that a loss is compared with
DEVIATIONS = 5  # median absolute deviations above which it is a spike


class Course:
    """The course of a training: its losses, and (epoch, value) of what is monitored; epochs are counted from 1."""

    def __init__(self, mode: str) -> None:
        self.sign = 1 if mode == "max" else -1
        self.losses: list[float] = []  # whose spikes are not counted yet
        self.spikes = self.nonfinite_steps = 0
        self.validated: list[tuple[int, float]] = []
        self.fitted: list[tuple[int, float]] = []  # on the training data

    def best(self, values: Sequence[tuple[int, float]]) -> tuple[int, float]:
        return max(values, key=lambda each: -math.inf if math.isnan(each[1]) else self.sign * each[1])

    def results(self) -> dict[str, float]:
        courses = {"epochs_to_best": self.validated, "epochs_to_fit": self.fitted}
        found = {name: float(self.best(values)[0]) for name, values in courses.items() if values}
        if self.validated:
            late = [value for _, value in self.validated[-max(1, len(self.validated) // 4) :]]  # the last quarter
            found["stability/val_monitor_std"] = float(np.std(late, ddof=1)) if len(late) > 1 else 0.0
        spikes = float(self.spikes + count_spikes(self.losses))
        return found | {"stability/loss_spikes": spikes, "stability/nonfinite_steps": float(self.nonfinite_steps)}


class Stability(Course, Callback):
    """Tracks gradient norms, loss spikes and the course of what a task monitors; `results` after training.

    NonFiniteLossError for a loss that is NaN or infinite; on the CPU before it reaches the weights.
    """

    def __init__(self, task: Any) -> None:
        super().__init__(task.mode)
        self._task, self.epochs = task, 0
        self._unread: list[tuple[int, int, Tensor]] = []  # step, epoch, loss
        self._norms: list[Tensor] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._unread.append((trainer.global_step, trainer.current_epoch, loss.detach()))
        # some losses wait on another device than the CPU, for each reading waits for the device
        if loss.device.type == "cpu" or len(self._unread) >= 50:
            self._read()

    def _read(self) -> None:
        values = torch.stack([loss for *_, loss in self._unread]).tolist() if self._unread else []
        for (step, epoch, _), value in zip(self._unread, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss is {value} at step {step} (epoch {epoch}): lower the learning rate or the aux_weights"
                )
        self._unread.clear()
        self.losses += values
        if len(self.losses) > 2 * WINDOW:
            self.spikes += count_spikes(self.losses)
            self.losses = self.losses[-WINDOW:]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # the norm of the whole gradient, at some steps: each reading costs as much as a small layer
        if (trainer.global_step + 1) % reading_interval(trainer, trainer.accumulate_grad_batches) == 0:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
            self._norms.append(torch.nn.utils.get_total_norm(gradients))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read()  # a training that went wrong is not validated

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self._task.monitor)
        if value is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            self.validated.append((trainer.current_epoch + 1, float(value)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read()
        self.epochs = trainer.current_epoch + 1  # that ended
        if self._norms:
            norms, self._norms = torch.stack(self._norms), []
            finite = norms[norms.isfinite()]
            self.nonfinite_steps += len(norms) - len(finite)
            pl_module.log("stability/grad_norm", finite.mean() if len(finite) else norms.mean())

    def _follow_training(self, *_: Any) -> None:
        # later than the end of the epoch, whose metrics are complete only after all its hooks
        name = f"train/{self._task.monitor.partition('/')[2]}"
        value = self._task.trainer.callback_metrics.get(name) if self.epochs else None
        if value is not None and (not self.fitted or self.fitted[-1][0] != self.epochs):
            self.fitted.append((self.epochs, float(value)))

    on_train_epoch_start = on_train_end = _follow_training

    def state_dict(self) -> dict[str, Any]:
        self._read()
        self._follow_training()
        course = {name: getattr(self, name) for name in ("losses", "spikes", "nonfinite_steps", "validated", "fitted")}
        return course | {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def reading_interval(trainer: Trainer, batches: int = 1) -> int:
    """Every so many times, where one takes so many batches, are about 16 an epoch; a stream has no length."""
    return max(1, int(min(trainer.num_training_batches, 16_000)) // batches // 16)


def count_spikes(losses: ArrayLike) -> int:
    """Steps whose loss exceeds the median of the WINDOW steps before by DEVIATIONS median absolute deviations."""
    if len(losses := np.asarray(losses)) <= WINDOW:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], WINDOW)
    median = np.median(windows, axis=1)
    deviation = np.median(np.abs(windows - median[:, None]), axis=1)
    return int((losses[WINDOW:] > median + DEVIATIONS * deviation).sum())

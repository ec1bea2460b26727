"""How evenly training goes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from fffexp.errors import NonFiniteLossError

WINDOW = 100  # steps that a loss is compared with
UNREAD = 50  # losses that wait on another device than the CPU, for each reading waits for the device
READINGS = 16  # gradient norms an epoch, about
DEVIATIONS = 5  # median absolute deviations above which it is a spike


class Stability(Callback):
    """Tracks gradient norms, loss spikes and the course of what is monitored; `results` after training.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite; on the CPU before it reaches the weights.
    """

    def __init__(self) -> None:
        self._monitor, self._mode = "val/loss", "min"
        self._unread: list[tuple[int, int, Tensor]] = []  # step, epoch, loss
        self._losses: list[float] = []  # the last WINDOW, and those whose spikes are not counted yet
        self._spikes = 0
        self._norms: list[Tensor] = []
        self._optimizer_steps = 0
        self._nonfinite_steps = 0
        self._trainer: Trainer | None = None
        self._validated: list[tuple[int, float]] = []  # epoch from 1, value
        self._trained: dict[int, float] = {}  # epoch from 1 to value
        self._epochs = 0  # that ended

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the trainer, whose metrics of an epoch are complete only after all hooks of it."""
        self._trainer, self._monitor, self._mode = trainer, pl_module.monitor, pl_module.mode

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop at a non-finite loss."""
        self._unread.append((trainer.global_step, trainer.current_epoch, loss.detach()))
        if loss.device.type == "cpu" or len(self._unread) >= UNREAD:
            self._read()

    def _read(self) -> None:
        if not self._unread:
            return
        values = torch.stack([loss for *_, loss in self._unread]).tolist()
        for (step, epoch, _), value in zip(self._unread, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss is {value} at step {step} (epoch {epoch}): lower the learning rate or the aux_weights"
                )
        self._unread.clear()
        self._losses += values
        if len(self._losses) > 2 * WINDOW:
            self._spikes += count_spikes(np.array(self._losses))
            self._losses = self._losses[-WINDOW:]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the norm of the whole gradient, at some steps: each reading costs as much as a small layer."""
        self._optimizer_steps += 1
        if self._optimizer_steps % reading_interval(trainer, trainer.accumulate_grad_batches):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        self._norms.append(torch.nn.utils.get_total_norm(gradients))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read every loss before a checkpoint may be written."""
        self._read()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean norm."""
        self._read()
        self._epochs = trainer.current_epoch + 1
        if not self._norms:
            return
        norms = torch.stack(self._norms)
        self._norms.clear()
        finite = norms.isfinite()
        self._nonfinite_steps += int((~finite).sum())
        pl_module.log("stability/grad_norm", norms[finite].mean() if finite.any() else norms.mean())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow what is monitored."""
        value = trainer.callback_metrics.get(self._monitor)
        if value is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validated.append((trainer.current_epoch + 1, float(value)))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the epoch before."""
        self._follow_training()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the last epoch."""
        self._follow_training()

    def _follow_training(self) -> None:
        name = self._monitor.partition("/")[2]
        value = self._trainer.callback_metrics.get(f"train/{name}") if self._trainer and self._epochs else None
        if value is not None:
            self._trained[self._epochs] = float(value)

    def results(self) -> dict[str, float]:
        """Final metrics; epochs are counted from 1; what was never measured is left out."""
        results = {
            "stability/loss_spikes": float(self._spikes + count_spikes(np.array(self._losses))),
            "stability/nonfinite_steps": float(self._nonfinite_steps),
        }
        if self._validated:
            results["epochs_to_best"] = self._first_best(self._validated)
            results["stability/val_monitor_std"] = late_deviation([value for _, value in self._validated])
        if self._trained:
            results["epochs_to_fit"] = self._first_best(sorted(self._trained.items()))
        return results

    def _first_best(self, course: Sequence[tuple[int, float]]) -> float:
        sign = 1 if self._mode == "max" else -1
        scores = np.nan_to_num([sign * value for _, value in course], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        return float(course[int(np.argmax(scores))][0])

    def state_dict(self) -> dict[str, Any]:
        """The course so far, so that a resumed run reports all of it."""
        self._read()
        self._follow_training()
        return {
            "losses": list(self._losses),
            "spikes": self._spikes,
            "nonfinite_steps": self._nonfinite_steps,
            "validated": list(self._validated),
            "trained": dict(self._trained),
            "epochs": self._epochs,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue it."""
        self._losses, self._spikes = list(state_dict["losses"]), state_dict["spikes"]
        self._nonfinite_steps, self._epochs = state_dict["nonfinite_steps"], state_dict["epochs"]
        self._validated, self._trained = list(state_dict["validated"]), dict(state_dict["trained"])


def reading_interval(trainer: Trainer, batches: int = 1) -> int:
    """Every so many times, where one takes so many batches, are about READINGS an epoch."""
    epoch = min(trainer.num_training_batches, READINGS * 1000)  # a stream has no length
    return max(1, int(epoch) // batches // READINGS)


def late_deviation(course: Sequence[float]) -> float:
    """Standard deviation over the last quarter of the validations; 0 for a single one."""
    quarter = course[-max(1, len(course) // 4) :]
    return float(np.std(quarter, ddof=1)) if len(quarter) > 1 else 0.0


def count_spikes(losses: NDArray[np.float64]) -> int:
    """Steps whose loss exceeds the median of the WINDOW steps before by DEVIATIONS median absolute deviations."""
    if len(losses) <= WINDOW:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], WINDOW)
    median = np.median(windows, axis=1)
    deviation = np.median(np.abs(windows - median[:, None]), axis=1)
    return int((losses[WINDOW:] > median + DEVIATIONS * deviation).sum())

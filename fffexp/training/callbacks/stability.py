"""How evenly training goes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from fffexp.errors import NonFiniteLossError

WINDOW = 100  # steps that a loss is compared with
READINGS = 16  # gradient norms an epoch, about
DEVIATIONS = 5  # median absolute deviations above which it is a spike


class Stability(Callback):
    """Tracks gradient norms, loss spikes and the course of the accuracies; `results` after training.

    Raises:
        NonFiniteLossError: at the step whose loss is NaN or infinite.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._norms: list[Tensor] = []
        self._optimizer_steps = 0
        self._trainer: Trainer | None = None
        self._epochs: list[int] = []
        self._nonfinite_steps = 0
        self._train_accuracy: list[float] = []
        self._val_accuracy: list[float] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop at a non-finite loss, before it reaches the weights."""
        value = float(loss.detach())
        if not np.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value} at step {trainer.global_step} (epoch {trainer.current_epoch}): "
                "lower the learning rate or the aux_weights"
            )
        self._losses.append(value)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the norm of the whole gradient, at some steps: each reading costs as much as a small layer."""
        self._optimizer_steps += 1
        steps = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        if self._optimizer_steps % max(1, steps // READINGS):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        self._norms.append(torch.nn.utils.get_total_norm(gradients))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean norm."""
        if not self._norms:
            return
        norms = torch.stack(self._norms)
        self._norms.clear()
        finite = norms.isfinite()
        self._nonfinite_steps += int((~finite).sum())
        pl_module.log("stability/grad_norm", norms[finite].mean() if finite.any() else norms.mean())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the validation accuracy."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._val_accuracy.append(float(trainer.callback_metrics["val/accuracy"]))
            self._epochs.append(trainer.current_epoch + 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the trainer, whose metrics of an epoch are complete only after all hooks of it."""
        self._trainer = trainer

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the training accuracy of the epoch before."""
        self._take_train_accuracy()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the training accuracy of the last epoch."""
        self._take_train_accuracy()

    def _take_train_accuracy(self) -> None:
        accuracy = self._trainer.callback_metrics.get("train/accuracy") if self._trainer else None
        if accuracy is not None and len(self._train_accuracy) < len(self._val_accuracy):
            self._train_accuracy.append(float(accuracy))

    def results(self) -> dict[str, float]:
        """Final metrics; epochs are counted from 1; what was never measured is left out."""
        results = {
            "stability/loss_spikes": float(count_spikes(np.array(self._losses))),
            "stability/nonfinite_steps": float(self._nonfinite_steps),
        }
        if self._val_accuracy:
            results["epochs_to_best"] = float(self._epochs[int(np.argmax(self._val_accuracy))])
            results["stability/val_accuracy_std"] = late_deviation(self._val_accuracy)
        if self._train_accuracy:
            results["epochs_to_fit"] = float(self._epochs[int(np.argmax(self._train_accuracy))])
        return results

    def state_dict(self) -> dict[str, Any]:
        """The course so far, so that a resumed run reports all of it."""
        self._take_train_accuracy()
        return {
            "epochs": self._epochs,
            "losses": self._losses,
            "nonfinite_steps": self._nonfinite_steps,
            "train_accuracy": self._train_accuracy,
            "val_accuracy": self._val_accuracy,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue it."""
        self._epochs = list(state_dict["epochs"])
        self._losses = list(state_dict["losses"])
        self._nonfinite_steps = state_dict["nonfinite_steps"]
        self._train_accuracy = list(state_dict["train_accuracy"])
        self._val_accuracy = list(state_dict["val_accuracy"])


def late_deviation(accuracies: Sequence[float]) -> float:
    """Standard deviation over the last quarter of the epochs; 0 for a single one."""
    quarter = accuracies[-max(1, len(accuracies) // 4) :]
    return float(np.std(quarter, ddof=1)) if len(quarter) > 1 else 0.0


def count_spikes(losses: NDArray[np.float64]) -> int:
    """Steps whose loss exceeds the median of the WINDOW steps before by DEVIATIONS median absolute deviations."""
    if len(losses) <= WINDOW:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], WINDOW)
    median = np.median(windows, axis=1)
    deviation = np.median(np.abs(windows - median[:, None]), axis=1)
    return int((losses[WINDOW:] > median + DEVIATIONS * deviation).sum())

"""Speed of training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fffexp.timing import wait_for_timing


class TrainingSpeed(Callback):
    """Samples per second of the training passes, without validation; yields to timings on this machine."""

    def __init__(self) -> None:
        self._samples = 0
        self._seconds = 0.0
        self._start: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pause while another process times, which does not count."""
        before = time.perf_counter()
        wait_for_timing()
        self._seconds -= time.perf_counter() - before
        self._samples += len(batch[1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; validation comes after the last batch of an epoch."""
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock where there was no validation."""
        self._stop()

    def _stop(self) -> None:
        if self._start is not None:
            self._seconds += time.perf_counter() - self._start
            self._start = None

    def results(self) -> dict[str, float]:
        """Final metrics."""
        return {"speed/train_samples_per_s": self._samples / self._seconds} if self._seconds > 0 else {}

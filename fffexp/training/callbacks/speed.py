"""Speed of training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fffexp.timing import synchronize, wait_for_timing


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
        """Go on after a validation within the epoch; pause while another process times, which does not count."""
        before = time.perf_counter()
        wait_for_timing()
        waited = time.perf_counter() - before
        self._start = before + waited if self._start is None else self._start + waited
        self._samples += pl_module.samples(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock where validation has not."""
        self._stop(pl_module)

    def _stop(self, pl_module: LightningModule) -> None:
        if self._start is not None:
            synchronize(pl_module.device)
            self._seconds += time.perf_counter() - self._start
            self._start = None

    def results(self) -> dict[str, float]:
        """Final metrics."""
        return {"speed/train_samples_per_s": self._samples / self._seconds} if self._seconds > 0 else {}

    def state_dict(self) -> dict[str, Any]:
        """What was trained so far."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return {"samples": self._samples, "seconds": self._seconds + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._samples, self._seconds = state_dict["samples"], state_dict["seconds"]

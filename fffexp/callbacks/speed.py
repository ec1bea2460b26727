"""Speed of training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fffexp.bench.latency import wait_for_timing


class TrainingSpeed(Callback):
    """Samples per second of the training passes, without validation; yields to timings on this machine."""

    def __init__(self) -> None:
        self._samples = 0
        self._seconds = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Pause while another process times, then start the clock."""
        wait_for_timing()
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._start
        self._samples += len(batch[1])

    def results(self) -> dict[str, float]:
        """Final metrics."""
        return {"speed/train_samples_per_s": self._samples / self._seconds if self._seconds else 0.0}

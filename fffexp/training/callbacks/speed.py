"""Speed of training, and a line an epoch that says when it will end."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fffexp.timing import synchronize, wait_for_timing


class TrainingSpeed(Callback):
    """Samples per second of the training passes, without validation; yields to timings on this machine."""

    _samples, _seconds = 0, 0.0
    _start: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # the clock stands while another process times, and after a validation within the epoch
        before = time.perf_counter()
        wait_for_timing()
        self._start = (before if self._start is None else self._start) + time.perf_counter() - before
        self._samples += len(pl_module.inputs(batch))

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start is not None:
            synchronize(pl_module.device)
            self._seconds += time.perf_counter() - self._start
            self._start = None

    on_validation_start = on_train_epoch_end = _stop

    def results(self) -> dict[str, float]:
        return {"speed/train_samples_per_s": self._samples / self._seconds} if self._seconds > 0 else {}


class EpochLines(Callback):
    """Prints the loss, what is monitored and the time left after each epoch; cheaper and calmer in logs than a bar."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._first = time.monotonic(), trainer.current_epoch

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # later than the end of the epoch, whose metrics are complete only after all its hooks
        done, total, metrics = trainer.current_epoch, trainer.max_epochs or -1, trainer.callback_metrics
        if done > self._first:
            seconds = (time.monotonic() - self._start) / (done - self._first) * (total - done)
            of, left = (total, f"  {seconds:.0f} s left") if total > 0 else ("?", "")
            names = dict.fromkeys(("train/loss", pl_module.monitor))
            values = "  ".join(f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics)
            print(f"epoch {done}/{of}  {values}{left}", flush=True)

    on_train_epoch_start = on_train_end = _print

"""What a run saves: its best, its last epoch, and the state of the random numbers."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from fffexp.errors import UserError, refuse
from fffexp.training.config import CONFIG


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint that is best on validation, and in `metrics` what was validated with it.

    A resumed run goes on beside its checkpoint; if the folder has another path now, Lightning would forget the best.
    """

    def __init__(self, monitor: str, mode: str) -> None:
        super().__init__(monitor=monitor, mode=mode)
        self.metrics: dict[str, float] = {}
        self._measured = ""  # path of the checkpoint that the metrics are of

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.best_model_path != self._measured:
            self._measured, logged = self.best_model_path, trainer.callback_metrics.items()
            validated = ("val/", "routing/used_leaves", "routing/usage_cv")  # of the validated weights
            self.metrics = {name: float(value) for name, value in logged if name.startswith(validated)}
        # Lightning has collected the states of callbacks before this hook
        checkpoint["callbacks"][self.state_key]["metrics"] = self.metrics

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(self.dirpath or "", Path(path).name)) if path else path

        moved: dict[str, Any] = {key: here(path) for key, path in state_dict.items() if key.endswith("_model_path")}
        best = self._measured = moved["best_model_path"]
        missing = f"ckpt_path: {best}, the best of that run, is not there: put it back, or resume from another"
        refuse((best and not Path(best).is_file(), missing))
        moved["best_k_models"] = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "dirpath": self.dirpath})
        self.metrics = state_dict.get("metrics", {})


class LastCheckpoint(Checkpoint):
    """Saves every finished epoch as last.ckpt, all at once, so that a killed run can be resumed from there.

    The folder is set before training; the config, as YAML, is kept in every checkpoint.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot be made ({error.strerror}): set FFFEXP_OUTPUTS to a folder that can be written"
            raise UserError(f"{self.folder} {message}") from error

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unfinished = self.folder / "last.ckpt.part"
        trainer.save_checkpoint(unfinished, weights_only=False)
        os.replace(unfinished, self.folder / "last.ckpt")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG] = self.config


class RandomState(Callback):
    """Keeps the states of all random number generators in checkpoints: a resumed run draws what it would have drawn."""

    _restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # as late as this, for setting up draws too
        if self._restored is None:
            return
        state, self._restored = move_data_to_device(self._restored, "cpu"), None  # loaded to where the model is
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():  # on other devices CUDA's part is left out
            torch.cuda.set_rng_state_all(state["cuda"])
        kind, keys, *position = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
        random.setstate(state["python"])

    def state_dict(self) -> dict[str, Any]:
        # in types that torch.load(weights_only=True) takes
        kind, keys, *position = np.random.get_state(legacy=True)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *position),
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

"""What a run saves: its best, its last epoch, and the state of the random numbers."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from fffexp.errors import UserError
from fffexp.training.config import CONFIG

LAST = "last.ckpt"
# logged in validation, and so of the weights that were validated
VALIDATED = ("val/", "routing/used_leaves", "routing/usage_cv")


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint that is best on validation, and what was validated with it.

    A resumed run goes on beside its checkpoint; if the folder has another path now, Lightning would forget the best.
    """

    def __init__(self, monitor: str, mode: str) -> None:
        super().__init__(monitor=monitor, mode=mode)
        self.metrics: dict[str, float] = {}

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_model_path
        super().on_validation_end(trainer, pl_module)
        self._note(trainer, before)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_model_path
        super().on_train_epoch_end(trainer, pl_module)
        self._note(trainer, before)

    def _note(self, trainer: Trainer, before: str) -> None:
        if self.best_model_path != before:
            logged = trainer.callback_metrics.items()
            self.metrics = {name: float(value) for name, value in logged if name.startswith(VALIDATED)}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "metrics": self.metrics}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = Path(self.dirpath or "")

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = paths["best_model_path"]
        if best and not Path(best).is_file():
            raise UserError(
                f"ckpt_path: {best}, the best of that run, is not there: put it back, or resume from another"
            )
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": kept, "dirpath": self.dirpath})
        self.metrics = state_dict.get("metrics", {})


class LastCheckpoint(Checkpoint):
    """Saves every finished epoch as last.ckpt, all at once, so that a killed run can be resumed from there.

    Args:
        folder: where to; set before training.
        config: what the run was made of, as YAML; it is kept in every checkpoint.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be made ({error.strerror}): set FFFEXP_OUTPUTS to a folder that can be written"
            ) from error

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] # set by a connector
            unfinished = self.folder / f"{LAST}.part"
            trainer.save_checkpoint(unfinished, weights_only=False)
            os.replace(unfinished, self.folder / LAST)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG] = self.config


class RandomState(Callback):
    """Keeps the states of the random number generators in checkpoints: a resumed run draws what it would have drawn."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # as late as this, for setting up draws too
        if self._restored is not None:
            set_random_state(self._restored)
            self._restored = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return random_state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict


def random_state() -> dict[str, Any]:
    """States of all generators, in types that torch.load(weights_only=True) takes."""
    kind, keys, *position = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *position),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from what `random_state` gave; on other devices CUDA's part is left out."""
    torch.set_rng_state(_on_cpu(state["torch"]))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_on_cpu(s) for s in state["cuda"]])
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, _on_cpu(keys).numpy().astype(np.uint32), *position))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _on_cpu(state: Tensor) -> Tensor:
    return state.cpu()  # a checkpoint is loaded to where the model is

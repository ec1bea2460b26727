"""What all classification data have in common: splits, normalisation, checks, batches."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from fffexp.data.batches import Batches, InputBatches
from fffexp.errors import UserError

Rows = tuple[Tensor, Tensor]
Part = Literal["train", "test"]
Kind = Literal["images", "labels"]

# nothing is differentiated in evaluation, so larger batches cost no memory that matters
EVALUATION_ROWS = 2048


class ClassificationData(LightningDataModule, ABC):
    """A classification data set, whole in memory, with `train_data`, `val_data`, `test_data` after `setup`.

    Each of them is (inputs, labels): float32 (rows, *in_shape) and int64 (rows,), on the CPU. `in_shape` and
    `num_classes` are known from construction on.

    Args:
        batch_size: Rows a training batch.
        seed: Of the split into training and validation, and of the shuffling.
        normalize: "unit": pixels in [0, 1]; "standard": minus the mean, over the standard deviation, both
            one scalar a channel, of the training part alone.

    Raises:
        UserError: an argument or the data cannot be used.
    """

    in_shape: tuple[int, ...]
    num_classes: int
    train_data: Rows
    val_data: Rows
    test_data: Rows

    def __init__(self, batch_size: int = 256, seed: int = 0, normalize: Literal["unit", "standard"] = "unit") -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1")
        if seed < 0:
            raise UserError(f"the seed of the data is {seed}: give 0 or more")
        if normalize not in ("unit", "standard"):
            raise UserError(f"normalize is {normalize!r}: give unit or standard")
        self.batch_size = batch_size
        self.seed = seed
        self.normalize = normalize
        self._loaded = False

    @abstractmethod
    def load(self, part: Part) -> Rows:
        """Inputs float32 (rows, *in_shape), pixels in [0, 1]; labels int64 (rows,). "train" is unsplit."""

    def source(self, part: Part, kind: Kind) -> str:
        """What an error message calls the images or labels of a part."""
        return f"{type(self).__name__} ({part} {kind})"

    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers of the training and validation parts: 9:1, drawn by the seed (as in the FFF paper)."""
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        held_out = len(labels) // 10
        return order[held_out:], order[:held_out]

    def setup(self, stage: str | None = None) -> None:
        """Load, check, split and normalise, once; every stage needs the training part for the statistics."""
        if self._loaded:
            return
        inputs, labels = self._checked("train")
        train, val = self.split(labels)
        if not len(train) or not len(val):
            raise UserError(
                f"{self.source('train', 'images')}: {len(labels)} rows split into {len(train)} for training"
                f" and {len(val)} for validation: use a data set with more rows"
            )
        parts = [(inputs[train], labels[train]), (inputs[val], labels[val]), self._checked("test")]
        if self.normalize == "standard":
            mean, std = self._statistics(parts[0][0])
            parts = [((x - mean) / std, y) for x, y in parts]
        self.train_data, self.val_data, self.test_data = parts
        self._loaded = True

    def train_dataloader(self) -> Batches:
        """Shuffled by (seed, epoch)."""
        order: dict[str, Any] = {"seed": self.seed, "epoch": self._epoch, "done": self._done}
        return Batches(*self.train_data, self.batch_size, **order, device=self._device())

    def val_dataloader(self) -> Batches:
        """Large batches in order."""
        return self._evaluation(self.val_data)

    def test_dataloader(self) -> Batches:
        """Large batches in order."""
        return self._evaluation(self.test_data)

    def predict_dataloader(self) -> InputBatches:
        """The test inputs in order, without labels."""
        return InputBatches(self._evaluation(self.test_data))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do: the whole data is there already, and walking each batch to find out takes time."""
        return batch

    def _evaluation(self, rows: Rows) -> Batches:
        return Batches(*rows, max(self.batch_size, EVALUATION_ROWS), device=self._device())

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def _done(self) -> int:
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _device(self) -> torch.device:
        if self.trainer is None:
            return torch.device("cpu")
        if self.trainer.world_size > 1:
            # Lightning shards a DataLoader alone: each process would see all rows, and nothing would tell
            raise UserError(
                f"{type(self).__name__} is not divided between {self.trainer.world_size} processes:"
                " give --trainer.devices 1 --trainer.num_nodes 1"
            )
        return self.trainer.strategy.root_device

    def _statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation a channel, shaped to be broadcast over (rows, channels, ...)."""
        dims = [0, *range(2, inputs.ndim)]
        std, mean = torch.std_mean(inputs, dim=dims, correction=0, keepdim=True)
        if (std == 0).any():
            raise UserError(
                f"{self.source('train', 'images')}: all pixels of a channel are the same,"
                " which cannot be standardised: give --data.normalize unit or other data"
            )
        return mean, std

    def _checked(self, part: Part) -> Rows:
        inputs, labels = self.load(part)
        images_name, labels_name = self.source(part, "images"), self.source(part, "labels")
        if len(inputs) != len(labels):
            raise UserError(
                f"{images_name} has {len(inputs)} images, but {labels_name} has {len(labels)} labels:"
                " take both files from the same data set"
            )
        if not inputs.numel():
            raise UserError(f"{images_name} is empty: use a data set with rows in it")
        if tuple(inputs.shape[1:]) != self.in_shape:
            raise UserError(
                f"{images_name} has images of shape {tuple(inputs.shape[1:])}, not {self.in_shape}:"
                " take all files from the same data set"
            )
        if not (finite := inputs.isfinite()).all():
            row = int(finite.logical_not().nonzero()[0, 0])
            raise UserError(f"{images_name} has a NaN or inf in row {row}: fix or remove that row")
        wrong = ((labels < 0) | (labels >= self.num_classes)).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            raise UserError(
                f"{labels_name} has the label {int(labels[row])} in row {row},"
                f" outside 0 to {self.num_classes - 1}: fix the labels, or give the right number of classes"
            )
        return inputs, labels


def pixels(array: np.ndarray[Any, Any]) -> Tensor:
    """Any numeric array as a float32 tensor of its shape; uint8 is brought to [0, 1], all else is kept."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused by name
        inputs = torch.from_numpy(array.astype(np.float32))
    return inputs.div_(255) if array.dtype == np.uint8 else inputs

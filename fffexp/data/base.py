"""What all classification data have in common: splits, normalisation, checks, batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from typing_extensions import override

from fffexp.errors import refuse

Rows = tuple[Tensor, Tensor]
Part = Literal["train", "test"]
Kind = Literal["images", "labels"]


class Batches:
    """Every row once a pass, in order or shuffled; the last, smaller batch is kept.

    The order is a function of (seed, epoch) alone, on every device, so that a run that is resumed within an epoch
    sees the rows the uninterrupted one would have.

    Args:
        rows: inputs (rows, ...) and labels (rows,); or inputs alone, which then are batches by themselves.
        batch_size: rows of a batch, at least 1.
        seed: of the shuffling; None keeps the order.
        progress: the current epoch, and the number of its batches that a resumed run has had already; called at the
            start of each pass.
        device: where the whole tensors are put and the batches come from.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        batch_size: int,
        *,
        seed: int | None = None,
        progress: Callable[[], tuple[int, int]] = lambda: (0, 0),
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows = tuple(each.to(device) for each in rows)
        self.batch_size, self.seed, self.progress = batch_size, seed, progress

    def __len__(self) -> int:
        return -(-len(self.rows[0]) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        batches: Iterable[tuple[Tensor, ...]]
        if self.seed is None:
            batches = zip(*(torch.split(each, self.batch_size) for each in self.rows), strict=True)
        else:
            epoch, done = self.progress()  # not before the first batch is asked for: Lightning resets it late
            # SeedSequence mixes the pair, so that (0, 1) and (1, 0) are unrelated;
            # drawn on the CPU, so that the order does not depend on the device
            state = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0])
            order = torch.randperm(len(self.rows[0]), generator=torch.Generator().manual_seed(state))
            chosen = torch.split(order.to(self.rows[0].device), self.batch_size)[done:]
            batches = (tuple(each.index_select(0, rows) for each in self.rows) for rows in chosen)
        for batch in batches:
            yield batch if len(batch) > 1 else batch[0]

    def state_dict(self) -> dict[str, int]:
        """Nothing: Lightning's progress is the position. A state, though empty, makes it resume a pass."""
        return {}  # nor would more be read: a loader that is set up before the checkpoint is does not get its state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing, see `state_dict`."""


class ClassificationData(LightningDataModule, ABC):
    """A classification data set, whole in memory, with `train_data`, `val_data`, `test_data` after `setup`.

    Each is (inputs, labels): float32 (rows, *in_shape) and int64 (rows,), on the CPU. A subclass gives `load`, and
    `in_shape` and `num_classes` from construction on.

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
        refuse(
            (batch_size < 1, f"batch_size is {batch_size}: give at least 1"),
            (seed < 0, f"the seed of the data is {seed}: give 0 or more"),
            (normalize not in ("unit", "standard"), f"normalize is {normalize!r}: give unit or standard"),
        )
        self.batch_size, self.seed, self.normalize = batch_size, seed, normalize

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

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_data"):  # every stage needs the training part, for the statistics
            return
        inputs, labels = self._checked("train")
        train, val = self.split(labels)
        sizes = f"{len(labels)} rows split into {len(train)} for training and {len(val)} for validation"
        name = self.source("train", "images")
        refuse((not len(train) or not len(val), f"{name}: {sizes}: use a data set with more rows"))
        parts = [(inputs[train], labels[train]), (inputs[val], labels[val]), self._checked("test")]
        if self.normalize == "standard":
            std, mean = torch.std_mean(parts[0][0], dim=[0, *range(2, inputs.ndim)], correction=0, keepdim=True)
            same = f"{name}: all pixels of a channel are the same, which cannot be standardised"
            refuse(((std == 0).any(), f"{same}: give --data.normalize unit or other data"))
            parts = [((x - mean) / std, y) for x, y in parts]
        self.train_data, self.val_data, self.test_data = parts

    @override
    def train_dataloader(self) -> Batches:
        return self._batches(self.train_data, self.seed)

    @override
    def val_dataloader(self) -> Batches:
        return self._batches(self.val_data)

    @override
    def test_dataloader(self) -> Batches:
        return self._batches(self.test_data)

    @override
    def predict_dataloader(self) -> Batches:
        return self._batches(self.test_data[:1])  # without labels

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # all data is there already, and walking each batch to find out takes time

    def _batches(self, rows: Sequence[Tensor], seed: int | None = None) -> Batches:
        processes = self.trainer.world_size if self.trainer else 1
        fix = f"not divided between {processes} processes: give --trainer.devices 1 --trainer.num_nodes 1"
        # Lightning shards a DataLoader alone: each process would see all rows, and nothing would tell
        refuse((processes > 1, f"{type(self).__name__} is {fix}"))
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        # nothing is differentiated in evaluation, so larger batches cost no memory that matters
        batch_size = self.batch_size if seed is not None else max(self.batch_size, 2048)
        return Batches(rows, batch_size, seed=seed, progress=self._progress, device=device)

    def _progress(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.trainer.current_epoch, ready if self.trainer.training else 0

    def _checked(self, part: Part) -> Rows:
        inputs, labels = self.load(part)
        images, classes = self.source(part, "images"), self.source(part, "labels")
        counts, shape = f"{len(inputs)} images, but {classes} has {len(labels)} labels", tuple(inputs.shape[1:])
        infinite = next(iter((~inputs.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()), None)
        row, label = next(((r, y) for r, y in enumerate(labels.tolist()) if not 0 <= y < self.num_classes), (None, 0))
        allowed = f"0 to {self.num_classes - 1}: fix the labels, or give the right number of classes"
        same = "files from the same data set"
        refuse(
            (len(inputs) != len(labels), f"{images} has {counts}: take both {same}"),
            (not inputs.numel(), f"{images} is empty: use a data set with rows in it"),
            (shape != self.in_shape, f"{images} has images of shape {shape}, not {self.in_shape}: take all {same}"),
            (infinite is not None, f"{images} has a NaN or inf in row {infinite}: fix or remove that row"),
            (row is not None, f"{classes} has the label {label} in row {row}, outside {allowed}"),
        )
        return inputs, labels


def pixels(array: np.ndarray[Any, Any]) -> Tensor:
    """Any numeric array as a float32 tensor of its shape; uint8 is brought to [0, 1], all else is kept."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused by name
        inputs = torch.from_numpy(array.astype(np.float32))
    return inputs.div_(255) if array.dtype == np.uint8 else inputs

"""What all data have in common: batches; and, for data whole in memory, splits, normalisation and checks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from typing_extensions import override

from fffexp.errors import refuse

Rows = tuple[Tensor, Tensor]
Part = Literal["train", "test"]
Kind = Literal["images", "labels"]
EVALUATION_ELEMENTS = 2**23  # of the inputs of a batch in evaluation: 32 MiB


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
        self.batch_size, self.seed, self.progress, self.device = batch_size, seed, progress, device

    @property
    def count(self) -> int:
        """Rows of a pass."""
        return len(self.rows[0])

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if self.seed is None:
            for start in range(0, self.count, self.batch_size):
                yield self.batch(slice(start, start + self.batch_size))
            return
        epoch, done = self.progress()  # not before the first batch is asked for: Lightning resets it late
        # SeedSequence mixes the pair, so that (0, 1) and (1, 0) are unrelated;
        # drawn on the CPU, so that the order does not depend on the device
        state = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0])
        for rows in self.order(torch.Generator().manual_seed(state)).split(self.batch_size)[done:]:
            yield self.batch(rows)

    def order(self, generator: torch.Generator) -> Tensor:
        """The rows of a shuffled pass, (count,)."""
        return torch.randperm(self.count, generator=generator).to(self.rows[0].device)

    def batch(self, rows: slice | Tensor) -> Any:
        """The batch of these rows: a slice of all, or a part of `order`."""
        batch = tuple(each[rows] if isinstance(rows, slice) else each.index_select(0, rows) for each in self.rows)
        return batch if len(batch) > 1 else batch[0]

    def state_dict(self) -> dict[str, int]:
        """Nothing: Lightning's progress is the position. A state, though empty, makes it resume a pass."""
        return {}  # nor would more be read: a loader that is set up before the checkpoint is does not get its state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing, see `state_dict`."""


class Data(LightningDataModule, ABC):
    """Data that give their batches themselves: `train_data`, `val_data`, `test_data` after `setup`.

    A task is linked to `in_shape`, the shape of one sample, and to what else is here from construction on:
    `num_classes` for classes, `num_outputs` for numbers, `vocab_size` for tokens.

    Args:
        batch_size: Rows a training batch.
        seed: Of the shuffling, and of the split into training and validation where that is drawn.
    """

    batches: ClassVar[type[Batches]] = Batches
    in_shape: tuple[int, ...]
    train_data: Any
    val_data: Any
    test_data: Any

    def __init__(self, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        refuse(
            (batch_size < 1, f"batch_size is {batch_size}: give at least 1"),
            (seed < 0, f"the seed of the data is {seed}: give 0 or more"),
        )
        self.batch_size, self.seed = batch_size, seed

    @property
    def evaluation_batch_size(self) -> int:
        """Rows of a batch in evaluation."""
        return self.batch_size

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
        return self._batches(self.test_data)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is there already, and walking each batch to find out takes time

    def _batches(self, rows: Any, seed: int | None = None) -> Batches:
        processes = self.trainer.world_size if self.trainer else 1
        fix = f"not divided between {processes} processes: give --trainer.devices 1 --trainer.num_nodes 1"
        # Lightning shards a DataLoader alone: each process would see all rows, and nothing would tell
        refuse((processes > 1, f"{type(self).__name__} is {fix}"))
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        batch_size = self.evaluation_batch_size if seed is None else self.batch_size
        return self.batches(rows, batch_size, seed=seed, progress=self._progress, device=device)

    def _progress(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.trainer.current_epoch, ready if self.trainer.training else 0


class InMemoryData(Data):
    """Inputs and targets whole in memory: classes, or numbers to regress on.

    Each part is (inputs, targets) on the CPU: float32 (rows, *in_shape), and int64 (rows,) labels or float32
    (rows, num_outputs). A subclass gives `load`; and, from construction on, `in_shape` and either `num_classes`, and
    `class_names` if they have any, or `num_outputs`; and `target_names` if there are any.

    Args:
        batch_size: Rows a training batch.
        seed: Of the split into training and validation, and of the shuffling.
        normalize: "unit": bytes brought to [0, 1], other numbers as they are; "standard": minus the mean, over the
            standard deviation, both one scalar a channel or column, of the training part alone. One that is constant
            there becomes 0.
        normalize_targets: Numbers to regress on minus their mean, over their standard deviation, in the training part;
            `decode` undoes it.

    Attributes:
        target_mean: (num_outputs,) float64 that is taken off; after `setup`, for numbers alone.
        target_std: likewise, what is divided by.

    Raises:
        UserError: an argument or the data cannot be used.
    """

    num_classes: int
    num_outputs: int
    class_names: Sequence[str] = ()
    target_names: Sequence[str] = ()
    test_share = 0.2  # of data that have no test part of their own
    train_data: Rows
    val_data: Rows
    test_data: Rows

    def __init__(
        self,
        batch_size: int = 256,
        seed: int = 0,
        normalize: Literal["unit", "standard"] = "unit",
        normalize_targets: bool = True,
    ) -> None:
        super().__init__(batch_size, seed)
        refuse((normalize not in ("unit", "standard"), f"normalize is {normalize!r}: give unit or standard"))
        self.normalize, self.normalize_targets = normalize, normalize_targets

    @abstractmethod
    def load(self, part: Part) -> Rows | None:
        """Inputs of a float dtype (rows, *in_shape), pixels in [0, 1]; targets int64 (rows,) or (rows, num_outputs).

        "train" is unsplit. None for "test": there is no such part, and `test_share` of "train" becomes it, the same
        rows whatever the seed.
        """

    def source(self, part: Part, kind: Kind) -> str:
        """What an error message calls the inputs or targets of a part."""
        return f"{type(self).__name__} ({part} {kind})"

    def split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers of the training and validation parts: 9:1, drawn by the seed (as in the FFF paper)."""
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.seed))
        held_out = len(targets) // 10
        return order[held_out:], order[:held_out]

    def statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What is taken off training inputs (rows, *in_shape), and what they are divided by; each broadcasts."""
        dims = [0, *range(2, inputs.ndim)]
        std, mean = torch.std_mean(inputs, dim=dims, correction=0, keepdim=True)
        # by comparison: rounding may leave a constant column a deviation just above 0
        constant = inputs.amax(dims, keepdim=True) == inputs.amin(dims, keepdim=True)
        return mean, std.masked_fill(constant, 1)

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_data"):  # every stage needs the training part, for the statistics
            return
        (inputs, targets), test = self._loaded()
        train, val = self.split(targets)
        name, counts = self.source("train", "labels"), [len(train), len(val), len(test[1])]
        sizes = "split into {} for training, {} for validation and {} for the test".format(*counts)
        refuse((not all(counts), f"{name}: its rows are {sizes}: use a data set with more rows"))
        parts = [(inputs[train], targets[train]), (inputs[val], targets[val]), test]
        inputs, targets = parts[0]
        same = f"a target is the same in all {counts[0]} training rows, so that there is nothing to learn"
        refuse(((targets == targets[0]).all(0).any(), f"{name}: {same}: use other data"))
        self._scale = self.statistics(inputs) if self.normalize == "standard" else None
        if targets.is_floating_point():
            std, mean = torch.std_mean(targets.double(), 0, correction=0)
            self.target_std = std if self.normalize_targets else torch.ones_like(std)
            self.target_mean = mean if self.normalize_targets else torch.zeros_like(mean)
            parts = [(x, ((y - self.target_mean) / self.target_std).float()) for x, y in parts]
        self.train_data, self.val_data, self.test_data = ((self.normalized(x), y) for x, y in parts)

    def normalized(self, inputs: Tensor) -> Tensor:
        """Inputs as `load` gives them, in the form in which batches have them; after `setup`."""
        if self._scale is not None:
            mean, std = self._scale
            inputs = (inputs - mean) / std
        return inputs.float()

    def decode(self, outputs: Tensor) -> dict[str, list[Any]]:
        """The columns of a table of what a task predicts: names of classes, or numbers in their own unit.

        Args:
            outputs: labels (rows,), or numbers (rows, num_outputs) in the unit of the targets of `train_data`. Anything
                else, such as logits that a task of your own predicts, is taken as it is, see `plain_columns`.
        """
        classes, width = hasattr(self, "num_classes"), tuple(outputs.shape[1:])
        if outputs.is_floating_point() == classes or width != (() if classes else (self.num_outputs,)):
            return plain_columns(outputs)
        if classes:
            names = self.class_names or range(self.num_classes)
            return {(self.target_names or ("class",))[0]: [names[label] for label in outputs.tolist()]}
        columns = (outputs.double().cpu() * self.target_std + self.target_mean).T.tolist()
        titles = self.target_names or [f"output_{number}" for number in range(len(columns))]
        return dict(zip(titles, columns, strict=True))

    @property
    @override
    def evaluation_batch_size(self) -> int:
        # nothing is differentiated in evaluation: larger batches are faster, as long as their memory does not matter
        return max(self.batch_size, min(2048, EVALUATION_ELEMENTS // max(1, math.prod(self.in_shape))))

    @override
    def predict_dataloader(self) -> Batches:
        return self._batches(self.test_data[:1])  # without targets

    def _loaded(self) -> tuple[Rows, Rows]:
        # what is there to train and validate on, and the test part
        loaded, test = self.load("train"), self.load("test")
        assert loaded is not None
        inputs, targets = self._checked("train", loaded)
        if test is not None:
            return loaded, self._checked("test", test)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        held_out = round(len(targets) * self.test_share)
        tested, rest = order[:held_out].sort().values, order[held_out:].sort().values
        return (inputs[rest], targets[rest]), (inputs[tested], targets[tested])

    def _checked(self, part: Part, rows: Rows) -> Rows:
        inputs, targets = rows
        here, there = self.source(part, "images"), self.source(part, "labels")
        counts, shape = f"{len(inputs)} rows, but {there} has {len(targets)} targets", tuple(inputs.shape[1:])
        same = "files from the same data set"
        refuse(
            (len(inputs) != len(targets), f"{here} has {counts}: take both {same}"),
            (not inputs.numel(), f"{here} is empty: use a data set with rows in it"),
            (shape != self.in_shape, f"{here} has rows of shape {shape}, not {self.in_shape}: take all {same}"),
        )
        infinite = _first(~inputs.float().isfinite().flatten(1).all(1))
        refuse((infinite is not None, f"{here} has a NaN or inf in row {infinite}: fix or remove that row"))
        if not targets.is_floating_point():
            row, last = _first((targets < 0) | (targets >= self.num_classes)), self.num_classes - 1
            label = None if row is None else int(targets[row])
            fix = "fix the labels, or give the right number of classes"
            refuse((row is not None, f"{there} has the label {label} in row {row}, outside 0 to {last}: {fix}"))
        else:
            row, wide = _first(~targets.float().isfinite().flatten(1).all(1)), tuple(targets.shape[1:])
            numbers = f"targets of shape {wide}, not ({self.num_outputs},)"
            refuse(
                (wide != (self.num_outputs,), f"{there} has {numbers}: take all {same}"),
                (row is not None, f"{there} has a NaN or inf in row {row}: fix or remove that row"),
            )
        return rows


def _first(wrong: Tensor) -> int | None:
    return next(iter(wrong.nonzero().flatten().tolist()), None)


def plain_columns(outputs: Tensor) -> dict[str, list[Any]]:
    """The columns `prediction`, or `prediction_0`, `prediction_1`, ..., of outputs (rows, ...)."""
    columns = outputs.flatten(1).unbind(1) if outputs.dim() > 1 else [outputs]
    names = [f"prediction_{i}" for i in range(len(columns))] if len(columns) > 1 else ["prediction"]
    return dict(zip(names, (column.tolist() for column in columns), strict=True))


def pixels(array: np.ndarray[Any, Any]) -> Tensor:
    """Any numeric array as a float32 tensor of its shape; uint8 is brought to [0, 1], all else is kept."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused by name
        inputs = torch.from_numpy(array.astype(np.float32))
    return inputs.div_(255) if array.dtype == np.uint8 else inputs


def name_classes(values: np.ndarray[Any, Any]) -> tuple[list[str], np.ndarray[Any, Any]]:
    """The distinct values as texts, in the order of numbers if all are, else of texts; and for each value its place."""
    found, labels = np.unique(values.astype(str), return_inverse=True)
    try:
        order = np.argsort(found.astype(float), kind="stable")
    except ValueError:
        order = np.arange(len(found))
    return found[order].tolist(), np.argsort(order)[labels]

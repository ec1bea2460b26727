"""Batches of a data set that is held in memory as whole tensors."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor


class Batches:
    """Every row once a pass, in order or shuffled; the last, smaller batch is kept.

    The order is a function of (seed, epoch) alone, on every device, so that a run that is resumed within an epoch
    sees the rows the uninterrupted one would have.

    Args:
        inputs: (rows, ...).
        labels: (rows,).
        batch_size: Rows a batch, at least 1.
        seed: Shuffles by this seed; None keeps the order.
        epoch: Gives the current epoch; read at the start of each pass.
        done: Gives the number of batches of that pass that a resumed run has had already.
        device: Where the whole tensors are put and the batches come from.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        done: Callable[[], int] = lambda: 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.inputs = inputs.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.done = done

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            inputs, labels = (torch.split(x, self.batch_size) for x in (self.inputs, self.labels))
            yield from zip(inputs, labels, strict=True)
            return
        for rows in torch.split(self._order(self.seed, self.epoch()), self.batch_size)[self.done() :]:
            yield self.inputs.index_select(0, rows), self.labels.index_select(0, rows)

    def state_dict(self) -> dict[str, int]:
        """Nothing: Lightning's progress is the position. That there is a state tells it that a pass can be resumed.

        It would be of no use either: where the task asks for the number of steps, as for a one-cycle schedule, the
        loader is set up before the checkpoint is read, and Lightning then leaves the loader's state out.
        """
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing, see `state_dict`."""

    def _order(self, seed: int, epoch: int) -> Tensor:
        # SeedSequence mixes the pair, so that (0, 1) and (1, 0) are unrelated;
        # drawn on the CPU, so that the order does not depend on the device
        state = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(state)
        return torch.randperm(len(self.inputs), generator=generator).to(self.inputs.device)


class InputBatches:
    """The inputs of `Batches` without their labels, for prediction."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (inputs for inputs, _ in self.batches)

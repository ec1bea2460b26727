"""Batches of a data set that is held in memory as whole tensors."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor


class Batches:
    """Every row once a pass, in order or shuffled; the last, smaller batch is kept.

    The order is a function of (seed, epoch) alone, on every device, and the position within an epoch is kept
    in Lightning's checkpoints, so that a resumed run sees the rows the uninterrupted one would have.

    Args:
        inputs: (rows, ...).
        labels: (rows,).
        batch_size: Rows a batch, at least 1.
        seed: Shuffles by this seed; None keeps the order.
        epoch: Tells the current epoch, read at the start of each pass.
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
        device: torch.device | str = "cpu",
    ) -> None:
        self.inputs = inputs.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self._at = (0, 0)  # (epoch, batches already given in it)
        self._resume_at: tuple[int, int] | None = None

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            inputs, labels = (torch.split(x, self.batch_size) for x in (self.inputs, self.labels))
            yield from zip(inputs, labels, strict=True)
            return
        epoch = self.epoch()
        # a full last pass, or one of another epoch, leaves nothing to skip
        resume, self._resume_at = self._resume_at, None
        skip = resume[1] % len(self) if resume and resume[0] == epoch else 0
        batches = torch.split(self._order(self.seed, epoch), self.batch_size)
        for given, rows in enumerate(batches[skip:], start=skip + 1):
            self._at = (epoch, given)
            yield self.inputs.index_select(0, rows), self.labels.index_select(0, rows)

    def state_dict(self) -> dict[str, int]:
        """Where the current pass stands; Lightning saves it with the loops."""
        return {"epoch": self._at[0], "batch": self._at[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there, if the next pass is of the same epoch."""
        self._at = self._resume_at = (state["epoch"], state["batch"])

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

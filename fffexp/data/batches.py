"""Batches of a data set that is held in memory as whole tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
            chosen = torch.split(self._order(self.seed, epoch), self.batch_size)[done:]
            batches = (tuple(each.index_select(0, rows) for each in self.rows) for rows in chosen)
        for batch in batches:
            yield batch if len(batch) > 1 else batch[0]

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
        order = torch.randperm(len(self.rows[0]), generator=torch.Generator().manual_seed(state))
        return order.to(self.rows[0].device)

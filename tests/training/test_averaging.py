"""The average of the weights in a real Trainer."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fffexp.layers import FF
from fffexp.training.callbacks.averaging import WeightAveraging
from fffexp.training.classification import ClassificationTask

STEPS = 6


class Record(Callback):
    """The weights after each step, and those that are validated."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append(flat(pl_module))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.validated.append(flat(pl_module))


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def fit(decay: float, folder: Path, steps: int = STEPS, **options: Any) -> tuple[Record, ClassificationTask]:
    seed_everything(0, verbose=False)
    task = ClassificationTask(partial(FF, width=4), (3,), 2, optimizer=partial(torch.optim.Adam, lr=0.1))
    x = torch.randn(8, 3)
    loader = DataLoader(TensorDataset(x, x.argmax(1) // 2), batch_size=8)
    record = Record()
    trainer = Trainer(
        max_epochs=steps, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[record, WeightAveraging(decay)],
    )  # fmt: skip
    trainer.fit(task, loader, loader, **options)
    return record, task


def expected(weights: list[Tensor], decay: float) -> Tensor:
    average = weights[0]
    for t, weight in enumerate(weights[1:], 1):
        kept = min(decay, (1 + t) / (10 + t))
        average = kept * average + (1 - kept) * weight
    return average


@pytest.mark.parametrize("decay", [0.999, 0.3, 0.0])
def test_the_average_warms_up_and_is_what_is_validated_and_left(decay: float, tmp_path: Path) -> None:
    record, task = fit(decay, tmp_path)
    for step in range(STEPS):
        wanted = expected(record.after[: step + 1], decay)
        assert torch.allclose(record.validated[step], wanted, atol=1e-6), step
    assert torch.allclose(flat(task), expected(record.after, decay), atol=1e-6)
    if decay:
        assert not torch.allclose(flat(task), record.after[-1], atol=1e-4)


def test_a_resumed_average_goes_on(tmp_path: Path) -> None:
    _, whole = fit(0.999, tmp_path / "whole")
    fit(0.999, tmp_path / "half", STEPS // 2)
    (half,) = (tmp_path / "half").rglob("*.ckpt")
    _, resumed = fit(0.999, tmp_path / "resumed", ckpt_path=half)
    assert torch.allclose(flat(resumed), flat(whole), atol=1e-6)


def test_in_a_long_training_it_is_the_plain_average() -> None:
    averaging = WeightAveraging(0.999)
    assert averaging.share(1) == pytest.approx(9 / 11)
    assert averaging.share(8990) == pytest.approx(0.001)
    assert averaging.share(10**6) == pytest.approx(0.001)


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="decay is 1"):
        WeightAveraging(1)

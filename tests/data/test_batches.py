from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from fffexp.data import Batches, InMemoryData
from fffexp.data.base import Part, Rows
from fffexp.errors import UserError


class Numbered(InMemoryData):
    """Each input is its row number."""

    in_shape = (1, 1, 1)
    num_classes = 2

    def load(self, part: Part) -> Rows:
        rows = torch.arange(110 if part == "train" else 30)
        return rows.float().reshape(-1, 1, 1, 1), rows % 2


class Recorder(LightningModule):
    """Records the rows of every training batch and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append((self.current_epoch, rows_of(batch[0])))
        return self.weight.square()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        assert len(batch[0]) == 11

    def predict_step(self, batch: Tensor) -> Tensor:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows_of(inputs: Tensor) -> list[int]:
    return [int(row) for row in inputs.flatten()]


def passes(batches: Batches) -> list[int]:
    return [row for inputs, _ in batches for row in rows_of(inputs)]


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **(quiet | options))


@pytest.mark.parametrize("size", [1, 7, 50, 51, 100, 1000])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_row_once_a_pass(size: int, seed: int | None) -> None:
    labels = torch.arange(50)
    batches = Batches((labels.reshape(50, 1), labels), size, seed=seed)
    pairs = list(batches)
    assert len(pairs) == len(batches)
    assert all(torch.equal(x[:, 0], y) for x, y in pairs)
    rows = torch.cat([y for _, y in pairs])
    assert (torch.equal(rows, labels)) == (seed is None)
    assert torch.equal(rows.sort().values, labels)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    rows = torch.arange(100)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(passes(Batches((rows, rows), 8, seed=seed, progress=lambda: (epoch, 0))))

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert all(order(*key) == value for key, value in orders.items())


def test_epoch_is_read_at_each_pass() -> None:
    rows, epochs = torch.arange(20), iter([3, 4, 3])
    batches = Batches((rows, rows), 8, seed=0, progress=lambda: (next(epochs), 0))
    first, second, third = passes(batches), passes(batches), passes(batches)
    assert first == third != second


def test_rows_live_on_the_device() -> None:
    rows = torch.arange(20)
    batches = Batches((rows, rows), 8, seed=0, device="meta")
    assert [each.device.type for each in batches.rows] == ["meta", "meta"]


def test_the_order_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    rows = torch.arange(20)
    passes(Batches((rows, rows), 8, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def test_trainer_sees_each_row_once_an_epoch_in_new_orders(tmp_path: Path) -> None:
    data, model = Numbered(batch_size=32, seed=1), Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(model, data)
    orders = [[row for epoch, rows in model.seen if epoch == e for row in rows] for e in range(3)]
    assert all(sorted(order) == sorted(rows_of(data.train_data[0])) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert [len(rows) for _, rows in model.seen] == [32, 32, 32, 3] * 3


# 99 rows in batches of 20 are 5 steps an epoch, 3 if limited: saved within an epoch and at its end
@pytest.mark.parametrize(("limit", "steps"), [(1.0, 2), (1.0, 5), (1.0, 8), (3, 2), (3, 3), (3, 4)])
def test_resumed_run_sees_the_rows_of_the_uninterrupted_run(tmp_path: Path, limit: float, steps: int) -> None:
    options = {"max_epochs": 3, "limit_train_batches": limit, "limit_val_batches": 0}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)
    whole = Recorder()
    trainer(tmp_path, callbacks=[saving], **options).fit(whole, Numbered(batch_size=20))
    resumed = Recorder()
    path = str(tmp_path / f"step={steps}.ckpt")
    trainer(tmp_path, enable_checkpointing=False, **options).fit(resumed, Numbered(batch_size=20), ckpt_path=path)
    assert resumed.seen == whole.seen[steps:]


def test_a_schedule_that_asks_for_the_number_of_steps_does_not_lose_the_position(tmp_path: Path) -> None:
    class OneCycle(Recorder):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = int(self.trainer.estimated_stepping_batches)
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)]

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, resumed = OneCycle(), OneCycle()
    trainer(tmp_path, callbacks=[saving], max_epochs=3).fit(whole, Numbered(batch_size=20))
    path = str(tmp_path / "step=3.ckpt")
    trainer(tmp_path, enable_checkpointing=False, max_epochs=3).fit(resumed, Numbered(batch_size=20), ckpt_path=path)
    assert resumed.seen == whole.seen[3:]


@pytest.mark.parametrize("limit", [1.0, 3])
def test_resumed_from_the_end_of_an_epoch(tmp_path: Path, limit: float) -> None:
    options = {"limit_train_batches": limit}
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = Recorder()
    trainer(tmp_path, callbacks=[saving], max_epochs=4, **options).fit(whole, Numbered(batch_size=20))
    for epoch in range(3):
        resumed = Recorder()
        path = str(tmp_path / f"epoch={epoch}.ckpt")
        trainer(tmp_path, enable_checkpointing=False, max_epochs=4, **options).fit(
            resumed, Numbered(batch_size=20), ckpt_path=path
        )
        assert resumed.seen == [(e, rows) for e, rows in whole.seen if e > epoch]


def test_prediction_takes_the_test_inputs_in_order(tmp_path: Path) -> None:
    data = Numbered()
    (inputs,) = trainer(tmp_path).predict(Recorder(), data) or []
    assert torch.equal(inputs, data.test_data[0])  # type: ignore[arg-type] # outputs of one loader


def test_several_processes_are_refused() -> None:
    class Fake:
        world_size = 2

    data = Numbered()
    data.setup()
    data.trainer = Fake()  # type: ignore[assignment] # stands in for a Trainer
    with pytest.raises(UserError, match=r"--trainer\.devices 1"):
        data.train_dataloader()

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fffexp.data import ClassificationData
from fffexp.data.base import Part, Rows
from fffexp.errors import UserError


class Small(ClassificationData):
    """200 + 40 random rows of two channels, which `change` may spoil."""

    in_shape = (2, 3, 3)
    num_classes = 4

    def __init__(self, change: Callable[[Part, Rows], Rows] = lambda part, rows: rows, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.change = change
        self.loads = 0

    def load(self, part: Part) -> Rows:
        self.loads += 1
        generator = torch.Generator().manual_seed(len(part))
        rows = 200 if part == "train" else 40
        scale = torch.tensor([1.0, 5.0]).reshape(2, 1, 1)
        inputs = scale * torch.rand(rows, 2, 3, 3, generator=generator)
        return self.change(part, (inputs, torch.arange(rows) % 4))


def spoil(part: Part, kind: int, value: float) -> Callable[[Part, Rows], Rows]:
    def change(loaded: Part, rows: Rows) -> Rows:
        if loaded == part:
            rows[kind][7] = value
        return rows

    return change


def error(change: Callable[[Part, Rows], Rows] | None = None, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        (Small(change, **kwargs) if change else Small(**kwargs)).setup()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_setup_is_idempotent_and_splits_nine_to_one() -> None:
    data = Small()
    data.setup("fit")
    first = data.train_data
    data.setup("test")
    assert data.loads == 2
    assert data.train_data is first
    sizes = [len(y) for _, y in (data.train_data, data.val_data, data.test_data)]
    assert sizes == [180, 20, 40]
    assert [x.dtype for x in data.train_data] == [torch.float32, torch.int64]


def test_split_is_disjoint_and_drawn_by_the_seed() -> None:
    labels = torch.zeros(200)
    splits = [Small(seed=seed).split(labels) for seed in (0, 0, 1)]
    for train, val in splits:
        assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(200))
    assert torch.equal(splits[0][1], splits[1][1])
    assert not torch.equal(splits[0][1], splits[2][1])


def test_standard_is_by_channel_of_the_training_part() -> None:
    data = Small(normalize="standard")
    data.setup()
    inputs, _ = data.train_data
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5
    assert inputs.std((0, 2, 3), correction=0) == pytest.approx([1, 1], abs=1e-5)


def test_validation_and_test_rows_do_not_enter_the_statistics() -> None:
    clean = Small(normalize="standard")
    clean.setup()
    _, val = clean.split(torch.zeros(200))

    def poison(part: Part, rows: Rows) -> Rows:
        rows[0][val if part == "train" else slice(None)] = 1e6
        return rows

    poisoned = Small(poison, normalize="standard")
    poisoned.setup()
    assert torch.equal(clean.train_data[0], poisoned.train_data[0])
    assert poisoned.val_data[0].min() > 1e4
    assert poisoned.test_data[0].min() > 1e4


def test_evaluation_keeps_order_in_large_batches() -> None:
    data = Small(batch_size=8)
    data.setup()
    ((inputs, labels),) = data.val_dataloader()
    assert torch.equal(inputs, data.val_data[0])
    assert torch.equal(labels, data.val_data[1])
    assert len(data.train_dataloader()) == 23
    (predicted,) = data.predict_dataloader()
    assert torch.equal(predicted, data.test_data[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["train", "test"])
def test_non_finite_pixels_are_refused(part: Part, value: float) -> None:
    assert f"Small ({part} images) has a NaN or inf in row 7" in error(spoil(part, 0, value))


@pytest.mark.parametrize("label", [-1, 4])
@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_out_of_range_are_refused(part: Part, label: int) -> None:
    message = f"Small ({part} labels) has the label {label} in row 7, outside 0 to 3"
    assert message in error(spoil(part, 1, label))


def test_counts_must_agree() -> None:
    message = error(lambda part, rows: (rows[0], rows[1][:-1]))
    assert "has 200 images" in message
    assert "has 199 labels" in message


def test_shape_must_be_the_one_told() -> None:
    assert "shape (1, 3, 3), not (2, 3, 3)" in error(lambda part, rows: (rows[0][:, :1], rows[1]))


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_part_is_refused(part: Part) -> None:
    def empty(loaded: Part, rows: Rows) -> Rows:
        return (rows[0][:0], rows[1][:0]) if loaded == part else rows

    assert f"Small ({part} images) is empty" in error(empty)


def test_an_empty_split_is_refused() -> None:
    message = error(lambda part, rows: (rows[0][:9], rows[1][:9]))
    assert "9 rows split into 9 for training and 0 for validation" in message


def test_a_constant_channel_cannot_be_standardised() -> None:
    def constant(part: Part, rows: Rows) -> Rows:
        rows[0][:, 1] = 0.5
        return rows

    assert "--data.normalize unit" in error(constant, normalize="standard")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "is -1"),
        ({"normalize": "x"}, "normalize is 'x'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    assert message in error(**arguments)

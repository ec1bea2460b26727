import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fffexp.data import InMemoryData
from fffexp.data.base import Part, Rows
from fffexp.errors import UserError


class Small(InMemoryData):
    """200 + 40 random rows of two channels, which `change` may spoil."""

    in_shape: tuple[int, ...] = (2, 3, 3)
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
    assert "has 200 rows" in message
    assert "has 199 targets" in message


def test_shape_must_be_the_one_told() -> None:
    assert "shape (1, 3, 3), not (2, 3, 3)" in error(lambda part, rows: (rows[0][:, :1], rows[1]))


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_part_is_refused(part: Part) -> None:
    def empty(loaded: Part, rows: Rows) -> Rows:
        return (rows[0][:0], rows[1][:0]) if loaded == part else rows

    assert f"Small ({part} images) is empty" in error(empty)


def test_an_empty_split_is_refused() -> None:
    message = error(lambda part, rows: (rows[0][:9], rows[1][:9]))
    assert "are split into 9 for training, 0 for validation and 9 for the test" in message


# 0.1 is not a sum of few powers of two: the deviation of many of it is not exactly 0
@pytest.mark.parametrize("value", [0.5, 0.1])
def test_a_constant_channel_becomes_zero(value: float) -> None:
    def constant(part: Part, rows: Rows) -> Rows:
        rows[0][:, 1] = value if part == "train" else value + 1
        return rows

    data = Small(constant, normalize="standard")
    data.setup()
    assert data.train_data[0][:, 1].abs().max() < 1e-6
    assert data.train_data[0][:, 0].std() > 0.9
    assert data.test_data[0][:, 1].numpy() == pytest.approx(1, abs=1e-6)


def test_one_class_alone_is_refused() -> None:
    message = error(lambda part, rows: (rows[0], torch.full_like(rows[1], 2)))
    assert "Small (train labels): a target is the same in all 180 training rows" in message


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


class Numbers(InMemoryData):
    """Two numbers to regress on, of different units, and a test part that is held out."""

    in_shape = (3,)
    num_outputs = 2

    def load(self, part: Part) -> Rows | None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(100, 3, generator=generator, dtype=torch.float64)
        targets = torch.stack([1e6 + inputs[:, 0], 1e-3 * inputs[:, 1]], 1)
        return (inputs, targets) if part == "train" else None


def test_targets_of_regression_are_standardised_by_the_training_part() -> None:
    data = Numbers()
    data.setup()
    targets = data.train_data[1]
    assert (targets.dtype, targets.shape) == (torch.float32, (72, 2))
    assert targets.mean(0).abs().max() < 1e-5
    assert targets.std(0, correction=0) == pytest.approx([1, 1], abs=1e-5)
    assert not hasattr(data, "num_classes")


def test_decode_gives_targets_in_their_own_unit() -> None:
    for normalize in (True, False):
        data = Numbers(normalize_targets=normalize)
        data.setup()
        columns = data.decode(data.test_data[1])
        assert list(columns) == ["output_0", "output_1"]
        assert columns["output_1"] == pytest.approx((1e-3 * data.test_data[0][:, 1]).tolist(), rel=1e-4)
        # float32 has steps of 1/16 at 1e6
        tolerance = 1e-6 if normalize else 0.07
        assert columns["output_0"] == pytest.approx(
            (1e6 + data.test_data[0][:, 0].double()).tolist(), rel=0, abs=tolerance
        )


def test_decode_names_classes() -> None:
    data = Small()
    assert data.decode(torch.tensor([3, 0])) == {"class": [3, 0]}
    data.class_names, data.target_names = ["a", "b", "c", "d"], ["kind"]
    assert data.decode(torch.tensor([3, 0])) == {"kind": ["d", "a"]}


def test_the_held_out_test_part_is_the_same_for_all_seeds() -> None:
    first, second = Numbers(seed=0), Numbers(seed=1)
    first.setup()
    second.setup()
    assert torch.equal(first.test_data[0], second.test_data[0])
    assert [len(y) for _, y in (first.train_data, first.val_data, first.test_data)] == [72, 8, 20]
    rows = {tuple(row) for data in (first.train_data, first.val_data, first.test_data) for row in data[0].tolist()}
    assert len(rows) == 100
    assert not torch.equal(first.val_data[0], second.val_data[0])


def test_a_constant_target_is_refused() -> None:
    class Constant(Numbers):
        def load(self, part: Part) -> Rows | None:
            rows = super().load(part)
            return rows and (rows[0], torch.stack([rows[1][:, 0], torch.full((100,), 0.1)], 1))

    with pytest.raises(UserError, match="a target is the same in all 72 training rows"):
        Constant().setup()


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 8, 8), (2**24,)])
def test_batches_of_evaluation_are_as_large_as_memory_allows(shape: tuple[int, ...]) -> None:
    data = Small(batch_size=16)
    data.in_shape = shape
    assert 16 <= data.evaluation_batch_size <= 2048
    assert data.evaluation_batch_size == 16 or data.evaluation_batch_size * math.prod(shape) <= 2**23


@pytest.mark.parametrize("data", [Small, Numbers])
def test_decode_takes_other_outputs_as_they_are(data: type[Small | Numbers]) -> None:
    made = data()
    made.setup()
    assert made.decode(torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])) == {
        "prediction_0": [0.5, 3],
        "prediction_1": [1, 4],
        "prediction_2": [2, 5],
    }
    assert made.decode(torch.tensor([[7.0], [8.0]])) == {"prediction": [7, 8]}

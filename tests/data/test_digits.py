import pytest
import torch

from fffexp.data import Digits


def digits(seed: int) -> Digits:
    data = Digits(seed=seed)
    data.setup()
    return data


def keys(inputs: torch.Tensor) -> set[bytes]:
    """The images themselves; no two of the digits are equal."""
    return {image.numpy().tobytes() for image in inputs}


@pytest.fixture(scope="module")
def folds() -> list[Digits]:
    return [digits(seed) for seed in range(5)]


def test_shape_and_range(folds: list[Digits]) -> None:
    assert (Digits().in_shape, Digits().num_classes) == ((1, 8, 8), 10)
    inputs, labels = folds[0].train_data
    assert inputs.shape[1:] == (1, 8, 8)
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (float(inputs.min()), float(inputs.max())) == (0, 1)


def test_parts_are_disjoint_and_whole(folds: list[Digits]) -> None:
    for data in folds:
        parts = [keys(inputs) for inputs, _ in (data.train_data, data.val_data, data.test_data)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 1797


def test_every_part_is_stratified(folds: list[Digits]) -> None:
    whole = torch.cat([y for _, y in (folds[0].train_data, folds[0].val_data, folds[0].test_data)])
    shares = whole.bincount() / len(whole)
    for data in folds:
        for _, labels in (data.train_data, data.val_data, data.test_data):
            assert (labels.bincount(minlength=10) - shares * len(labels)).abs().max() < 1.5


def test_the_test_part_is_the_same_for_all_seeds(folds: list[Digits]) -> None:
    for other in (*folds[1:], digits(17)):
        assert torch.equal(folds[0].test_data[0], other.test_data[0])
        assert torch.equal(folds[0].test_data[1], other.test_data[1])
    assert len(folds[0].test_data[1]) == 360


def test_five_folds_cover_the_rest(folds: list[Digits]) -> None:
    validation = [keys(data.val_data[0]) for data in folds]
    assert sum(map(len, validation)) == len(set.union(*validation)) == 1437
    assert set.union(*validation) == keys(folds[0].train_data[0]) | validation[0]


def test_folds_are_dealt_anew_after_five_seeds(folds: list[Digits]) -> None:
    assert keys(digits(5).val_data[0]) != keys(folds[0].val_data[0])
    assert keys(digits(1).val_data[0]) == keys(folds[1].val_data[0])

import pytest
import torch
from tolerances import TOLERANCES, assert_all_close, assert_close, gradients


@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCES if dtype.is_floating_point])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_passes_within_and_fails_beyond(dtype: torch.dtype, scale: float) -> None:
    expected = torch.tensor([scale, 0.0], dtype=torch.float64)
    offset = torch.tensor([0.0, TOLERANCES[dtype] * scale], dtype=torch.float64)
    expected = expected.to(dtype).double()
    assert_close((expected + 0.9 * offset).to(dtype), expected)
    with pytest.raises(AssertionError, match="off by"):
        assert_close((expected + 1.1 * offset).to(dtype), expected)


def test_small_values_are_held_to_an_absolute_bound() -> None:
    assert_close(torch.tensor([1e-7]), torch.tensor([2e-7]))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([1.0, torch.nan]), torch.ones(2)),
        (torch.tensor([1.0, torch.inf]), torch.ones(2)),
        (torch.ones(2), torch.tensor([1.0, torch.inf])),  # would allow anything elsewhere
        (torch.full((2,), torch.nan), torch.full((2,), torch.nan)),
        (torch.tensor([2**40]), torch.tensor([2**40 + 1])),  # whole numbers are equal or not
        (torch.ones(2), torch.ones(1)),  # would broadcast
        (torch.ones(0, 2), torch.ones(0, 3)),
    ],
)
def test_not_finite_or_another_shape_fails(actual: torch.Tensor, expected: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_close(actual, expected)


def test_a_failure_in_a_dict_is_named() -> None:
    assert_all_close({"a": torch.ones(1)}, {"a": torch.ones(1)})
    with pytest.raises(AssertionError, match="b: off by"):
        assert_all_close({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.zeros(1)})
    with pytest.raises(AssertionError):
        assert_all_close({}, {"a": torch.ones(1)})


def test_gradients() -> None:
    x, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    one, two = gradients(x, {"x": x}), gradients(3 * x, {"x": x, "unused": unused})
    assert_close(two["x"], 3 * one["x"])
    assert (one["x"] != 0).all()
    assert (two["unused"] == 0).all()

"""Products that skip zeros are products."""

from typing import Any

import pytest
import torch
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor

from fffexp.kernels.operators import available
from fffexp.kernels.skipping import skip_zeros, used

compiled_and_not = pytest.mark.parametrize("compiled", [True, False], ids=["native", "eager"])


def sparse(batch: int, width: int, share: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(batch + width)
    h = torch.randn(batch, width, generator=generator)
    return (h * (torch.rand(batch, width, generator=generator) < share)).to(dtype)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@compiled_and_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 3, 63, 257])
def test_equals_the_dense_product(batch: int, share: float, dtype: torch.dtype, compiled: bool) -> None:
    if compiled:
        assert available()
    for width, columns in ((1, 1), (37, 5), (130, 67)):
        h, weight, bias = (
            sparse(batch, width, share, dtype),
            matrix(width, columns, dtype=dtype),
            matrix(columns, dtype=dtype),
        )
        expected = h.double() @ weight.double() + bias.double()
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                assert_close(skip_zeros(h, weight, bias, compiled), expected)


@compiled_and_not
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_every_gradient(share: float, compiled: bool) -> None:
    assert available()
    dtype = torch.float32 if compiled else torch.float64
    h, weight, bias = sparse(9, 40, share, dtype), matrix(40, 5, dtype=dtype), matrix(5, dtype=dtype)
    wanted = {name: t.requires_grad_() for name, t in (("h", h), ("weight", weight), ("bias", bias))}
    found = gradients(skip_zeros(h, weight, bias, compiled), wanted)
    expected = gradients(torch.addmm(bias, h, weight), wanted)
    assert_all_close(found, expected)


@compiled_and_not
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_autocast_changes_nothing(share: float, compiled: bool) -> None:
    assert available()
    h, weight, bias = sparse(9, 40, share, torch.float32), matrix(40, 5), matrix(5)
    wanted = {name: t.requires_grad_() for name, t in (("h", h), ("weight", weight), ("bias", bias))}
    expected = skip_zeros(h, weight, bias, compiled)
    found = gradients(expected, wanted)
    for within in (True, False):  # backward too
        with torch.autocast("cpu", torch.bfloat16):
            output = skip_zeros(h, weight, bias, compiled)
            inside = gradients(output, wanted) if within else {}
        assert torch.equal(output, expected)
        assert_all_close(inside or gradients(output, wanted), found)


@compiled_and_not
def test_rows_that_are_not_needed_are_not_read(compiled: bool) -> None:
    assert available()
    h, weight = sparse(2, 40, 0.1, torch.float32), matrix(40, 5)
    expected = skip_zeros(h, weight, matrix(5), compiled)
    weight[(h == 0).all(0)] = float("nan")
    assert torch.equal(skip_zeros(h, weight, matrix(5), compiled), expected)
    assert used(h).tolist() == (h != 0).any(0).nonzero().flatten().tolist()
    h[1, 7] = float("nan")  # is not zero
    assert skip_zeros(h, weight, matrix(5), compiled)[1].isnan().all()


def test_arguments_that_do_not_fit() -> None:
    assert available()
    good: dict[str, Any] = {"h_BH": torch.ones(2, 3), "weight_HO": torch.ones(3, 4), "bias_O": torch.ones(4)}
    with torch.no_grad():
        for wrong in ({"h_BH": torch.ones(2, 4)}, {"bias_O": torch.ones(3)}):
            with pytest.raises(ValueError, match="do not fit"):
                skip_zeros(**good | wrong, compiled=True)
        with pytest.raises(ValueError, match="takes float32 and bfloat16"):
            skip_zeros(**{name: t.double() for name, t in good.items()}, compiled=True)
        with pytest.raises(ValueError, match="h is Double, weight Float"):
            skip_zeros(**good | {"h_BH": torch.ones(2, 3).double()}, compiled=True)

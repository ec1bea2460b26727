"""Products with rows that each sample chooses, against a loop over them, with every gradient."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fffexp.kernels import gathered
from fffexp.kernels.gathered import gathered_dots, gathered_sum, scattered_outer
from fffexp.kernels.operators import available

needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler")
FORMS = pytest.mark.parametrize(
    ("dtype", "compiled"),
    [
        (torch.float64, False),
        (torch.float32, False),
        pytest.param(torch.float32, True, marks=needs_compiler),
        (torch.bfloat16, False),
    ],
    ids=str,
)
both = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
# samples, rows of each, rows of the matrix, columns; some rows chosen by several, some by none, one twice by a sample
SHAPES = [(7, 3, 5, 4), (1, 1, 1, 1), (0, 2, 3, 5), (5, 0, 3, 4), (30, 4, 100, 37), (9, 2, 2, 16)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2**24], ids=["a sample a step", "one step"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "STEP", request.param)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, k, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((samples, columns), (samples, k), (rows, columns))
    )
    x, h, weight = drawn
    return x, h, torch.randint(rows, (samples, k), generator=generator), weight


@FORMS
@shapes
@pytest.mark.usefixtures("step")
def test_dots(shape: tuple[int, ...], dtype: torch.dtype, compiled: bool) -> None:
    x, _, row, weight = make(shape, dtype)
    output = gathered_dots(x, row, weight, compiled)
    expected = torch.einsum("bi,bki->bk", x.double(), weight.double()[row])
    compare(output, expected, {"x": x, "weight": weight}, dtype)


@FORMS
@shapes
@pytest.mark.usefixtures("step")
def test_sum(shape: tuple[int, ...], dtype: torch.dtype, compiled: bool) -> None:
    _, h, row, weight = make(shape, dtype)
    output = gathered_sum(h, row, weight, compiled)
    expected = torch.einsum("bk,bki->bi", h.double(), weight.double()[row])
    compare(output, expected, {"h": h, "weight": weight}, dtype)


@FORMS
@shapes
@pytest.mark.usefixtures("step")
def test_outer(shape: tuple[int, ...], dtype: torch.dtype, compiled: bool) -> None:
    x, h, row, weight = make(shape, dtype)
    output = scattered_outer(h, row, x, len(weight), compiled)
    chosen = F.one_hot(row, len(weight)).double()
    expected = torch.einsum("bk,bkn,bi->ni", h.double(), chosen, x.double())
    compare(output, expected, {"x": x, "h": h}, dtype)


def compare(output: Tensor, expected: Tensor, wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


def test_second_derivatives() -> None:
    x, h, row, weight = make((4, 3, 5, 2), torch.float64)
    assert torch.autograd.gradgradcheck(lambda x, weight: gathered_dots(x, row, weight, False), (x, weight))
    assert torch.autograd.gradgradcheck(lambda h, weight: gathered_sum(h, row, weight, False), (h, weight))
    assert torch.autograd.gradgradcheck(lambda h, x: scattered_outer(h, row, x, 5, False), (h, x))


@both
def test_inputs_that_are_not_contiguous(compiled: bool) -> None:
    x, h, row, weight = make((7, 3, 5, 4), torch.float32)
    turned = [each.T.contiguous().T for each in (x, h, row, weight)]
    assert not any(each.is_contiguous() for each in turned)
    tx, th, trow, tweight = turned
    assert_close(gathered_dots(tx, trow, tweight, compiled), gathered_dots(x, row, weight, compiled))
    assert_close(gathered_sum(th, trow, tweight, compiled), gathered_sum(h, row, weight, compiled))
    assert_close(scattered_outer(th, trow, tx, 5, compiled), scattered_outer(h, row, x, 5, compiled))


def test_registered_as_torch_wants_it() -> None:
    (x, h, row, weight), compiled = make((7, 3, 5, 4), torch.float32), available()
    torch.library.opcheck(gathered_dots, (x, row, weight, compiled))
    torch.library.opcheck(gathered_sum, (h, row, weight, compiled))
    torch.library.opcheck(scattered_outer, (h, row, x, 5, compiled))


def test_operations_are_counted() -> None:
    x, h, row, weight = make((7, 3, 5, 4), torch.float32)
    with FlopCounterMode(display=False) as counter:
        gathered_sum(h, row, weight, False)
        scattered_outer(h, row, x, 5, False)
        gathered_dots(x, row, weight, False)
    assert counter.get_total_flops() == 3 * 2 * 7 * 3 * 4

from collections.abc import Iterator

import pytest
import torch
from tolerances import assert_close, gradients
from torch import Tensor

from fffexp.kernels.grouped import grouped_mm, grouped_outer

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# rows of each group: all alike, empty at the ends and between, one group, all empty
COUNTS = [(4, 4), (0, 3, 0, 0, 5, 1, 0), (6,), (0, 0, 0)]
SIZES = [(8, 16), (5, 3), (1, 1), (7, 8), (8, 7)]  # summed over, outputs; aligned to 16 bytes, and not

every_shape = pytest.mark.parametrize(
    ("dtype", "counts", "sizes"),
    [(dtype, counts, sizes) for dtype in DTYPES for counts in COUNTS for sizes in SIZES],
    ids=str,
)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN, not whatever was there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(counts: tuple[int, ...], sizes: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, groups, (k, n) = sum(counts), len(counts), sizes
    shapes = {"x": (rows, k), "y": (rows, n), "weight": (groups, k, n)}
    made = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    return {**made, "ends": torch.tensor(counts).cumsum(0)}


def parts(rows: Tensor, ends: Tensor) -> list[Tensor]:
    starts = [0, *ends.tolist()]
    return [rows.double()[starts[g] : starts[g + 1]] for g in range(len(ends))]


def looped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([part @ w for part, w in zip(parts(x, ends), weight.double(), strict=True)])


def looped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return torch.stack([a.T @ b for a, b in zip(parts(x, ends), parts(y, ends), strict=True)])


def compare(output: Tensor, expected: Tensor, wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert_close(output, expected)
    found, truth = gradients(output, wanted), gradients(expected, wanted)
    for name in wanted:
        assert_close(found[name], truth[name])


@every_shape
def test_mm_with_every_gradient(dtype: torch.dtype, counts: tuple[int, ...], sizes: tuple[int, int]) -> None:
    t = make(counts, sizes, dtype)
    output = grouped_mm(t["x"], t["weight"], t["ends"])
    compare(output, looped_mm(t["x"], t["weight"], t["ends"]), {"x": t["x"], "weight": t["weight"]}, dtype)


@every_shape
def test_outer_with_every_gradient(dtype: torch.dtype, counts: tuple[int, ...], sizes: tuple[int, int]) -> None:
    t = make(counts, sizes, dtype)
    output = grouped_outer(t["x"], t["y"], t["ends"])
    compare(output, looped_outer(t["x"], t["y"], t["ends"]), {"x": t["x"], "y": t["y"]}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(8, 16), (5, 3)])
def test_strided_operands(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    t = make((3, 0, 4), sizes, dtype)
    x, weight = (t[name].detach().mT.contiguous().mT for name in ("x", "weight"))
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    assert_close(grouped_mm(x, weight, t["ends"]), looped_mm(t["x"], t["weight"], t["ends"]))
    y = t["y"].detach().mT.contiguous().mT
    assert_close(grouped_outer(x, y, t["ends"]), looped_outer(t["x"], t["y"], t["ends"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(8, 16), (5, 3)])
def test_groups_do_not_touch_each_other(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    # NaN in the rows and the matrix of the middle group stays there
    t = make((2, 3, 4), sizes, dtype)
    clean = grouped_mm(t["x"], t["weight"], t["ends"]), grouped_outer(t["x"], t["y"], t["ends"])
    with torch.no_grad():
        t["x"][2:5] = torch.nan
        t["weight"][1] = torch.nan
    product, outer = grouped_mm(t["x"], t["weight"], t["ends"]), grouped_outer(t["x"], t["y"], t["ends"])
    others = torch.tensor([0, 1, 5, 6, 7, 8])
    assert torch.equal(product[others], clean[0][others])
    assert product[2:5].isnan().all()
    assert torch.equal(outer[[0, 2]], clean[1][[0, 2]])
    assert outer[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_of_a_group_give_its_matrix_no_gradient(dtype: torch.dtype) -> None:
    t = make((3, 0, 4), (5, 3), dtype)
    found = gradients(grouped_mm(t["x"], t["weight"], t["ends"]), {"weight": t["weight"]})["weight"]
    assert (found[1] == 0).all()
    assert (found[[0, 2]] != 0).any(2).any(1).all()


def test_gradcheck() -> None:
    t = make((2, 0, 3), (3, 2), torch.float64)
    for function, names in ((grouped_mm, ("x", "weight")), (grouped_outer, ("x", "y"))):
        arguments = (*(t[name] for name in names), t["ends"])
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registered_as_torch_wants_it(dtype: torch.dtype) -> None:
    t = make((2, 0, 3), (5, 3), dtype)
    torch.library.opcheck(grouped_mm, (t["x"], t["weight"], t["ends"]))
    torch.library.opcheck(grouped_outer, (t["x"], t["y"], t["ends"]))

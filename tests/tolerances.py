"""How close is equal: one answer for every test, the same on every machine."""

import torch
from torch import Tensor

TOLERANCES = {torch.int64: 0.0, torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def assert_close(actual: Tensor | None, expected: Tensor) -> None:
    """Same shape, and nowhere further apart than the tolerance of actual's dtype.

    The tolerance is a share of the largest magnitude that is expected, or of 1 if that is below 1.
    """
    assert actual is not None
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert expected.isfinite().all(), "the expected values are not finite"
    if not actual.numel():
        return
    expected = expected.detach().double()
    bound = TOLERANCES[actual.dtype] * max(1.0, float(expected.abs().max()))
    error = (actual.detach().double() - expected).abs()
    # written so that NaN fails
    assert (error <= bound).all(), f"off by {float(error.max()):.3g}, allowed {bound:.3g}"


def gradients(output: Tensor, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Gradient of a fixed random weighting of the output by each input; zeros where there is none."""
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    found = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """`assert_close` for every entry, naming the one that fails."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        try:
            assert_close(value, expected[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error

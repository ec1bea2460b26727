"""The CUDA kernels against the naive reference: on a GPU where there is one, else through Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

from fffexp.kernels import naive
from fffexp.kernels.naive import Blocks, Trees
from fffexp.kernels.operators import ACTIVATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from fffexp.kernels import triton_kernels  # noqa: E402 # needs it

# the interpreter takes seconds, and its bfloat16 is float32 rounded
HALF = pytest.param(torch.bfloat16, marks=pytest.mark.slow)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
# in, width, out: tiles filled or not, one of everything, more than one tile of each
SIZES = [(32, 16, 16), (5, 3, 7), (1, 1, 1), (18, 20, 35), pytest.param((70, 70, 100), marks=pytest.mark.slow)]


def random(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def make_blocks(count: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Blocks:
    inputs, width, outputs = sizes
    shapes = ((count, width, inputs), (count, width), (count, width, outputs), (count, outputs))
    scales = (inputs**-0.5, 1.0, width**-0.5, 1.0)
    return Blocks(
        *(random(*s, seed=i, dtype=dtype, scale=k) for i, (s, k) in enumerate(zip(shapes, scales, strict=True)))
    )


def exact(blocks: Blocks) -> Blocks:
    return Blocks(*(p.double() for p in blocks))


@pytest.fixture(autouse=True, params=[0, 2**31], ids=["grouped", "by row"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch by either kernel."""
    monkeypatch.setattr(triton_kernels, "ROW_BYTES", request.param)
    if not request.node.get_closest_marker(
        "slow"
    ):  # more than one tile at sizes that the interpreter is soon done with
        for name in ("ROW_SPAN", "TILE_HIDDEN", "TILE_INPUTS", "TILE_OUTPUTS"):
            monkeypatch.setattr(triton_kernels, name, 16)


@pytest.fixture(autouse=True)
def values_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.7) multiplies the bits of bfloat16 matrices as integers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *more: create_dot(self, widened(a), widened(b), *more),
    )


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("depth", [0, 1, 3, 6])
@pytest.mark.parametrize("batch", [0, 1, 3, 21])
@DTYPES
def test_fff_and_its_route(depth: int, batch: int, dtype: torch.dtype) -> None:
    sizes = (45, 6, 37)
    blocks = make_blocks(2**depth, sizes, dtype)
    nodes, bias = (random(2**depth - 1, *n, seed=7, dtype=dtype, scale=0.3) for n in ((sizes[0],), ()))
    x = random(batch, sizes[0], seed=9, dtype=dtype)
    leaf = triton_kernels.route(x, nodes, bias)
    assert leaf.tolist() == [naive.fff_leaf(row, nodes.double(), bias.double(), depth) for row in x.double()]
    truth = naive.fff_hard(x.double(), nodes.double(), bias.double(), depth, exact(blocks), nn.ReLU())
    for function in (triton_kernels.fff, triton_kernels.fff_inference):
        output = function(x, nodes, bias, *blocks, "relu")
        assert output.dtype == dtype
        assert_close(output, truth)


def test_ties_go_right() -> None:
    x, nodes, bias = (torch.ones(shape, device=DEVICE) for shape in ((11, 20), (15, 20), (15,)))
    assert triton_kernels.route(x, 0 * nodes, 0 * bias).tolist() == [15] * 11


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@DTYPES
def test_selected(sizes: tuple[int, int, int], weighted: bool, dtype: torch.dtype) -> None:
    # many rows a block, few, one row, none
    for count, batch in ((3, 20), (40, 5), (5, 1), (3, 0)):
        blocks, k = make_blocks(count, sizes, dtype), 3
        x = random(batch, sizes[0], seed=9, dtype=dtype)
        weights = torch.softmax(random(batch, k, seed=8, dtype=dtype), 1)
        generator = torch.Generator().manual_seed(0)
        block = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(max(1, batch))])[:batch]
        block = block.to(DEVICE)
        output = triton_kernels.selected(x, block, weights if weighted else None, *blocks, "relu")
        assert output.shape == (batch, sizes[2])
        assert output.dtype == dtype
        share = (weights if weighted else torch.ones_like(weights)).double()
        truth = torch.zeros(batch, sizes[2], dtype=torch.float64, device=DEVICE)
        for row in range(batch):
            for choice in range(k):
                value = naive.block(x[row].double(), int(block[row, choice]), exact(blocks), nn.ReLU())
                truth[row] += share[row, choice] * value
        assert_close(output, truth)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("sizes", [(45, 37, 4, 2), (5, 7, 3, 3), (1, 1, 1, 1), (16, 16, 2, 1)], ids=str)
@DTYPES
def test_tree_ff(sizes: tuple[int, int, int, int], batch: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    inputs, outputs, depth, count = sizes
    for name in ("TREE_INPUTS", "TREE_OUTPUTS"):  # more than one span of each
        monkeypatch.setattr(triton_kernels, name, 16)
    shape = count, 2**depth - 1
    trees = Trees(
        random(*shape, inputs, seed=0, dtype=dtype, scale=inputs**-0.5),
        random(*shape, seed=1, dtype=dtype, scale=0.3),
        random(*shape, outputs, seed=2, dtype=dtype, scale=(count * depth) ** -0.5),
        random(outputs, seed=3, dtype=dtype),
    )
    x = random(batch, inputs, seed=9, dtype=dtype)
    for function in (triton_kernels.tree_ff, triton_kernels.tree_ff_inference):
        output = function(x, *trees, "gelu")
        assert output.dtype == dtype
        assert_close(output, naive.tree_ff(x.double(), trees, nn.GELU()))


def test_ties_go_right_in_trees_of_neurons() -> None:
    weight, bias = torch.zeros(2, 7, 20, device=DEVICE), torch.zeros(2, 7, device=DEVICE)
    output = torch.full((2, 7, 3), torch.nan, device=DEVICE)
    output[:, [0, 2, 6]] = 1  # the neurons on the path to the right
    x, zeros = torch.ones(4, 20, device=DEVICE), torch.zeros(3, device=DEVICE)
    assert_close(triton_kernels.tree_ff(x, weight, bias, output, zeros, "relu"), torch.zeros(4, 3, device=DEVICE))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; on a GPU infinity is silent
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    z = torch.cat([torch.linspace(-20, 20, 41), torch.tensor([-1e4, -100.0, 0.0, 1e-6, 100.0, 1e4])]).unsqueeze(1)
    z, one = z.to(DEVICE), torch.ones(1, 1, 1, device=DEVICE)
    block = torch.zeros(len(z), 1, dtype=torch.long, device=DEVICE)
    output = triton_kernels.selected(z, block, None, one, one[0] * 0, one, one[0] * 0, name)
    truth = ACTIVATIONS[name](z.double())
    assert ((output - truth).abs() <= 1e-5 * truth.abs().clamp_min(1)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_layer_runs_on_it_with_every_gradient() -> None:
    from fffexp import FFF, NoisyTopKMoE, TreeFF

    for layer in (FFF(45, 37, 5, 6), NoisyTopKMoE(45, 37, 8, 6, top_k=2), TreeFF(45, 37, 5, 3)):
        layer.cuda().eval()
        x = random(63, 45, seed=9, dtype=torch.float32).requires_grad_()
        outputs, gradients = {}, {}
        for backend in ("triton", "eager"):
            layer.backend = backend
            assert layer.inference_backend() == backend
            outputs[backend] = layer(x)
            wanted = [
                x,
                *(
                    p
                    for n, p in layer.named_parameters()
                    if isinstance(layer, TreeFF) or not n.startswith(("node", "noise"))
                ),
            ]
            gradients[backend] = torch.autograd.grad(outputs[backend].square().sum(), wanted)
        assert_close(outputs["triton"], outputs["eager"])
        for ours, theirs in zip(gradients["triton"], gradients["eager"], strict=True):
            assert_close(ours, theirs)

"""The compiled operators against the naive reference, on every instruction set that this processor has."""

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor, nn

from fffexp import FFF, NoisyTopKMoE, TreeFF
from fffexp.kernels import naive, operators
from fffexp.kernels.build import build
from fffexp.kernels.naive import Blocks, Trees

ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
}
# in, width, out: vectors and tiles filled or not, one of everything, more than a page of weights
SIZES = [(64, 16, 64), (5, 3, 7), (1, 1, 1), (40, 33, 100), (33, 2, 17), (1100, 5, 1030)]
LAYERS = [lambda: FFF(20, 10, 3, 4), lambda: NoisyTopKMoE(20, 10, 4, 5, top_k=2), lambda: TreeFF(20, 10, 4, 3)]
BATCHES = [0, 1, 2, 3, 4, 8, 9, 12, 63, 257]

needs_compiler = pytest.mark.skipif(not operators.available(), reason="no C++ compiler")
pytestmark = needs_compiler


@pytest.fixture(params=["plain", "avx2", "avx512"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each in turn; memory that nobody wrote is NaN."""
    if not torch.ops.fffexp.force_instruction_set(request.param):
        pytest.skip(f"this processor has no {request.param}")
    assert torch.ops.fffexp.instruction_set() == request.param
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)
    torch.ops.fffexp.force_instruction_set("")


def random(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def make_blocks(count: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Blocks:
    inputs, width, outputs = sizes
    shapes = [(count, width, inputs), (count, width), (count, width, outputs), (count, outputs)]
    scales = (inputs**-0.5, 1.0, width**-0.5, 1.0)
    made = [
        random(*shape, seed=i, dtype=dtype, scale=scale)
        for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]
    return Blocks(*made)


def exact(blocks: Blocks) -> Blocks:
    return Blocks(*(p.double() for p in blocks))


def weighted_sum(x: Tensor, block: Tensor, weights: Tensor, blocks: Blocks, activation: nn.Module) -> Tensor:
    rows = [
        torch.stack([w * naive.block(row, int(i), blocks, activation) for i, w in zip(chosen, share, strict=True)])
        for row, chosen, share in zip(x, block, weights, strict=True)
    ]
    return torch.stack(rows).sum(1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_selected(sizes: tuple[int, int, int], dtype: torch.dtype, k: int) -> None:
    for count, batch in ((3, 50), (40, 5), (5, 1), (3, 0)):
        blocks = make_blocks(count, sizes, dtype)
        x = random(batch, sizes[0], seed=9, dtype=dtype)
        weights = torch.softmax(random(batch, k, seed=8, dtype=dtype), 1)
        generator = torch.Generator().manual_seed(0)
        chosen = [torch.randperm(count, generator=generator)[:k] for _ in range(batch)]
        block = torch.stack(chosen) if chosen else torch.empty(0, k, dtype=torch.long)
        output = torch.ops.fffexp.selected(x, block, weights, *blocks, "relu")
        assert output.shape == (batch, sizes[2])
        assert output.dtype == dtype
        if batch:
            truth = weighted_sum(x.double(), block, weights.double(), exact(blocks), nn.ReLU())
            assert_close(output, truth)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    # one block that hands every number of a wide range to the activation
    z = torch.cat([torch.linspace(-20, 20, 2001), torch.tensor([-1e4, -100.0, 0.0, 1e-6, 100.0, 1e4])]).unsqueeze(1)
    one = torch.ones(1, 1, 1)
    block = torch.zeros(len(z), 1, dtype=torch.long)
    output = torch.ops.fffexp.selected(z, block, None, one, one[0] * 0, one, one[0] * 0, name)
    truth = ACTIVATIONS[name](z.double())
    assert ((output - truth).abs() <= 1e-6 * truth.abs().clamp_min(1)).all()
    assert operators.activation_name(ACTIVATIONS[name]) == name


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_not_a_number_is_passed_on(name: str) -> None:
    blocks = make_blocks(2, (40, 6, 40), torch.float32)
    x = random(9, 40, seed=0, dtype=torch.float32)
    x[4, 39] = torch.nan
    block = torch.zeros(9, 1, dtype=torch.long)
    output = torch.ops.fffexp.selected(x, block, None, *blocks, name)
    assert output[4].isnan().all()
    assert output[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fff_and_its_route(depth: int, batch: int, dtype: torch.dtype) -> None:
    sizes = (45, 6, 37)
    blocks = make_blocks(2**depth, sizes, dtype)
    nodes, bias = (random(2**depth - 1, *n, seed=7, dtype=dtype, scale=0.3) for n in ((sizes[0],), ()))
    x = random(batch, sizes[0], seed=9, dtype=dtype)
    leaf = torch.ops.fffexp.route(x, nodes, bias)
    # in float64, for in bfloat16 the reference itself would round its logits
    assert leaf.tolist() == [naive.fff_leaf(row, nodes.double(), bias.double(), depth) for row in x.double()]
    if depth > 1 and batch > 3:
        assert len(leaf.unique()) > 2, "every row goes the same way"
    output = torch.ops.fffexp.fff(x, nodes, bias, *blocks, "relu")
    assert output.dtype == dtype
    truth = naive.fff_hard(x.double(), nodes.double(), bias.double(), depth, exact(blocks), nn.ReLU())
    assert_close(output, truth)


def make_trees(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> Trees:
    inputs, outputs, depth, count = sizes
    shape = count, 2**depth - 1
    return Trees(
        random(*shape, inputs, seed=0, dtype=dtype, scale=inputs**-0.5),
        random(*shape, seed=1, dtype=dtype, scale=0.3),
        random(*shape, outputs, seed=2, dtype=dtype, scale=(count * depth) ** -0.5),
        random(outputs, seed=3, dtype=dtype),
    )


# in, out, depth, trees: vectors filled or not, one of everything, a row of outputs longer than of inputs, many trees
TREES = [(64, 64, 4, 2), (5, 7, 3, 3), (1, 1, 1, 1), (45, 300, 7, 1), (33, 17, 2, 11), (700, 130, 5, 1)]


@functools.cache
def trees_truth(sizes: tuple[int, int, int, int], batch: int, dtype: torch.dtype) -> tuple[Trees, Tensor, Tensor]:
    trees, x = make_trees(sizes, dtype), random(batch, sizes[0], seed=9, dtype=dtype)
    return trees, x, naive.tree_ff(x.double(), trees, nn.GELU())


@pytest.mark.parametrize("sizes", TREES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 7, 8, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tree_ff(sizes: tuple[int, int, int, int], batch: int, dtype: torch.dtype) -> None:
    trees, x, truth = trees_truth(sizes, batch, dtype)
    for function in (torch.ops.fffexp.tree_ff, torch.ops.fffexp.tree_ff_inference):
        output = function(x, *trees, "gelu")
        assert output.dtype == dtype
        assert_close(output, truth)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_gradient_of_tree_ff(name: str) -> None:
    trees = Trees(*(p.requires_grad_() for p in make_trees((20, 13, 4, 3), torch.float32)))
    x = random(12, 20, seed=9, dtype=torch.float32).requires_grad_()
    output, expected = torch.ops.fffexp.tree_ff(x, *trees, name), naive.tree_ff(x, trees, ACTIVATIONS[name])
    assert_close(output, expected)
    wanted = {"x": x, **trees._asdict()}
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


def test_ties_go_right_in_trees_of_neurons() -> None:
    output_weight = torch.full((2, 7, 13), torch.nan)
    output_weight[:, [0, 2, 6]] = 1  # the neurons on the path to the right
    trees = Trees(torch.zeros(2, 7, 20), torch.zeros(2, 7), output_weight, torch.zeros(13))
    assert_close(torch.ops.fffexp.tree_ff(torch.ones(9, 20), *trees, "relu"), torch.zeros(9, 13))


def test_a_row_that_is_no_number_passes_it_on_alone() -> None:
    trees, x = make_trees((20, 13, 4, 2), torch.float32), random(9, 20, seed=0, dtype=torch.float32)
    x[4, 19] = torch.nan
    output = torch.ops.fffexp.tree_ff(x, *trees, "gelu")
    assert output[4].isnan().all()
    assert output[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("shape", [(7, 3, 5, 4), (1, 1, 1, 1), (0, 2, 3, 5), (5, 0, 3, 4), (30, 9, 100, 137)], ids=str)
def test_products_with_chosen_rows(shape: tuple[int, ...]) -> None:
    samples, k, rows, columns = shape
    x, h, weight = (
        random(*size, seed=seed, dtype=torch.float32)
        for seed, size in enumerate([(samples, columns), (samples, k), (rows, columns)])
    )
    row = torch.randint(rows, (samples, k), generator=torch.Generator().manual_seed(0))
    gathered, chosen = weight.double()[row], nn.functional.one_hot(row, rows).double()
    assert_close(torch.ops.fffexp.native_dots(x, row, weight), torch.einsum("bi,bki->bk", x.double(), gathered))
    assert_close(torch.ops.fffexp.native_sum(h, row, weight), torch.einsum("bk,bki->bi", h.double(), gathered))
    outer = torch.einsum("bk,bkn,bi->ni", h.double(), chosen, x.double())
    assert_close(torch.ops.fffexp.native_outer(h, row, x, rows), outer)


def test_batches_of_several_chunks() -> None:
    blocks = make_blocks(4, (16, 3, 20), torch.float32)
    nodes, bias = random(3, 16, seed=7, dtype=torch.float32), random(3, seed=8, dtype=torch.float32)
    x = random(1500, 16, seed=9, dtype=torch.float32)
    whole = torch.ops.fffexp.fff(x, nodes, bias, *blocks, "relu")
    parts = [torch.ops.fffexp.fff(part, nodes, bias, *blocks, "relu") for part in x.split(100)]
    assert_close(whole, torch.cat(parts))


def test_ties_go_right() -> None:
    leaf = torch.ops.fffexp.route(torch.ones(11, 20), torch.zeros(15, 20), torch.zeros(15))
    assert leaf.tolist() == [15] * 11


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_give_the_same(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        blocks = make_blocks(16, (200, 16, 200), torch.float32)
        x = random(900, 200, seed=9, dtype=torch.float32)
        block = torch.arange(1800).view(900, 2) % 16
        output = torch.ops.fffexp.selected(x, block, None, *blocks, "relu")
        trees, h = make_trees((200, 200, 6, 3), torch.float32), random(900, 2, seed=8, dtype=torch.float32)
        calls = (
            lambda: torch.ops.fffexp.tree_ff(x, *trees, "relu"),
            lambda: torch.ops.fffexp.native_dots(x, block, x),
            lambda: torch.ops.fffexp.native_sum(h, block, x),
            lambda: torch.ops.fffexp.native_outer(h, block, x, 16),
        )
        outputs = [call() for call in calls]
        torch.set_num_threads(1)
        assert_close(output, torch.ops.fffexp.selected(x, block, None, *blocks, "relu"))
        for output, call in zip(outputs, calls, strict=True):
            assert_close(output, call())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("weighted", [True, False])
def test_every_gradient_of_selected(name: str, weighted: bool) -> None:
    blocks = Blocks(*(p.requires_grad_() for p in make_blocks(4, (5, 3, 7), torch.float32)))
    x = random(9, 5, seed=9, dtype=torch.float32).requires_grad_()
    weights = random(9, 2, seed=8, dtype=torch.float32).requires_grad_()
    block = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(9)])
    wanted = {"x": x, **blocks._asdict(), **({"weights": weights} if weighted else {})}
    output = torch.ops.fffexp.selected(x, block, weights if weighted else None, *blocks, name)
    expected = weighted_sum(x, block, weights if weighted else torch.ones(9, 2), blocks, ACTIVATIONS[name])
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


def test_every_gradient_of_fff() -> None:
    layer = FFF(6, 5, 3, 4).eval()
    x = random(30, 6, seed=9, dtype=torch.float32).requires_grad_()
    wanted = {"x": x, **dict(layer.named_parameters())}
    assert layer.inference_backend() == "native"
    output = layer(x)
    blocks = layer.leaves.tensors()
    expected = naive.fff_hard(x, layer.node_weight, layer.node_bias, 3, blocks, torch.relu)
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("make", LAYERS)
class TestLayers:
    def test_backends_agree(self, make: type) -> None:
        layer = make().eval()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)
        for batch in (0, 1, 3, 63, 257):
            x = random(batch, 20, seed=batch, dtype=torch.float32)
            outputs = {}
            for backend in ("native", "eager"):
                layer.backend = backend
                assert layer.inference_backend() == backend
                outputs[backend] = layer(x)
            assert_close(outputs["native"], outputs["eager"])

    def test_compiled_and_exported(self, make: type, instruction_set: str) -> None:
        if instruction_set != "plain":
            pytest.skip("says nothing about the instruction set")
        layer = make().eval()
        x = random(7, 20, seed=0, dtype=torch.float32)
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), layer(x))
        rows = torch.export.Dim("rows", min=2, max=100)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
        assert "fffexp" in str(exported.graph)
        more = random(33, 20, seed=1, dtype=torch.float32)
        assert_close(exported.module()(more), layer(more))

    def test_autocast(self, make: type) -> None:
        layer = make().eval()
        x = random(7, 20, seed=0, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
        assert output.dtype == torch.bfloat16
        assert_close(output, layer(x))

    def test_what_the_layer_is_now_counts(self, make: type) -> None:
        layer = make().eval()
        x = random(9, 20, seed=0, dtype=torch.float32)
        hidden = next(m for m in layer.modules() if isinstance(m, nn.Sequential))
        hidden[0] = nn.GELU()
        output = layer(x)
        layer.backend = "eager"
        assert_close(output, layer(x))
        hidden[0], layer.backend = nn.Softplus(), "auto"
        assert layer.inference_backend() == "eager"
        # dropout that stays on in evaluation
        hidden[0], hidden[1] = nn.ReLU(), nn.Dropout(0.5).train()
        assert layer.inference_backend() == "eager"

    def test_inputs_of_another_type_are_taken_as_the_weights(self, make: type) -> None:
        layer = make().eval()
        x = random(9, 20, seed=0, dtype=torch.bfloat16)
        assert_close(layer(x), layer(x.float()))

    def test_a_backend_that_does_not_serve_is_named(self, make: type) -> None:
        layer = make().eval().double()
        assert layer.inference_backend() == "eager"
        layer.backend = "native"
        with pytest.raises(ValueError, match=r"'native'.*float64"):
            layer(random(3, 20, seed=0, dtype=torch.float64))
        layer.backend = "fast"
        with pytest.raises(ValueError, match="'auto', 'native', 'triton' or 'eager'"):
            layer(random(3, 20, seed=0, dtype=torch.float64))


def test_registered_as_torch_wants_it() -> None:
    blocks = Blocks(*(p.requires_grad_() for p in make_blocks(4, (5, 3, 7), torch.float32)))
    x = random(9, 5, seed=9, dtype=torch.float32).requires_grad_()
    nodes, bias = random(3, 5, seed=7, dtype=torch.float32), random(3, seed=8, dtype=torch.float32)
    block, weights = torch.arange(9).view(9, 1) % 4, random(9, 1, seed=8, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.fffexp.route.default, (x, nodes, bias))
    torch.library.opcheck(torch.ops.fffexp.fff.default, (x, nodes, bias, *blocks, "relu"))
    torch.library.opcheck(torch.ops.fffexp.selected.default, (x, block, weights, *blocks, "gelu"))
    trees = [p.requires_grad_() for p in make_trees((5, 7, 3, 2), torch.float32)]
    torch.library.opcheck(torch.ops.fffexp.tree_ff.default, (x, *trees, "gelu"))


def test_tensors_that_do_not_fit_are_refused() -> None:
    blocks = make_blocks(4, (5, 3, 7), torch.float32)
    x, nodes, bias = torch.ones(2, 5), torch.ones(3, 5), torch.ones(3)
    first = torch.zeros(2, 1, dtype=torch.long)
    selected, fff = torch.ops.fffexp.selected, torch.ops.fffexp.fff
    tree_ff, trees = torch.ops.fffexp.tree_ff, make_trees((5, 7, 3, 2), torch.float32)
    for wrong in (torch.full((2, 1), 4), torch.full((2, 1), -1)):
        with pytest.raises(IndexError, match="of 4"):
            selected(x, wrong, None, *blocks, "relu")
        with pytest.raises(IndexError, match="of 3"):
            torch.ops.fffexp.native_dots(x, wrong, nodes)
    for call in (
        lambda: selected(torch.ones(2, 6), first, None, *blocks, "relu"),
        lambda: selected(x.double(), first, None, *blocks, "relu"),
        lambda: selected(x.bfloat16(), first, None, *blocks, "relu"),
        lambda: selected(x, first[:1], None, *blocks, "relu"),
        lambda: selected(x, first, torch.ones(2, 2), *blocks, "relu"),
        lambda: selected(x, first, None, *blocks, "swish"),
        lambda: selected(x, first, None, blocks[0], blocks[1], blocks[2][:, :2], blocks[3], "relu"),
        lambda: fff(x, nodes[:2], bias[:2], *blocks, "relu"),
        lambda: fff(x, nodes[:1], bias[:1], *blocks, "relu"),
        lambda: fff(x, nodes[:, :4], bias, *blocks, "relu"),
        lambda: tree_ff(x, *trees._replace(node_weight=trees.node_weight[:, :6]), "relu"),
        lambda: tree_ff(x, *(p[:, :6] for p in trees[:3]), trees.output_bias, "relu"),
        lambda: tree_ff(x, *(p[:, :0] for p in trees[:3]), trees.output_bias, "relu"),
        lambda: tree_ff(torch.ones(2, 6), *trees, "relu"),
        lambda: tree_ff(x, *trees[:3], trees.output_bias[:3], "relu"),
        lambda: tree_ff(x.double(), *trees, "relu"),
        lambda: tree_ff(x, *trees, "swish"),
        lambda: torch.ops.fffexp.native_dots(x, first[:1], nodes),
        lambda: torch.ops.fffexp.native_sum(x[:, :3], first, nodes),
        lambda: torch.ops.fffexp.native_outer(x[:, :3], first, x, 3),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 # each in its own words
            call()


@pytest.mark.parametrize("instruction_set", ["plain"], indirect=True)
class TestBuilding:
    CODE = "import torch, fffexp; f = fffexp.FFF(8, 8, 2, 4).eval(); f(torch.ones(1, 8)); print(f.inference_backend())"

    def run(self, code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)

    def test_without_a_compiler_eager_serves_and_says_so_once(self, tmp_path: Path) -> None:
        bare = tmp_path / "bin"
        bare.mkdir()
        done = self.run(f"{self.CODE}; f(torch.ones(1, 8))", tmp_path, PATH=str(bare), CXX="")
        assert done.stdout.split() == ["eager"]
        assert done.stderr.count("no C++ compiler") == 1

    def test_a_compiler_that_fails_is_quoted(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: out of coffee'\nexit 1\n")
        broken.chmod(0o755)
        done = self.run(self.CODE, tmp_path, CXX=str(broken))
        assert done.stdout.split() == ["eager"]
        assert "out of coffee" in done.stderr
        assert not list(tmp_path.rglob("*.so"))

    @pytest.mark.slow
    @pytest.mark.parametrize("real", [False, True])
    def test_two_processes_on_an_empty_cache_build_once(self, tmp_path: Path, real: bool) -> None:
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        if not real:  # all that it makes is a copy of the library that is built already
            copying = tmp_path / "copying"
            copying.write_text(
                f'#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && cp "{build()}" "$2"; shift; done\n:\n'
            )
            copying.chmod(0o755)
            env["CXX"] = str(copying)
        command = [sys.executable, "-c", self.CODE]
        both = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
            for _ in range(2)
        ]
        ends = [process.communicate() for process in both]
        assert [out.split() for out, _ in ends] == [["native"], ["native"]]
        assert sum(err.count("compiling") for _, err in ends) == 1
        assert len(list((tmp_path / "fffexp").glob("*.so"))) == 1
        assert "compiling" not in self.run(self.CODE, tmp_path, CXX=env.get("CXX", "")).stderr

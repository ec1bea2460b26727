"""Trees whose nodes are the neurons: both ways to train against a walk down each tree, and what they can learn."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, IN, OUT, Calls, Case, copy_dense, inputs, product_forms, randomized
from layers import test_contract
from tolerances import assert_all_close, assert_close, gradients
from torch import Tensor, nn

from fffexp.kernels import naive, operators
from fffexp.layers import FF, TreeFF

both_ways = pytest.mark.parametrize("trained", ["all", "paths"])
DEEP = 9  # deeper than the levels that one product decides (kernels/eager.py)


def make(depth: int = 3, num_trees: int = 2, trained: str = "all", dtype: Any = torch.float64, **more: Any) -> TreeFF:
    layer: TreeFF = randomized(TreeFF(IN, OUT, depth, num_trees, **more)).to(dtype)
    layer.trained = trained  # type: ignore[assignment] # one of the literals
    return layer


def differentiable(layer: TreeFF, x: Tensor) -> dict[str, Tensor]:
    return {"x": x.requires_grad_(), **dict(layer.named_parameters())}


@both_ways
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("depth", "num_trees"), [(1, 1), (1, 3), (2, 1), (3, 2), (5, 3), (DEEP, 1)])
def test_equals_naive_with_every_gradient(depth: int, num_trees: int, training: bool, trained: str) -> None:
    layer, x = make(depth, num_trees, trained).train(training), inputs(21, dtype=torch.float64)
    wanted = differentiable(layer, x)
    expected = naive.tree_ff(x, layer.trees, nn.GELU())
    output = layer(x)
    assert_close(output, expected)
    found = gradients(output, wanted)
    assert_all_close(found, gradients(expected, wanted))
    assert found["node_weight"].any()
    assert_close(layer.forward_reference(x), expected)
    layer.vectorized = True
    assert_close(layer(x), expected)


@both_ways
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3, 63])
def test_batches_and_dtypes(batch: int, dtype: torch.dtype, training: bool, trained: str) -> None:
    layer = make(4, 3, trained, dtype).train(training)
    x = inputs(batch, dtype=dtype)
    wanted = differentiable(layer, x)
    output = layer(x)
    assert output.dtype == dtype
    if dtype == torch.bfloat16:  # which may decide otherwise than float64 where it is close: the paths that it took
        return
    expected = layer.forward_reference(x)
    assert_close(output, expected)
    found = gradients(output, wanted)
    assert_all_close(found, gradients(expected, wanted) if batch else {name: 0 * p for name, p in wanted.items()})


@both_ways
def test_in_bfloat16_along_the_paths_taken(trained: str) -> None:
    layer, x = make(4, 3, trained, torch.bfloat16), inputs(50, dtype=torch.bfloat16)
    output = layer(x)
    path_BT = layer.routing.path_BT
    expected = []
    for row, chosen in zip(x.double(), path_BT.tolist(), strict=True):
        total = layer.output_bias.double()
        for tree, path in enumerate(chosen):
            for level in range(4):
                node = (path >> (3 - level)) + 2**level - 1
                logit = row @ layer.node_weight[tree, node].double() + layer.node_bias[tree, node].double()
                total = total + F.gelu(logit) * layer.output_weight[tree, node].double()
        expected.append(total)
    assert_close(output, torch.stack(expected))


@both_ways
@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", nn.PReLU, "softplus"])
def test_activations_with_every_gradient(activation: Any, trained: str) -> None:
    layer, x = make(3, 2, trained, activation=activation), inputs(21, dtype=torch.float64)
    wanted = differentiable(layer, x)
    output, expected = layer(x), naive.tree_ff(x, layer.trees, layer.hidden[0])
    assert_close(output, expected)
    assert_all_close(gradients(output, wanted), gradients(expected, wanted))


@both_ways
def test_zero_weights_go_right(trained: str) -> None:
    layer, x = make(4, 2, trained), inputs(5, dtype=torch.float64)
    nn.init.zeros_(layer.node_weight)
    nn.init.zeros_(layer.node_bias)
    for training in (True, False):
        layer.train(training)
        assert layer.route(x).tolist() == [[7, 15]] * 5
        assert_close(layer(x), layer.forward_reference(x))
    layer.train()(x)
    assert layer.routing.path_BT.tolist() == [[7, 7]] * 5


@both_ways
def test_one_level_is_a_dense_layer(trained: str) -> None:
    layer, x = make(1, 5, trained), inputs(7, dtype=torch.float64)
    ff = FF(IN, OUT, 5, "gelu").double()
    copy_dense(ff, layer.node_weight[:, 0], layer.node_bias[:, 0], layer.output_weight[:, 0], layer.output_bias)
    output = layer(x)
    assert_close(output, ff(x))
    ours, theirs = (gradients(y, dict(each.named_parameters())) for y, each in ((output, layer), (ff(x), ff)))
    assert_close(ours["node_weight"][:, 0], theirs["network.0.weight"])
    assert_close(ours["output_weight"][:, 0], theirs["network.3.weight"].T)


@both_ways
def test_neurons_off_the_paths_get_no_gradient(trained: str) -> None:
    layer, x = make(5, 2, trained), inputs(3, dtype=torch.float64)
    found = gradients(layer(x), dict(layer.named_parameters()))
    on_path = torch.zeros(2, 31, dtype=torch.bool)
    for tree, path in ((tree, path) for row in layer.routing.path_BT.tolist() for tree, path in enumerate(row)):
        for level in range(5):
            on_path[tree, (path >> (4 - level)) + 2**level - 1] = True
    assert 0 < on_path.sum() < on_path.numel()
    for name in ("node_weight", "output_weight"):
        assert torch.equal(found[name].abs().sum(2) > 0, on_path)
    assert torch.equal(found["node_bias"] != 0, on_path)


@both_ways
def test_routing_holds_the_paths(trained: str) -> None:
    layer, x = make(4, 3, trained), inputs(9, dtype=torch.float64)
    layer(x)
    first = torch.arange(3) * 8
    assert torch.equal(layer.routing.path_BT + first, layer.route(x))
    assert layer.num_experts == 24
    for row, logits in zip(x, layer.routing.logits_BTD, strict=True):
        for tree in range(3):
            walked = naive.tree_path(row, layer.node_weight[tree], layer.node_bias[tree])
            assert_close(logits[tree], torch.stack([logit for _, logit in walked]))


def test_dropout_drops_neurons_of_the_path() -> None:
    layer = make(3, 1, dropout=0.5, dtype=torch.float32)
    nn.init.zeros_(layer.output_bias)
    x = inputs(400)
    paths = {trained: layer_of(layer, trained, x) for trained in ("all", "paths")}
    assert_close(paths["all"], paths["paths"])  # of the same noise
    assert ((paths["all"] == 0).all(1).float().mean() - 1 / 8).abs() < 0.06, "all three are dropped in an eighth"


def layer_of(layer: TreeFF, trained: Any, x: Tensor) -> Tensor:
    layer.trained = trained
    torch.manual_seed(0)
    output: Tensor = layer(x)
    return output


@pytest.mark.parametrize(
    "promise",
    [
        test_contract.test_leading_dimensions,
        test_contract.test_non_contiguous_input,
        test_contract.test_empty_batch,
    ],
    ids=lambda promise: promise.__name__,
)
@pytest.mark.parametrize("training", [True, False])
def test_what_every_layer_promises_along_paths(promise: Any, training: bool, along_paths: Case) -> None:
    promise(along_paths, training, *([(2, 0)] if promise is test_contract.test_empty_batch else []))


@pytest.mark.parametrize(
    "promise",
    [
        test_contract.test_autocast,
        test_contract.test_routing_accumulates_until_it_is_cleared,
        test_contract.test_the_auxiliary_loss_is_the_sum_over_the_passes,
        test_contract.test_passes_whose_backward_has_run_make_room,
        test_contract.test_memorises_one_batch,
    ],
    ids=lambda promise: promise.__name__,
)
def test_what_every_layer_promises_of_training_along_paths(promise: Any, along_paths: Case) -> None:
    promise(along_paths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes_along_paths(dtype: torch.dtype, along_paths: Case) -> None:
    test_contract.test_dtypes(along_paths, True, dtype)


def test_compiled_training_pass_along_paths(along_paths: Case) -> None:
    test_contract.test_compiled_training_pass(along_paths, "soft")


@pytest.fixture
def along_paths(monkeypatch: pytest.MonkeyPatch) -> Case:
    """The case of the contract, trained by gathering the neurons on the paths."""
    monkeypatch.setattr("fffexp.layers.tree_ff.COMPILED_SHARE", 0)
    monkeypatch.setattr("fffexp.layers.tree_ff.PLAIN_SHARE", 0)
    (case,) = (case for case in CASES if case.layer is TreeFF)
    assert not case.make().trains_all_experts
    return case


def test_deep_trees_are_trained_along_paths() -> None:
    few = TreeFF(4, 4, 4, 3)
    assert few.trains_all_experts
    assert few.training_flops_per_sample == 2 * 45 * (2 * 8 + 4)
    deep = TreeFF(4, 4, 12)
    assert not deep.trains_all_experts
    assert (deep.training_width, deep.inference_width) == (4095, 12)
    assert deep.training_flops_per_sample == 2 * 12 * (4 + 2 * 8 + 4), "the walk, then forward and backward"
    assert deep.training_backend(inputs(3)) == ("native" if operators.available() else "eager")
    deep.vectorized = True  # shapes that do not depend on the data
    assert deep.trains_all_experts
    deep.vectorized = False
    calls, x = Calls(), inputs(40)[:, :4]
    with calls:
        deep(x).sum().backward()
    assert calls.largest == deep.node_weight.numel(), "nothing is as large as the weights' gradients"


def test_the_backend_is_the_one_that_runs() -> None:
    x, available = inputs(9), operators.available()
    for activation, backend in itertools.product(("gelu", "mish"), ("auto", "eager")):  # the kernel does not know mish
        layer = make(3, 2, "paths", torch.float32, activation=activation).eval()
        layer.backend = backend
        compiled = available and backend == "auto"
        assert layer.inference_backend() == ("native" if compiled else "eager")
        assert product_forms(layer, x) == (set() if compiled and activation == "gelu" else {compiled})
        assert_close(layer(x), layer.forward_reference(x))
        assert layer.train().training_backend(x) == ("native" if available else "eager")
        assert product_forms(layer, x) == {available}


@both_ways
def test_the_other_way_to_train_shares_the_weights(trained: str) -> None:
    layer, x = make(3, 2, trained, torch.float32), inputs(9)
    (name,), (other,) = zip(*layer.training_forms().items(), strict=True)
    assert {name, trained} == {"all", "paths"}
    assert isinstance(other, TreeFF)
    assert other.trained == name
    assert layer.trained == trained
    with torch.no_grad():
        layer.output_bias.add_(1)
    assert_close(other(x), layer(x))


def test_the_first_weights_are_those_of_the_authors_code() -> None:
    torch.manual_seed(0)
    layer = TreeFF(100, 50, 4, 3)
    for parameter, bound in ((layer.node_weight, 0.1), (layer.node_bias, 0.1), (layer.output_weight, 12**-0.5)):
        assert bound * 0.9 < parameter.abs().max() <= bound
    assert not layer.output_bias.any()
    assert isinstance(layer.hidden[0], nn.GELU)


def test_benchmarks_get_a_tree_for_each_neuron_of_a_leaf() -> None:
    assert TreeFF.sized(8, 8, 12, 1).sizes() == TreeFF(8, 8, 12).sizes()
    layer = TreeFF.sized(8, 8, 5, 4)
    assert (layer.depth, layer.num_trees, layer.training_width) == (5, 4, 4 * 2**5 - 4)
    assert TreeFF.sized(8, 8, 0, 4).training_width == 4
    assert TreeFF.sized(8, 8, 5, 4, num_trees=2).num_trees == 2


def regions(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Eight regions that three planes through the origin part, and a class for each; no class is connected."""
    q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    region = ((x @ q[:, :3] > 0) * torch.tensor([4, 2, 1])).sum(1)
    return x, torch.tensor([0, 3, 1, 2, 2, 0, 3, 1])[region]


def accuracy(layer: TreeFF, steps: int = 400, lr: float = 0.05) -> float:
    torch.manual_seed(0)
    layer.reset_parameters()
    x, y = regions(4096, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        loss = F.cross_entropy(layer.train()(x[rows]), y[rows])
        layer.routing = None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, y = regions(2000, 2)
    return float((layer.eval()(x).argmax(1) == y).float().mean())


def test_finds_planted_regions() -> None:
    assert accuracy(TreeFF(8, 4, depth=1, activation="identity")) < 0.5, "one linear neuron, as a control"
    assert accuracy(TreeFF(8, 4, depth=6)) > 0.9

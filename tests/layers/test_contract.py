"""What every layer promises (fffexp/layers/base.py), walked over all of them."""

import copy
import inspect
import io
import itertools
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DRAWN, IN, OUT, Case, inputs, loss_of, randomized, records, routing_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fffexp.layers
from fffexp import auxiliary_loss
from fffexp.layers import FFF, FeedforwardLayer, Forest, Shared, SparseFF, TreeFF

every_case = pytest.mark.parametrize("case", CASES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def run(layer: Any, x: Tensor) -> Tensor:
    """One pass with the same noise every time, nothing left behind."""
    torch.manual_seed(7)
    output = layer(x)
    assert type(output) is Tensor
    layer.routing = None
    return output


def parameter_gradients(layer: FeedforwardLayer) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert found.keys() == dict(layer.named_parameters()).keys(), "some parameters got no gradient"
    return found


def test_every_layer_has_a_case() -> None:
    exported = {getattr(fffexp.layers, name) for name in fffexp.layers.__all__}
    concrete = {
        c for c in exported if inspect.isclass(c) and issubclass(c, FeedforwardLayer) and not inspect.isabstract(c)
    }
    assert concrete
    assert {case.layer for case in CASES} == concrete == set(DRAWN)


@every_case
@both_modes
def test_leading_dimensions(case: Case, training: bool) -> None:
    layer = case.make().train(training)
    x = inputs(12)
    flat = run(layer, x)
    assert flat.shape == (12, OUT)
    assert_close(run(layer, x.view(2, 3, 2, IN)), flat.view(2, 3, 2, OUT))
    assert_close(run(layer, x[0]), run(layer, x[:1])[0])


@every_case
@both_modes
def test_non_contiguous_input(case: Case, training: bool) -> None:
    layer = case.make().train(training)
    x = inputs(4, 3)
    strided = x.transpose(0, 1)
    assert not strided.is_contiguous()
    assert_close(run(layer, strided), run(layer, strided.contiguous()))


@every_case
@both_modes
def test_inputs_of_another_width_are_refused(case: Case, training: bool) -> None:
    layer = case.make().train(training)
    for x in (torch.randn(5, 2 * IN), torch.randn(2, 3, 2 * IN)):
        for call in (layer, layer.route):
            with pytest.raises(ValueError, match=f"x has {2 * IN} features; this {case.layer.__name__} takes {IN}"):
                call(x)
    with pytest.raises(ValueError, match="x has no features"):
        layer(torch.tensor(1.0))


@every_case
@pytest.mark.parametrize(("training", "backend"), [(True, "auto"), (False, "auto"), (False, "eager")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_cast_to_the_weights(case: Case, training: bool, backend: str, dtype: torch.dtype) -> None:
    layer = case.make().to(dtype).train(training)
    layer.backend = backend
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = inputs(5, dtype=kind)
        assert torch.equal(run(layer, x), run(layer, x.to(dtype)))
    for kind in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"x is {kind}; {case.layer.__name__} takes floating-point numbers"):
            layer(torch.ones(5, IN, dtype=kind))


@every_case
@both_modes
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_empty_batch(case: Case, training: bool, shape: tuple[int, ...]) -> None:
    layer = case.make().train(training)
    output = layer(inputs(*shape).requires_grad_())
    assert output.shape == (*shape, OUT)
    if training:
        loss = loss_of(layer, output)
        assert loss.isfinite()
        loss.backward()
        assert all(g.isfinite().all() for g in parameter_gradients(layer).values())


@every_case
@both_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(case: Case, training: bool, dtype: torch.dtype) -> None:
    layer = case.make().to(dtype).train(training)
    x = inputs(5, dtype=dtype)
    output = run(layer, x)
    assert output.dtype == dtype
    if not training:  # noise is drawn differently in each dtype
        assert_close(output, copy.deepcopy(layer).double()(x.double()))
    loss_of(layer.train(), layer(x)).backward()
    assert all(t.dtype == torch.promote_types(dtype, torch.float32) for t in decided(layer))
    assert all(g.dtype == dtype and g.isfinite().all() for g in parameter_gradients(layer).values())


def decided(layer: FeedforwardLayer) -> list[Tensor]:
    return [t for t in routing_tensors(layer).values() if t.is_floating_point()]


@every_case
def test_autocast(case: Case) -> None:
    layer = case.make()
    torch.manual_seed(7)
    exact = layer(inputs(9))
    routing = routing_tensors_as_float(layer)
    layer.routing = None
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(7)
        output = layer(inputs(9))
    assert output.dtype == torch.bfloat16
    assert_close(output, exact)
    assert all(t.dtype == torch.float32 for t in decided(layer))
    if case.layer is not SparseFF:  # which decides by its activations, in the lower precision
        assert_all_close(routing_tensors_as_float(layer), routing)
    loss_of(layer, output).backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in parameter_gradients(layer).values())


@pytest.mark.parametrize(
    ("case", "decisions"),
    [
        # FFF stands for all where there is little time
        pytest.param(case, decisions, marks=() if case.layer is FFF else pytest.mark.slow)
        for case in CASES
        for decisions in ("soft", "hard")
        if case.make().has_soft_mode or decisions == "soft"
    ],
    ids=str,
)
def test_compiled_training_pass(case: Case, decisions: str) -> None:
    eager = case.make()
    eager.routing_mode = decisions
    compiled = copy.deepcopy(eager)
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    outputs = {}
    for name, layer, call in (("eager", eager, eager), ("compiled", compiled, forward)):
        torch.manual_seed(7)
        outputs[name] = call(inputs(9))
        loss_of(layer, outputs[name]).backward()
    assert_close(outputs["compiled"], outputs["eager"])
    assert_all_close(routing_tensors_as_float(compiled), routing_tensors_as_float(eager))
    assert_all_close(parameter_gradients(compiled), parameter_gradients(eager))


def routing_tensors_as_float(layer: FeedforwardLayer) -> dict[str, Tensor]:
    return {name: t.float() for name, t in routing_tensors(layer).items()}


@every_case
def test_state_dict_round_trip(case: Case) -> None:
    layer = case.make(seed=0)
    for name in layer.annealed_buffers:
        layer.anneal(name, 3)
    layer(inputs(5))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = case.make(seed=1)
    restored.load_state_dict(torch.load(file, weights_only=True))
    layer.routing = None
    for training, decisions in itertools.product((True, False), ("soft", "hard")):
        for each in (layer, restored):
            each.train(training).routing_mode = decisions
        assert torch.equal(run(restored, inputs(5)), run(layer, inputs(5)))


@every_case
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_leave_routing_behind(case: Case, duplicate: Any) -> None:
    layer = case.make()
    layer(inputs(5))
    twin = duplicate(layer)
    assert twin.routing is None
    assert len(layer.routings) == records(layer)
    twin(inputs(5))
    layer(inputs(5))
    assert torch.equal(run(twin.eval(), inputs(5)), run(layer.eval(), inputs(5)))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_train_the_chosen_leaf_as_well(duplicate: Any) -> None:
    layer = FFF(IN, OUT, 2, 3, trained="chosen_leaf")
    twin = duplicate(layer)
    assert twin.aux_losses == twin.metrics == {}
    assert twin.sparse_gradients
    assert torch.equal(twin(inputs(5)), layer(inputs(5)))


@every_case
def test_routing_accumulates_until_it_is_cleared(case: Case) -> None:
    layer = case.make()
    assert layer.routing is None
    assert layer.routings == []
    layer.eval()(inputs(5))
    assert layer.routing is None, "written in evaluation"
    layer.train()
    with torch.no_grad():
        layer(inputs(5))
    assert layer.routing is None, "written without gradients"
    outputs = [layer(inputs(rows)) for rows in (5, 3)]
    if not records(layer):
        assert layer.routing is None
        assert layer.routings == []
        return
    assert all(t.shape[:1] in ((), (3,), (layer.num_experts,)) for t in routing_tensors(layer).values())
    assert len(layer.routings) == 2
    assert layer.routings[-1] == layer.routing
    assert outputs[0].requires_grad
    with pytest.raises(ValueError, match="only be cleared"):
        layer.routing = layer.routing
    layer.routing = None
    assert layer.routing is None
    assert layer.routings == []


@every_case
def test_the_auxiliary_loss_is_the_sum_over_the_passes(case: Case) -> None:
    layer = case.make()
    if not layer.aux_losses:
        return
    weights = dict.fromkeys(layer.aux_losses, 0.5)
    single = 0.0
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer(inputs(9, seed=seed))
        single += auxiliary_loss(layer, weights).item()
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer(inputs(9, seed=seed))
    total = auxiliary_loss(layer, weights)
    assert total.item() == pytest.approx(single, rel=1e-5)
    total.backward()
    with pytest.raises(RuntimeError, match="no layer made a training pass"):
        auxiliary_loss(layer, weights)


@every_case
def test_passes_whose_backward_has_run_make_room(case: Case) -> None:
    layer = case.make()
    for _ in range(3):  # a loop that reads no routing
        layer(inputs(9)).sum().backward()
        assert len(layer.routings) == records(layer)
    for _ in range(40):  # nor runs backward
        layer(inputs(9))
    assert len(layer.routings) <= 20


@every_case
def test_a_pass_keeps_the_temperature_it_had(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):  # in float32 on the compiled kernel, where there is one
        layer = case.make().to(dtype)
        output = layer(inputs(9, dtype=dtype))
        before = {name: loss(layer.routing).item() for name, loss in layer.aux_losses.items()}
        for name in layer.annealed_buffers:
            layer.anneal(name, 300.0)
        assert {name: loss(layer.routing).item() for name, loss in layer.aux_losses.items()} == before
        loss_of(layer, output).backward()
        assert all(gradient.isfinite().all() for gradient in parameter_gradients(layer).values())


@every_case
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_within_backward_is_not_recorded(case: Case, reentrant: bool) -> None:
    layer, x = case.make(), inputs(9).requires_grad_()
    output = checkpoint(layer, x, use_reentrant=reentrant)
    assert len(layer.routings) == (0 if reentrant else records(layer))
    output.sum().backward()
    assert len(layer.routings) == (0 if reentrant else records(layer))


@every_case
def test_weights_can_be_made_later(case: Case) -> None:
    torch.manual_seed(3)
    make: Any = case.layer  # the base class does not have all arguments
    made = make(IN, OUT, **case.options)
    later = make(IN, OUT, **case.options, activation="prelu", device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in later.parameters())
    with torch.device("meta"):
        later = case.layer(IN, OUT, **case.options)
    later.to_empty(device="cpu")
    for tensor in later.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 7)
    for layer in (later, made):
        torch.manual_seed(3)
        layer.reset_parameters()
    assert_all_close(later.state_dict(), made.state_dict())


@every_case
def test_the_first_weights_are_those_of_reset_parameters(case: Case) -> None:
    torch.manual_seed(3)
    layer = case.layer(IN, OUT, **case.options)
    first = copy.deepcopy(layer.state_dict())
    for name in layer.annealed_buffers:
        layer.anneal(name, 5.0)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert_all_close(layer.state_dict(), first)


@every_case
@pytest.mark.parametrize(
    "activation",
    ["gelu", "GELU", "torch.nn.GELU", nn.GELU, nn.GELU(), lambda: nn.GELU()],
    ids=["name", "upper", "path", "class", "instance", "factory"],
)
def test_activations(case: Case, activation: Any) -> None:
    layer = case.make(activation=activation)
    found = [m for m in layer.modules() if isinstance(m, nn.GELU)]
    assert found
    assert activation not in found, "an instance is shared"
    assert_close(layer.eval()(inputs(5)), layer.forward_reference(inputs(5)))


@every_case
@pytest.mark.parametrize("activation", ["relo", "torch.nn.Relo", 7, None, nn.Linear, F.relu], ids=range(6))
def test_no_activation(case: Case, activation: Any) -> None:
    with pytest.raises(ValueError, match=r"activation is .*; it must be a class or an instance of torch.nn"):
        case.make(activation=activation)


@every_case
def test_the_reference_knows_activations_with_parameters(case: Case) -> None:
    layer = case.make(activation=nn.PReLU, dropout=0.5)
    reference = layer.train().forward_reference(inputs(5))
    assert_close(layer.eval()(inputs(5)), reference)


@every_case
def test_printed_with_its_sizes(case: Case) -> None:
    printed = str(case.make())
    width, size, used, evaluated, parameters, flops = case.sizes
    assert f"training width {width} (size {size}), inference width {used} (size {evaluated})" in printed
    assert f"{parameters:,} parameters, {flops:,} FLOPs per sample" in printed
    assert f"in_features={IN}, out_features={OUT}" in printed


@every_case
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_flops_are_counted(case: Case, backend: str) -> None:
    layer, x = case.make().eval(), inputs(9)
    layer.backend = backend
    with FlopCounterMode(display=False) as counter:
        layer(x)
    if case.layer in (FFF, Forest, Shared, TreeFF) and (backend == "eager" or layer.inference_backend() == "eager"):
        # all nodes of the upper levels, in one product
        assert counter.get_total_flops() >= 9 * layer.flops_per_sample
    else:
        assert counter.get_total_flops() == 9 * layer.flops_per_sample
    layer.train()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() > 9 * 2 * layer.inference_width * (IN + OUT)


@every_case
def test_sizes(case: Case) -> None:
    names = ("training_width", "training_size", "inference_width", "inference_size", "parameters", "flops_per_sample")
    assert case.make().sizes() == dict(zip(names, case.sizes, strict=True))


@every_case
def test_memory_is_checked_for_about_the_weights_it_takes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, parameters, _ = case.sizes
    memory = SimpleNamespace(total=1.1 * 4 * parameters)  # bytes, of float32
    monkeypatch.setattr("fffexp.layers.base.physical_memory", lambda: memory.total)
    case.make()
    memory.total = 0.9 * 4 * parameters
    with pytest.raises(ValueError, match="weights would take"):
        case.make()


@every_case
def test_memorises_one_batch(case: Case) -> None:
    torch.manual_seed(0)
    layer = case.layer(IN, OUT, **case.options | {name: 24 for name in case.options if "width" in name})
    x, labels = inputs(32), torch.randint(OUT, (32,), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(160):
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), labels)
        layer.routing = None
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@every_case
def test_route(case: Case) -> None:
    layer = case.make().eval()
    blocks = layer.route(inputs(3, 40))
    assert blocks.shape[0] == 120
    assert blocks.dtype == torch.long
    assert set(blocks.flatten().tolist()) <= set(range(layer.num_experts))
    assert len(blocks.unique()) > min(layer.num_experts - 1, 1), "every row takes the same blocks"


@every_case
def test_inference_is_that_of_the_reference(case: Case) -> None:
    layer = case.make().eval()
    x = inputs(9)
    for decisions in ("soft", "hard") if layer.has_soft_mode else ("hard",):
        layer.routing_mode = decisions
        assert_close(layer(x), layer.forward_reference(x, decisions))
    assert layer.forward_reference(x).dtype == torch.float64


@every_case
def test_weights_read(case: Case) -> None:
    layer = case.make().eval()
    one, many = layer.weights_read(inputs(1)), layer.weights_read(inputs(2000))
    # enough rows reach every leaf or expert; a MoE's noise weights play no part in inference
    unused = layer.noise_weight.numel() if hasattr(layer, "noise_weight") else 0
    assert many == layer.parameter_count - unused
    assert one <= many
    if layer.inference_width < layer.training_width:
        assert one < many


@every_case
def test_mistakes_are_named(case: Case) -> None:
    sizes = {"in_features": IN, "out_features": OUT, **case.options}
    for name in sizes.keys() - {"layer"}:
        may_be_0 = name in ("depth", "master_width") and case.layer is not TreeFF
        low = -1 if may_be_0 else 0
        with pytest.raises(ValueError, match=f"{name} is {low}; it must be at least {low + 1}"):
            case.layer(**sizes | {name: low})
        for wrong in (2.5, "4", True, None):
            with pytest.raises(ValueError, match=f"{name} is {wrong!r}; it must be a whole number"):
                case.layer(**sizes | {name: wrong})
    for dropout in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="dropout is"):
            case.make(dropout=dropout)


@every_case
def test_routing_mode(case: Case) -> None:
    layer = case.make()
    assert layer.routing_mode == "auto"
    for mode in ("soft", "hard", "auto"):
        layer.routing_mode = mode
        layer.train().eval()
        assert layer.routing_mode == mode
    layer.routing_mode = "soft"
    for wrong in ("sharp", "Hard", None, ["soft"]):
        with pytest.raises(ValueError, match=r"routing_mode is .*; it must be 'auto', 'soft' or 'hard'"):
            layer.routing_mode = wrong
    assert layer.routing_mode == copy.deepcopy(layer).routing_mode == "soft"


@every_case
def test_dropout_acts_in_training_only(case: Case) -> None:
    plain, dropping = case.make(), case.make(dropout=0.5)
    x = inputs(20)
    for decisions in ("soft", "hard"):
        plain.routing_mode = dropping.routing_mode = decisions
        assert not torch.allclose(run(dropping.train(), x), run(plain.train(), x))
        assert torch.equal(run(dropping.eval(), x), run(plain.eval(), x))


@pytest.mark.parametrize("layer_type", DRAWN)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_properties(layer_type: type[FeedforwardLayer], data: st.DataObject) -> None:
    options, count = DRAWN[layer_type]
    drawn = data.draw(options)
    in_features, out_features = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    seed = data.draw(st.integers(0, 2**16))

    layer = randomized(layer_type(in_features, out_features, **drawn), seed).double()
    assert layer.parameter_count == count(in_features, out_features, **drawn)
    assert layer.inference_width <= layer.training_width <= layer.training_size
    assert layer.inference_width <= layer.inference_size <= layer.training_size

    generator = torch.Generator().manual_seed(seed)
    scale = data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
    x = scale * torch.randn(*shape, in_features, generator=generator, dtype=torch.float64)
    outputs = {}
    for decisions, training in itertools.product(("soft", "hard"), (True, False)):
        layer.routing_mode = decisions
        outputs[decisions, training] = output = run(layer.train(training), x)
        assert output.shape == (*shape, out_features)
        assert output.isfinite().all()
    if layer.has_soft_mode:
        # random logits in float64 have no ties
        assert_close(outputs["hard", True], outputs["hard", False])
        assert_close(outputs["soft", True], outputs["soft", False])
        layer.routing_mode = "auto"
        assert torch.equal(run(layer.train(), x), outputs["soft", True])
        assert torch.equal(run(layer.eval(), x), outputs["hard", False])
    assert torch.equal(outputs["hard", False], run(layer.eval(), x)), "evaluation is not repeatable"


class Gated(FeedforwardLayer):
    """Another package's layer: it names a buffer of a part of its own, and trains sparsely."""

    annealed_buffers = frozenset({"gate.temperature"})
    sparse_gradients = True

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.gate = nn.Linear(4, 3)
        self.gate.register_buffer("temperature", torch.tensor(1.0))

    training_width = flops_per_sample = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


def test_a_buffer_of_a_part_is_annealed_by_its_path() -> None:
    layer = Gated()
    layer.anneal("gate.temperature", 5.0)
    assert layer.gate.get_buffer("temperature") == 5
    with pytest.raises(AttributeError, match="Gated has no buffer perature"):
        layer.anneal("perature", 1.0)


def test_a_layer_with_sparse_gradients_trains_not_all() -> None:
    assert not Gated().trains_all_experts

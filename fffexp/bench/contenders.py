"""Layers of equal training width to be timed against each other, checked against the truth before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from fffexp.errors import UserError
from fffexp.layers import FF, FFF, FeedforwardLayer, NoisyTopKMoE

LAYERS = ("FF", "NoisyTopKMoE", "FFF")
PEER = "fastfeedforward"
# Largest error against the reference, as a share of its largest output, or of 1 where that is smaller.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}
# Rows that are computed one by one to check an output.
CHECKED_ROWS = 16


@dataclass(frozen=True)
class Point:
    """What is compared: all layers have 2^depth * leaf_width hidden neurons."""

    in_features: int
    out_features: int
    depth: int
    leaf_width: int
    top_k: int
    dtype: torch.dtype
    device: str
    backend: str


@dataclass
class Contender:
    """A way to compute a layer; `truth` is what it should give for a few rows."""

    name: str
    backend: str
    layer: FeedforwardLayer
    module: Callable[[Tensor], Tensor]
    truth: Callable[[Tensor], Tensor]

    def check(self, x: Tensor) -> float:
        """Largest error over a few rows of x.

        Raises:
            RuntimeError: it is not within the tolerance: nothing of this layer may be timed.
        """
        # rows of the whole batch, which may run other code than a few rows would
        rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS)).long().unique().to(x.device)
        found, truth = self.module(x)[rows].double(), self.truth(x[rows])
        error = float((found - truth).abs().max())
        allowed = TOLERANCES[x.dtype] * max(1.0, float(truth.abs().max()))
        if not error <= allowed:
            raise RuntimeError(f"{self.name} ({self.backend}) is off by {error:.3g}, allowed {allowed:.3g}: not timed")
        return error


def make(names: Sequence[str], point: Point, peers: bool) -> list[Contender]:
    """The layers by these names, and the peers; all share the weights of their blocks to save memory.

    Raises:
        UserError: an unknown layer, weights that do not fit in memory, or a peer that is not installed.
    """
    torch.manual_seed(0)
    p, contenders = point, []
    blocks, width = 2**p.depth, 2**p.depth * p.leaf_width
    try:
        with torch.device(p.device):
            fff = FFF(p.in_features, p.out_features, p.depth, p.leaf_width).to(p.dtype)
            for name in names:
                if name == "FFF":
                    layer: FeedforwardLayer = fff
                elif name == "FF":
                    layer = _ff(p, width, fff)
                elif name == "NoisyTopKMoE":
                    layer = _moe(p, blocks, fff)
                else:
                    raise UserError(f"--layers: {name!r} is not one of {', '.join(LAYERS)}")
                if name != "FF":
                    layer.backend = p.backend
                contenders.append(Contender(name, layer.inference_backend(), layer, layer, layer.forward_reference))
    except ValueError as error:
        raise UserError(f"depth {p.depth}: {error}") from error
    if peers and p.depth > 0:  # at depth 0 the reference package crashes
        contenders.append(_peer(p, fff))
    return contenders


def _ff(p: Point, width: int, fff: FFF) -> FF:
    with torch.device("meta"):
        layer = FF(p.in_features, p.out_features, width)
    layer = layer.to_empty(device=p.device).to(p.dtype)
    first, _, _, second = layer.network
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    first.weight = nn.Parameter(fff.leaves.hidden_weight.detach().flatten(0, 1))
    first.bias = nn.Parameter(fff.leaves.hidden_bias.detach().flatten())
    second.reset_parameters()
    return layer


def _moe(p: Point, experts: int, fff: FFF) -> NoisyTopKMoE:
    with torch.device("meta"):
        layer = NoisyTopKMoE(p.in_features, p.out_features, experts, p.leaf_width, top_k=min(p.top_k, experts))
    layer.experts = fff.leaves
    # at its zero initialisation a gate sends every sample to the same expert
    scale = p.in_features**-0.5
    shape = (experts, p.in_features)
    layer.gate_weight = nn.Parameter(scale * torch.randn(shape, device=p.device, dtype=p.dtype))
    layer.noise_weight = nn.Parameter(torch.zeros(shape, device=p.device, dtype=p.dtype))
    return layer


def fast_ffs(layer: FF) -> dict[str, Callable[[Tensor], Tensor]]:
    """Other ways to compute an FF, which may be faster than `linear`."""
    weight1, b1, weight2, b2 = (parameter.detach() for parameter in layer.network.parameters())
    w1, w2, activation = weight1.T.contiguous(), weight2.T.contiguous(), layer.network[1]

    def addmm(x: Tensor) -> Tensor:
        return torch.addmm(b2, activation(torch.addmm(b1, x, w1)), w2)

    return {"addmm": addmm}


def _peer(p: Point, fff: FFF) -> Contender:
    try:
        import fastfeedforward
    except ImportError as error:
        raise UserError("--peers needs the package fastfeedforward: pip install 'fffexp[peers]'") from error
    if p.dtype != torch.float32:
        raise UserError(f"--peers: fastfeedforward computes in float32 alone, not in {p.dtype}")
    peer = fastfeedforward.FFF(p.in_features, p.leaf_width, p.out_features, p.depth, activation=nn.ReLU())
    peer = peer.to(p.device)
    leaves = fff.leaves
    with torch.no_grad():
        peer.node_weights.copy_(fff.node_weight)
        peer.node_biases.copy_(fff.node_bias.unsqueeze(1))
        peer.w1s.copy_(leaves.hidden_weight.mT)
        peer.b1s.copy_(leaves.hidden_bias)
        peer.w2s.copy_(leaves.output_weight)
        peer.b2s.copy_(leaves.output_bias)

    def truth(x: Tensor) -> Tensor:
        # it leaves the output bias out at inference
        return fff.forward_reference(x) - leaves.output_bias[fff.route(x)[:, 0]].double()

    try:
        release = version(PEER)
    except PackageNotFoundError:
        release = "?"
    return Contender(PEER, release, fff, peer, truth)


def inputs(point: Point, batch_size: int, batches: int) -> list[Tensor]:
    """Random inputs: `batches` different ones."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, point.in_features)
    return [torch.randn(shape, generator=generator).to(point.device, point.dtype) for _ in range(batches)]

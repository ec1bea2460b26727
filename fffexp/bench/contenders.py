"""Layers of equal training width to be timed against each other, checked against the truth before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from fffexp import layers
from fffexp.errors import UserError, one_line
from fffexp.layers import FeedforwardLayer

PEER = "fastfeedforward"
# Largest error against the reference, as a share of its largest output, or of 1 where that is smaller.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}
# Rows that are computed one by one to check an output.
CHECKED_ROWS = 16


@dataclass(frozen=True)
class Point:
    """What is compared: layers of 2^depth * leaf_width hidden neurons; `layer_args` has more arguments by layer."""

    in_features: int
    out_features: int
    depth: int
    leaf_width: int
    top_k: int
    dtype: torch.dtype
    device: str
    backend: str
    layer_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def inputs(self, batch_size: int, batches: int) -> list[Tensor]:
        """Random inputs: `batches` different ones."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch_size, self.in_features)
        return [torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(batches)]


@dataclass
class Contender:
    """A way to compute a layer; `truth` is what it should give for a few rows."""

    name: str
    backend: str
    layer: FeedforwardLayer
    module: nn.Module
    truth: Callable[[Tensor], Tensor]

    @property
    def baseline(self) -> str:
        """What others are compared with it as, or an empty string."""
        return "peer" if self.is_peer else vars(type(self.layer)).get("baseline", "")

    @property
    def is_peer(self) -> bool:
        """Whether it is another package's form of the layer."""
        return self.module is not self.layer

    def check(self, x: Tensor) -> float:
        """Largest error over a few rows of x.

        Raises:
            UserError: it is not within the tolerance: nothing of this layer may be timed.
        """
        # rows of the whole batch, which may run other code than a few rows would
        rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS)).long().unique().to(x.device)
        return self.compare(self.module(x)[rows], self.truth(x[rows]))

    def compare(self, output: Tensor, truth: Tensor, factor: float = 1.0, what: str = "output") -> float:
        """Largest error of an output.

        Raises:
            UserError: it is more than `factor` times the tolerance of the output's type.
        """
        if not truth.numel():
            return 0.0
        error = float((output.detach().double() - truth.detach().double()).abs().max())
        allowed = factor * TOLERANCES[output.dtype] * max(1.0, float(truth.detach().abs().max()))
        if not error <= allowed:
            raise UserError(
                f"{self.name} ({self.backend}): its {what} is off by {error:.3g}, allowed {allowed:.3g}: not timed"
            )
        return error


def public_layers() -> dict[str, type[FeedforwardLayer]]:
    """The package's own layers by name, dense first."""
    found = {name: getattr(layers, name) for name in layers.__all__}
    made = {name: kind for name, kind in found.items() if _is_layer(kind) and kind is not FeedforwardLayer}
    return dict(sorted(made.items(), key=lambda pair: pair[1].baseline != "ff"))


def _is_layer(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, FeedforwardLayer)


def layer_class(name: str) -> type[FeedforwardLayer]:
    """The layer of a public name or a class path.

    Raises:
        UserError: there is no such class, or it is no feedforward layer.
    """
    known = public_layers()
    if name in known:
        return known[name]
    home, _, attribute = name.rpartition(".")
    if not home:
        raise UserError(f"--layers: {name!r} is not one of {', '.join(known)}, nor a class path such as own.MyLayer")
    try:
        found = getattr(import_module(home), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--layers: {name} cannot be imported ({one_line(str(error))})") from error
    if not _is_layer(found):
        raise UserError(f"--layers: {name} is no class derived from fffexp.FeedforwardLayer")
    return found


def make(names: Sequence[str], point: Point, peers: bool = False) -> list[Contender]:
    """The layers by these names, and the peers; they share the weights of their leaves and experts where they can.

    Raises:
        UserError: an unknown layer, sizes that it refuses, or a peer that is not installed.
    """
    torch.manual_seed(0)
    p = point
    contenders: list[Contender] = []
    for name in names:
        kind, arguments = layer_class(name), dict(p.layer_args.get(name, {}))
        try:
            with torch.device(p.device):
                layer = kind.sized(p.in_features, p.out_features, p.depth, p.leaf_width, p.top_k, **arguments)
        except (ValueError, TypeError) as error:
            raise UserError(f"--layers {name}, depth {p.depth}: {one_line(str(error))}") from error
        layer = layer.to(p.dtype)
        for other in contenders:
            layer.share_experts(other.layer)
        for parameter in layer.parameters():
            if not parameter.any():  # a gate that begins at zero sends every sample to the same expert
                nn.init.normal_(parameter, std=p.in_features**-0.5)
        layer.backend = p.backend
        try:
            backend = layer.inference_backend()
        except ValueError as error:
            raise UserError(f"--backend {p.backend}: {name}: {error}") from error
        contenders.append(Contender(name, backend, layer, layer, layer.forward_reference))
    if peers and p.depth > 0:  # at depth 0 the reference package crashes
        contenders += [_peer(p, c.layer) for c in contenders if hasattr(c.layer, "node_weight")][:1]
    return contenders


def _peer(p: Point, tree: Any) -> Contender:
    """The reference package's tree with the weights of ours."""
    try:
        from fastfeedforward import FFF as Peer
    except ImportError as error:
        raise UserError("--peers needs the package fastfeedforward: pip install 'fffexp[peers]'") from error
    if p.dtype != torch.float32:
        raise UserError(f"--peers: fastfeedforward computes in float32 alone, not in {p.dtype}")
    peer = Peer(p.in_features, p.leaf_width, p.out_features, p.depth, activation=nn.ReLU()).to(p.device)
    leaves = tree.leaves
    with torch.no_grad():
        peer.node_weights.copy_(tree.node_weight)
        peer.node_biases.copy_(tree.node_bias.unsqueeze(1))
        peer.w1s.copy_(leaves.hidden_weight.mT)
        peer.b1s.copy_(leaves.hidden_bias)
        peer.w2s.copy_(leaves.output_weight)
        peer.b2s.copy_(leaves.output_bias)

    def truth(x: Tensor) -> Tensor:
        # it leaves the output bias out at inference
        return tree.forward_reference(x) - leaves.output_bias[tree.route(x)[:, 0]].double()

    try:
        release = version(PEER)
    except PackageNotFoundError:
        release = "?"
    return Contender(PEER, release, tree, peer, truth)

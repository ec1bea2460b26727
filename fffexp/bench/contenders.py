"""Layers of equal training width to be timed against each other, checked against the truth before."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from fffexp import layers
from fffexp.bench.setting import Setting
from fffexp.errors import UserError, one_line, refuse
from fffexp.layers import FeedforwardLayer

# Largest error against the reference, as a share of its largest output, or of 1 where that is smaller.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}
CHECKED_ROWS = 16  # that are computed one by one to check an output


@dataclass
class Contender:
    """A way to compute a layer; `truth` is what it should give for a few rows."""

    name: str
    backend: str
    layer: FeedforwardLayer
    module: nn.Module
    truth: Callable[[Tensor], Tensor]

    @property
    def is_peer(self) -> bool:
        """Whether it is another package's form of the layer."""
        return self.module is not self.layer

    @property
    def baseline(self) -> str:
        """What others are compared with it as, or an empty string; not inherited."""
        return "peer" if self.is_peer else vars(type(self.layer)).get("baseline", "")

    def check(self, x: Tensor) -> float:
        """Largest error over a few rows of x; raises as `compare`."""
        # rows of the whole batch, which may run other code than a few rows would
        rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS)).long().unique().to(x.device)
        return self.compare(self.module(x)[rows], self.truth(x[rows]))

    def compare(self, output: Tensor, truth: Tensor, factor: float = 1.0, what: str = "output") -> float:
        """Largest error of an output; UserError if it is more than `factor` times the tolerance of its type."""
        if not truth.numel():
            return 0.0
        output, truth, tolerance = output.detach().double(), truth.detach().double(), TOLERANCES[output.dtype]
        error, allowed = float((output - truth).abs().max()), factor * tolerance * max(1.0, float(truth.abs().max()))
        where = f"{self.name} ({self.backend}): its {what}"
        refuse((not error <= allowed, f"{where} is off by {error:.3g}, allowed {allowed:.3g}: not timed"))
        return error


def public_layers() -> dict[str, type[FeedforwardLayer]]:
    """The package's own layers by name, dense first."""
    found = ((name, kind) for name in layers.__all__ if _is_layer(kind := getattr(layers, name)))
    return dict(sorted(found, key=lambda pair: pair[1].baseline != "ff"))


def _is_layer(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, FeedforwardLayer) and found is not FeedforwardLayer


def layer_class(name: str) -> type[FeedforwardLayer]:
    """The layer of a public name or a class path; UserError if there is none."""
    known = public_layers()
    unknown = f"--layers: {name!r} is not one of {', '.join(known)}, nor a class path such as own.MyLayer"
    refuse(("." not in name and name not in known, unknown))
    try:
        found = known.get(name) or resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--layers: {name} cannot be imported ({one_line(str(error))})") from error
    refuse((not _is_layer(found), f"--layers: {name} is no class derived from fffexp.FeedforwardLayer"))
    return found


def make(setting: Setting, depth: int, peers: bool = False) -> list[Contender]:
    """The layers of a depth, for inference, and their peers; leaves and experts share weights where they can.

    UserError for an unknown layer, sizes that it refuses, or a peer that is not installed.
    """
    torch.manual_seed(0)
    contenders: list[Contender] = []
    sizes = setting.in_features, setting.out_features, depth, setting.leaf_width, setting.top_k
    for name in setting.layers:
        kind = layer_class(name)
        try:
            with torch.device(setting.device):
                layer = kind.sized(*sizes, **setting.layer_args.get(name, {}))
        except (ValueError, TypeError) as error:
            raise UserError(f"--layers {name}, depth {depth}: {one_line(str(error))}") from error
        layer = layer.to(getattr(torch, setting.dtype)).eval()
        for other in contenders:
            layer.share_experts(other.layer)
        for parameter in layer.parameters():
            if not parameter.any():  # a gate that begins at zero sends every sample to the same expert
                nn.init.normal_(parameter, std=setting.in_features**-0.5)
        layer.backend = setting.backend
        try:
            backend = layer.inference_backend()
        except ValueError as error:
            raise UserError(f"--backend {setting.backend}: {name}: {error}") from error
        contenders.append(Contender(name, backend, layer, layer, layer.forward_reference))
    if peers and depth > 0:  # at depth 0 the reference package crashes
        contenders += [_peer(setting, c.layer) for c in contenders if c.layer.peer][:1]
    return contenders


def _peer(setting: Setting, tree: Any) -> Contender:
    package, leaves = tree.peer.partition(":")[0], tree.leaves
    try:
        kind, release = resolve_name(tree.peer), version(package)
    except ImportError as error:
        raise UserError(f"--peers needs the package {package}: pip install 'fffexp[peers]'") from error
    refuse((setting.dtype != "float32", f"--peers: {package} computes in float32 alone, not in {setting.dtype}"))
    sizes = tree.in_features, tree.leaf_width, tree.out_features, tree.depth
    peer = kind(*sizes, activation=nn.ReLU()).to(setting.device).eval()
    copies = {"node_weights": tree.node_weight, "node_biases": tree.node_bias.unsqueeze(1), "b1s": leaves.hidden_bias}
    copies |= {"w1s": leaves.hidden_weight.mT, "w2s": leaves.output_weight, "b2s": leaves.output_bias}
    peer.load_state_dict(copies | {"depth": peer.depth})

    def truth(x: Tensor) -> Tensor:  # it leaves the output bias out at inference
        return tree.forward_reference(x) - leaves.output_bias[tree.route(x)[:, 0]].double()

    return Contender(package, release, tree, peer, truth)


def inputs(setting: Setting, batch_size: int, batches: int) -> list[Tensor]:
    """Random inputs: `batches` different ones, (batch_size, in_features)."""
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(batch_size, setting.in_features, generator=generator) for _ in range(batches))
    return [x.to(setting.device, getattr(torch, setting.dtype)) for x in drawn]

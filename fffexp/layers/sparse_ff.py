"""The dense layer that skips, at inference, the neurons that are zero. Suffixes: B samples, H neurons, U in use."""

from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.kernels import operators
from fffexp.kernels.naive import Blocks
from fffexp.kernels.skipping import skip_zeros, used
from fffexp.layers.base import BlockLayer, whole
from fffexp.layers.blocks import Activation, BlockMLP, Device, native
from fffexp.routing import activations


class SparseFF(BlockLayer):
    """Dense feedforward layer whose inference reads the output weights of the neurons that are not zero alone.

    Training is dense, with an L1 loss on the activations, which makes most of them 0 ("Sparser, Faster, Lighter
    Transformer Language Models", arXiv 2603.23198, section 2.2, without a gate; TwELL is its format for GPUs).
    Inference computes the hidden layer densely, and then the product with the output weights: compiled, on a CPU, with
    the rows that each sample needs; in plain torch with those that some sample of the batch needs, which pays for one
    or a few; with all where that is most of them. It takes more than half of the time of a dense layer, for the hidden
    layer stays. The result is that of a dense layer.

    How many neurons are 0 depends on the data: sizes and FLOPs are those of a dense layer, an upper bound.
    `weights_read` counts what inputs need, and the metric `active_neurons` the neurons per sample in training.

    Args:
        width: hidden neurons.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise. One that
            is never 0 skips nothing.
        dropout: probability of dropping a hidden activation in training.
    """

    shape = ("width",)
    aux_losses = MappingProxyType({"activation_l1": activations.activation_l1})
    default_aux_weights = MappingProxyType({"activation_l1": 0.003})
    metrics = MappingProxyType({"active_neurons": activations.active_neurons})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.width = whole("width", width)
        factory: Any = {"device": device, "dtype": dtype}
        self._count((width, width), (0, 0), 1, "width", dropout, **factory)
        self.network = BlockMLP((1, width, in_features, out_features), activation, dropout, **factory)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (tensor[0] for tensor in self.network.tensors())
        rows = self._rows(x, w1.dtype)
        activation, dropout = self.network.hidden
        h_BH = activation(F.linear(rows, w1, b1))
        if self.training or self.vectorized:
            output = F.linear(dropout(h_BH), w2.T, b2)
        else:
            output = skip_zeros(h_BH.to(w2.dtype), w2, b2, self.inference_backend() == "native").to(h_BH.dtype)
        if self.training:
            self._record(activations.ActivationRouting.of(h_BH), output)
        return output.reshape(*x.shape[:-1], self.out_features)

    def inference_backend(self) -> str:
        weight = self.network.output_weight
        served = weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16) and operators.available()
        return "native" if native(self.backend, weight, served) else "eager"

    def training_backend(self, x: Tensor) -> str:
        return "linear"

    def dense_blocks(self) -> tuple[Blocks, nn.Module]:
        return self.network.tensors(), self.network.hidden[0]

    def weights_read(self, x: Tensor) -> int:
        w1, b1, _, b2 = (tensor[0] for tensor in self.network.tensors())
        used_U = used(self.network.hidden[0](F.linear(self._rows(x, w1.dtype), w1, b1)))
        return w1.numel() + b1.numel() + len(used_U) * self.out_features + b2.numel()

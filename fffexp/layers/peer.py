"""Parameter-efficient expert retrieval: a pool of single neurons, found by product keys.

Shape suffixes: B samples, H heads, Q width of a query, K neurons of a sample.
"""

import copy
import math
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.kernels import gathered, naive
from fffexp.layers.base import BlockLayer, recomputing, whole
from fffexp.layers.blocks import Activation, Device, make_activation, native, reset_parts
from fffexp.layers.random import Dropout
from fffexp.routing import retrieval


class PEER(BlockLayer):
    """PEER, "Mixture of A Million Experts" (He, arXiv 2407.04153, section 2).

    Each head makes a query of the sample and takes the `top_k` experts whose keys have the largest product with it. A
    key is a pair of sub-keys, so that these are found among the best sub-keys of the two sets, without a product with
    every key; all heads share keys and experts. An expert is one neuron, and the layer is the sum over the heads of
    softmax(products of the top_k) * activation(u . x) * v, without biases (algorithm 1). Only the rows in use are read
    and multiplied, in training too, though the gradients are dense.

    Queries are batch-normalized, as in the paper: in evaluation by running means, and so in training where a batch has
    one row. Those buffers are of each seed: seeds train one after another. The paper names no width of a query and no
    initialization; here u and v are drawn as by torch.nn.Linear of in_features and of `heads` inputs, for the weights
    of a head sum to 1.

    Args:
        num_experts: neurons in the pool: a square, or twice one (whose second set has twice as many sub-keys).
        top_k: neurons that a head takes.
        heads: queries of a sample.
        query_width: of one head; even.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
    """

    shape = ("num_experts", "top_k", "heads", "query_width")
    metrics = MappingProxyType({"unevenness": retrieval.unevenness})
    momentum, epsilon = 0.1, 1e-5  # of torch.nn.BatchNorm1d

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        top_k: int = 16,
        heads: int = 8,
        query_width: int = 64,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        experts, self.top_k, self.heads = (
            whole("num_experts", num_experts),
            whole("top_k", top_k),
            whole("heads", heads),
        )
        self.query_width = whole("query_width", query_width)
        self.sub_keys = _grid(experts)
        if query_width % 2:
            raise ValueError(f"query_width is {query_width}; it must be even, for a half for each set of sub-keys")
        if top_k > experts:
            raise ValueError(f"top_k is {top_k} but there are {experts} experts: lower top_k or raise num_experts")
        queries, keys, active = heads * query_width, sum(self.sub_keys), heads * top_k
        scalars = experts * (in_features + out_features) + queries * (in_features + 2) + keys * query_width // 2
        factory: Any = {"device": device, "dtype": dtype}
        widths, deciding = (experts, min(active, experts)), (queries + keys, queries + keys)
        self._count(widths, deciding, experts, "num_experts", dropout, scalars, **factory)
        # a key is shorter than a row of the input, and each head compares it
        compared = heads * keys * query_width // 2
        self.flops_per_sample = 2 * (queries * in_features + compared + active * (in_features + out_features))
        self._trained = active, 2 * queries + math.ceil(3 * compared / in_features)
        self.vectorizable = False
        self.query_weight = nn.Parameter(torch.empty(queries, in_features, **factory))
        self.norm_weight = nn.Parameter(torch.empty(queries, **factory))
        self.norm_bias = nn.Parameter(torch.empty(queries, **factory))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(queries, **factory))
        self.first_keys, self.second_keys = (
            nn.Parameter(torch.empty(keys, query_width // 2, **factory)) for keys in self.sub_keys
        )
        self.hidden_weight = nn.Parameter(torch.empty(experts, in_features, **factory))
        self.output_weight = nn.Parameter(torch.empty(experts, out_features, **factory))
        self.hidden = nn.Sequential(make_activation(activation), Dropout(dropout)).to(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        half = self.query_width // 2
        for parameter, fan_in in (
            (self.query_weight, self.in_features),
            (self.first_keys, half),
            (self.second_keys, half),
            (self.hidden_weight, self.in_features),
            (self.output_weight, self.heads),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        for ones, zeros in ((self.norm_weight, self.norm_bias), (self.running_var, self.running_mean)):
            nn.init.ones_(ones)
            nn.init.zeros_(zeros)
        reset_parts(self.hidden)

    @classmethod
    def sized(
        cls, in_features: int, out_features: int, depth: int, leaf_width: int, top_k: int = 1, **more: Any
    ) -> Self:  # as many neurons, of which a sample takes top_k leaves' worth, by 8 heads where they share evenly
        active = min(top_k, 2**depth) * leaf_width
        heads = math.gcd(8, active)
        more = {"num_experts": 2**depth * leaf_width, "top_k": active // heads, "heads": heads} | more
        return cls(in_features, out_features, **more)

    def forward(self, x: Tensor) -> Tensor:
        rows = self._rows(x, self.hidden_weight.dtype)
        expert_BK, gates_BK = self._retrieve(rows, self.training and len(rows) > 1)
        backend = self.training_backend(rows) if self.training else self.inference_backend()
        w1, w2, compiled = self.hidden_weight, self.output_weight, backend == "native"
        h_BK = self.hidden(gathered.gathered_dots(rows, expert_BK, w1, compiled))
        # in whatever type the activation returns under autocast
        output = gathered.gathered_sum((h_BK * gates_BK).to(w2.dtype), expert_BK, w2, compiled)
        if torch.is_autocast_enabled(device := rows.device.type):  # as other layers' outputs
            output = output.to(torch.get_autocast_dtype(device))
        if self.training:
            scores = gates_BK.new_zeros(self.num_experts).index_add(0, expert_BK.flatten(), gates_BK.flatten())
            self._record(retrieval.RetrievalRouting(scores), output)
        return output.reshape(*x.shape[:-1], self.out_features)

    def _retrieve(self, rows: Tensor, by_batch: bool) -> tuple[Tensor, Tensor]:
        # (B, K) neurons and their weights, decided in at least float32
        with torch.autocast(rows.device.type, enabled=False):
            kind = torch.promote_types(rows.dtype, torch.float32)
            query_BQ = self._normalized(F.linear(rows.to(kind), self.query_weight.to(kind)), by_batch)
            first, second = query_BQ.unflatten(1, (self.heads, -1)).chunk(2, dim=2)
            values, expert = retrieval.product_top_k(
                first @ self.first_keys.to(kind).T, second @ self.second_keys.to(kind).T, self.top_k
            )
            return expert.flatten(1), torch.softmax(values, dim=2).flatten(1)

    def _normalized(self, query_BQ: Tensor, by_batch: bool) -> Tensor:
        kind = query_BQ.dtype
        if by_batch:
            var, mean = torch.var_mean(query_BQ, 0, correction=0)
            if not recomputing():
                with torch.no_grad():
                    unbiased = var * (len(query_BQ) / (len(query_BQ) - 1))
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                    self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        else:
            mean, var = self.running_mean.to(kind), self.running_var.to(kind)
        scale = self.norm_weight.to(kind) * torch.rsqrt(var + self.epsilon)
        return (query_BQ - mean) * scale + self.norm_bias.to(kind)

    def inference_backend(self) -> str:
        served = gathered.compiles(self.hidden_weight)
        return "native" if native(self.backend, self.hidden_weight, served) else "eager"

    def training_backend(self, x: Tensor) -> str:
        return "native" if gathered.compiles(self.hidden_weight) else "eager"

    def route(self, x: Tensor) -> Tensor:
        return self._retrieve(self._rows(x, self.hidden_weight.dtype), by_batch=False)[0]

    def weights_read(self, x: Tensor) -> int:
        router = (self.query_weight, self.norm_weight, self.norm_bias, self.first_keys, self.second_keys)
        experts = len(self.route(x).unique()) * (self.in_features + self.out_features)
        return sum(parameter.numel() for parameter in router) + experts

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        x = x.double()
        mean, var, weight, bias = (
            each.double() for each in (self.running_mean, self.running_var, self.norm_weight, self.norm_bias)
        )
        query = (x @ self.query_weight.double().T - mean) / torch.sqrt(var + self.epsilon) * weight + bias
        return naive.peer(
            x,
            query.unflatten(1, (self.heads, -1)),
            (self.first_keys.double(), self.second_keys.double()),
            self.top_k,
            self.hidden_weight.double(),
            self.output_weight.double(),
            copy.deepcopy(self.hidden).double().eval(),
        )


def _grid(experts: int) -> tuple[int, int]:
    """How many sub-keys the two sets have."""
    for ratio in (1, 2):
        side = math.isqrt(experts // ratio)
        if ratio * side**2 == experts:
            return side, ratio * side
    raise ValueError(f"num_experts is {experts}; it must be a square, or twice a square: two sets of sub-keys")

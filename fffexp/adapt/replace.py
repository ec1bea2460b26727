"""Feedforward layers in models that exist: the MLPs of a model are found, checked and replaced."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

from torch import nn

from fffexp.adapt.find import Select, find_mlps
from fffexp.adapt.mlp import MLP
from fffexp.layers.base import SIZES, FeedforwardLayer, LayerFactory

MARK = "fffexp"  # what configs of Hugging Face call the entry of the replaced MLPs


@dataclass(frozen=True)
class Replacement:
    """A layer that took the place of an MLP; sizes are by the names of `FeedforwardLayer.sizes`.

    The errors are those of `convert_feedforward`, before distillation and after: mean squared difference to the MLP's
    output on held-out batches with hard routing, divided by the variance of that output.
    """

    name: str  # path of the MLP in the model
    old: nn.Module  # the MLP, or where that was no module of its own, its linear layers
    new: FeedforwardLayer
    old_sizes: Mapping[str, int]
    new_sizes: Mapping[str, int]
    initial_error: float = nan
    final_error: float = nan


class Replacements(list[Replacement]):
    """The replacements in the order of the model's modules, and why what else looks like an MLP stayed, by path."""

    def __init__(self, made: Iterable[Replacement], left: Mapping[str, str]) -> None:
        super().__init__(made)
        self.left = left


def replace_feedforward(model: nn.Module, layer_factory: LayerFactory, select: Select | None = None) -> Replacements:
    """Put a layer in the place of each MLP of a model, which is changed; returns them in the order of its modules.

    Known are: modules of two linear layers with an activation between them (timm, GPT-2, FF), gated ones of three
    (Llama; Phi-3, with two in one), pairs within an nn.Sequential, nn.TransformerEncoderLayer and
    nn.TransformerDecoderLayer, the `intermediate` and `output` of BERT and its kin, and linear layers with an
    activation that a block holds itself (OPT, BART, Hugging Face's ConvNeXt). Running the MLP, and the block that holds
    it, on a few rows with a layer of the same weights in its place makes sure that nothing else happens between its
    input and its output; a block that cannot be run alone is trusted, but not if it is a subclass of nn.Sequential
    or of torch's layers with methods of its own. docs/architectures.md lists models.

    By default the MLPs of blocks are replaced: as many features come out as go in, and a sum with what the input was
    made of follows, unless the block cannot be run alone. Heads of another width, squeeze-and-excitation and MLPs of
    positions stay. A model of linear layers alone is taken whole. What else looks like an MLP stays too (routed
    experts, quantised layers, those of adapters); `left` of the list that is returned says why, by path. Dropout within
    an MLP goes with it: give the factory's layer its own; a dropout module behind it stays. The new layers can be
    trained where the MLP was frozen, and share no weights with other modules where it did.

    In evaluation torch's encoder gave zeros where `src_key_padding_mask` marks padding, by a fused path; after
    replacement such places hold values, as in training. Hugging Face's `from_pretrained` refuses what such a model
    saved: see `load_pretrained`.

    Args:
        model: the whole of it: what holds an nn.TransformerEncoder's layers has to know of them.
        layer_factory: (in_features, out_features) -> layer; takes device, dtype and mode of what it replaces.
        select: (path, module) -> whether that MLP is replaced, be it a block's or not. The module is the MLP's own, or
            else the one that holds its linear layers.

    Raises:
        ValueError: there is no MLP, or none of a block, or none that is selected, its weights are on the meta device,
            or the factory makes something else than a layer of the sizes that it is given.
    """
    mlps, left = find_mlps(model, select)
    layers = [build(mlp, layer_factory) for mlp in mlps]  # all can be made, or nothing is changed
    return put(model, [(mlp, layer) for mlp, layer in zip(mlps, layers, strict=True)], left)


def build(mlp: MLP, layer_factory: LayerFactory) -> FeedforwardLayer:
    """A layer for the place of the MLP."""
    weight = mlp.linears[0].weight  # what comes in is of its type; T5 in float16 keeps the other in float32
    sizes = weight.shape[1], len(mlp.linears[-1].weight)
    layer = layer_factory(*sizes)
    if not isinstance(layer, FeedforwardLayer):
        raise ValueError(f"layer_factory makes a {type(layer).__name__}, which is no FeedforwardLayer of fffexp")
    if (made := (layer.in_features, layer.out_features)) != sizes:
        raise ValueError(
            f"layer_factory makes a layer of {made[0]} -> {made[1]} for {mlp.name or 'the model'}, an MLP of"
            f" {sizes[0]} -> {sizes[1]}: use the in_features and out_features that it is given"
        )
    return layer.to(weight.device, weight.dtype).train(mlp.module.training)


def put(
    model: nn.Module, ready: Iterable[tuple[MLP, FeedforwardLayer, *tuple[float, ...]]], left: Mapping[str, str]
) -> Replacements:
    """The layers in the places of the MLPs, with their errors; a config that would make the MLPs again is marked."""
    made = Replacements((_put(mlp, layer, *errors) for mlp, layer, *errors in ready), left)
    marked: list[int] = []
    for path, holder in model.named_modules():  # a model before its parts, which may share its config
        config: Any = getattr(holder, "config", None)
        layers = {each.name.removeprefix(f"{path}."): shown(each.new) for each in made if _within(each.name, path)}
        if layers and hasattr(holder, "save_pretrained") and hasattr(config, "to_dict") and id(config) not in marked:
            before = getattr(config, "quantization_config", None)
            before = before.get(MARK, {}).get("layers", {}) if isinstance(before, dict) else {}
            # transformers reads this entry before all weights, and refuses one that does not say what made it
            config.quantization_config = {MARK: {"load": "fffexp.load_pretrained", "layers": before | layers}}
            marked.append(id(config))
    return made


def _within(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def shown(layer: FeedforwardLayer) -> str:
    """The layer as print shows it, in one line."""
    return " ".join(str(layer).split())


def _put(mlp: MLP, layer: FeedforwardLayer, *errors: float) -> Replacement:
    new = nn.Sequential(layer, mlp.dropout) if mlp.dropout else layer
    for holder, key, value in mlp.places:
        setattr(holder, key, new if value is None else value)
    parameters = sum(p.numel() for linear in mlp.linears for p in linear.module.parameters())
    neurons, flops = mlp.linears[-1].weight.shape[1], 2 * sum(linear.weight.numel() for linear in mlp.linears)
    sizes = dict(zip(SIZES, (*[neurons] * 4, parameters, flops), strict=True))
    return Replacement(mlp.name, mlp.old, layer, sizes, layer.sizes(), *errors)

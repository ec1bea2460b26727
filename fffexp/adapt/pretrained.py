"""Load Hugging Face models whose MLPs were replaced, which a plain `from_pretrained` refuses."""

from pathlib import Path
from typing import Any

from torch import nn

from fffexp.adapt.replace import MARK, replace_feedforward, shown
from fffexp.layers.base import LayerFactory


def load_pretrained(folder: str | Path, layer_factory: LayerFactory) -> nn.Module:
    """A model of transformers that was saved with `save_pretrained` after its MLPs were replaced, in evaluation mode.

    The config says which MLPs were replaced and by what. The model is made anew from it, of the class that was saved;
    the same MLPs are replaced, and all weights loaded, in the dtype that they were saved in.

    Args:
        folder: what `save_pretrained` wrote.
        layer_factory: the one that the layers were made with; layers of other sizes or activations are refused.

    Raises:
        ValueError: no MLP of this model was replaced, transformers has no such class, the layers are others than those
            that were saved, or weights are missing.
    """
    import transformers  # takes seconds, and is needed here alone
    from safetensors.torch import load_file

    folder = Path(folder)
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    saved = (getattr(config, "quantization_config", None) or {}).get(MARK)
    if not saved:
        raise ValueError(f"{folder / 'config.json'} names no replaced MLPs: load the model with from_pretrained")
    kind = getattr(transformers, config.architectures[0], None)
    if kind is None:
        raise ValueError(f"transformers has no class {config.architectures[0]}, which {folder} was saved from")
    model = kind(config)
    layers: dict[str, str] = saved["layers"]

    def matching(name: str) -> list[str]:  # of a model or of a part of it
        return [each for each in layers if f".{each}".endswith(f".{name}") or f".{name}".endswith(f".{each}")]

    replaced = replace_feedforward(model, layer_factory, lambda name, _: bool(matching(name)))
    made = {name: shown(each.new) for each in replaced for name in matching(each.name)}
    for name, layer in layers.items():
        if (found := made.get(name)) != layer:
            raise ValueError(f"the layer for {name} is {found}; saved was {layer}: give the layer_factory of that")

    state = {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}
    tied = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    lacking = {n for n, p in model.named_parameters(remove_duplicate=False) if n not in state and id(p) not in tied}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    lacking |= {*missing} & {name for name, _ in model.named_buffers()}
    if lacking or unexpected:
        names = ", ".join([*sorted(lacking), *unexpected][:3])
        raise ValueError(f"the weights in {folder} are not those of this model: {names} (and others, perhaps)")
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()

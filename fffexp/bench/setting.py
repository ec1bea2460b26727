"""What a benchmark times: the options of all of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fffexp.commandline import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        layers: public names such as FF, or class paths such as own.MyLayer of a file own.py in the current folder; all
            public ones by default.
        depths: each layer has 2^depth leaves or experts, and a dense one as many neurons as all of them.
        leaf_width: hidden neurons of a leaf or expert.
        in_features: size of an input.
        out_features: size of an output.
        batch_sizes: rows of an input.
        threads: of torch.
        top_k: experts of a sample, where a layer leaves the choice.
        device: cpu, cuda, cuda:N or mps.
        dtype: of weights and inputs.
        backend: a kernel by name; auto takes the fastest that serves.
        layer_args: further arguments of constructors, such as {"own.MyLayer": {"rank": 4}}; else a constructor gets
            those of width, depth, leaf_width, num_experts, expert_width and top_k that it has.
        seconds: of timing at each point.
        json: file for the records; those that it has already are not measured again.
    """

    layers: list[str] = field(default_factory=list)
    depths: list[NonNegativeInt] = field(default_factory=lambda: [2, 5, 8, 11])
    leaf_width: PositiveInt = 32
    in_features: PositiveInt = 768
    out_features: PositiveInt = 768
    batch_sizes: list[PositiveInt] = field(default_factory=lambda: [1, 16, 256, 2048])
    threads: list[PositiveInt] = field(default_factory=lambda: [1])
    top_k: PositiveInt = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    backend: Literal["auto", "native", "triton", "eager"] = "auto"
    layer_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: PositiveFloat = 2.0
    json: Path | None = None


INFERENCE = Setting()
TRAINING = Setting(depths=[5, 7], batch_sizes=[256], top_k=2, seconds=3.0)
MODEL = Setting(depths=[5, 8], batch_sizes=[128, 2048])

"""What a row of a table trains: a layer with its sizes, and the arguments of `fffexp fit` that make it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fffexp.errors import UserError

Layer = Literal["none", "FF", "NoisyTopKMoE", "SwitchMoE", "FFF"]
ORDER: tuple[Layer, ...] = get_args(Layer)
LAYERS = ORDER[1:]
Reduction = Literal["sum", "mean"]

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = {
    "fashion_mnist": [f"--config={CONFIGS}/data/fashion_mnist.yaml"],
    "mnist": [f"--config={CONFIGS}/data/hub.yaml", "--data.name=mnist"],
    "usps": [f"--config={CONFIGS}/data/hub.yaml", "--data.name=usps"],
    "cifar10": [f"--config={CONFIGS}/data/hub.yaml", "--data.name=cifar10"],
}
SIZES = {"fashion_mnist": (784, 10), "mnist": (784, 10), "usps": (256, 10), "cifar10": (3072, 10)}  # inputs, classes
PATCHES = {"fashion_mnist": 7, "cifar10": 4}  # pixels of a vision transformer's patch that divide the images
RECIPES = {"FF": "ff", "NoisyTopKMoE": "moe", "SwitchMoE": "switch", "FFF": "fff"}
NARROW = {"FFF": 2, "FF": 16}  # up to this width, of a leaf or in all, by the recipe fff_narrow or ff_narrow
K = 2  # experts that a noisy top-k gate chooses, as in arXiv 2308.14711


@dataclass(frozen=True)
class Cell:
    """A layer, or none; FF has no leaf width, and only the paper's FFF has a reduction of its hardening loss.

    Args:
        layer: the class.
        training_width: hidden neurons in all.
        leaf_width: hidden neurons of a leaf or an expert.
        reduction: of the hardening loss.

    Raises:
        UserError: a leaf width that does not divide the training width, or for FFF not into a power of 2.
    """

    layer: Layer
    training_width: int
    leaf_width: int | None = None
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        if self.leaf_width is None:
            return
        blocks, rest = divmod(self.training_width, self.leaf_width)
        if self.layer == "FFF" and (rest or not blocks or blocks & (blocks - 1)):
            raise UserError(f"{self.training_width} hidden neurons are not a power of 2 of leaves of {self.leaf_width}")
        if rest or not blocks:
            raise UserError(f"{self.training_width} hidden neurons are not a number of experts of {self.leaf_width}")
        if self.layer == "NoisyTopKMoE" and blocks < K:
            raise UserError(
                f"{self.training_width} hidden neurons are {blocks} expert of {self.leaf_width}: {K} are needed"
            )

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Cell":
        """That of a run or a row of a table."""
        return cls(record["layer"], record["training_width"], record["leaf_width"], record["reduction"])

    @property
    def blocks(self) -> int:
        """Leaves or experts; 1 for FF."""
        return 1 if self.leaf_width is None else self.training_width // self.leaf_width

    @property
    def depth(self) -> int | None:
        """Of the tree."""
        return self.blocks.bit_length() - 1 if self.layer == "FFF" else None

    @property
    def inference_size(self) -> int:
        """Neurons evaluated for one sample, those that decide included."""
        if self.layer == "FFF":
            return (self.depth or 0) + (self.leaf_width or 0)
        if self.leaf_width is None:
            return self.training_width
        return (K if self.layer == "NoisyTopKMoE" else 1) * self.leaf_width + self.blocks

    @property
    def recipe(self) -> str:
        """The project's: a file of configs/recipe/."""
        narrow = (self.leaf_width or self.training_width) <= NARROW.get(self.layer, 0)
        return RECIPES[self.layer] + ("_narrow" if narrow else "")

    def describe(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return {**asdict(self), "depth": self.depth}

    def layer_arguments(self) -> list[str]:
        """That choose the layer and its sizes."""
        sizes: dict[str, int]
        if self.layer == "none":
            return ["--model.layer=null"]
        if self.layer == "FF":
            sizes = {"width": self.training_width}
        elif self.layer == "FFF":
            sizes = {"depth": self.depth or 0, "leaf_width": self.leaf_width or 0}
        else:
            sizes = {"num_experts": self.blocks, "expert_width": self.leaf_width or 0}
            if self.layer == "NoisyTopKMoE":
                sizes["top_k"] = K
        return [f"--model.layer={self.layer}", *(f"--model.layer.{name}={size}" for name, size in sizes.items())]

    def best_arguments(self, data: str) -> list[str]:
        """That train it by the project's recipe for the layer."""
        pieces = ("model/one_cycle", "trainer/averaged", f"recipe/{self.recipe}")
        return [*DATA[data], *(f"--config={CONFIGS}/{piece}.yaml" for piece in pieces), *self.layer_arguments()]

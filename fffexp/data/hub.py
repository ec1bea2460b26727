"""Image data sets from the Hugging Face hub; they need a network once, then they are in its cache."""

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from typing_extensions import override

from fffexp.data.base import InMemoryData, Kind, Part, Rows, pixels
from fffexp.errors import UserError, refuse

HUB_FILES = "hf://datasets/"  # how the path of a file there begins
Name = Literal["mnist", "fashion_mnist", "usps", "svhn", "cifar10", "cifar100"]
# where each lies on the hub, its config there, the shape of an image, and the number of classes
REPOSITORIES: dict[Name, tuple[str, str | None, tuple[int, int, int], int]] = {
    "mnist": ("ylecun/mnist", None, (1, 28, 28), 10),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", None, (1, 28, 28), 10),
    "usps": ("flwrlabs/usps", None, (1, 16, 16), 10),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", (3, 32, 32), 10),
    "cifar10": ("uoft-cs/cifar10", None, (3, 32, 32), 10),
    "cifar100": ("uoft-cs/cifar100", None, (3, 32, 32), 100),
}


class Hub(InMemoryData):
    """One of the data sets of the FFF paper, through Hugging Face `datasets`.

    Args:
        name: Which one.
    """

    def __init__(self, name: Name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if name not in REPOSITORIES:
            raise UserError(f"the hub data set {name!r} is unknown: give one of {', '.join(REPOSITORIES)}")
        self.path, self.config, self.in_shape, self.num_classes = REPOSITORIES[name]

    @override
    def source(self, part: Part, kind: Kind) -> str:
        return f"{self.path} ({part} {kind})"

    @override
    def load(self, part: Part) -> Rows:
        return to_rows(fetch(self.path, self.config, part), self.path)


def fetch(path: str, config: str | None, part: Part) -> Any:
    """One split as a `datasets.Dataset`, downloaded or from the cache."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path} needs the package datasets: pip install 'fffexp[hub]'") from error
    for package in ("datasets", "huggingface_hub"):
        logging.getLogger(package).setLevel(logging.ERROR)  # each retry is reported otherwise
    try:
        return datasets.load_dataset(path, config, split=part)
    except Exception as error:  # each library below has its own for a hub that is out of reach
        raise UserError(
            f"{path} cannot be fetched from the Hugging Face hub ({type(error).__name__}):"
            " check the network connection, or use data on disk (fffexp.data.IDX)"
        ) from error


def to_rows(split: Any, name: str) -> Rows:
    """A `datasets.Dataset` of images of one size: inputs (rows, channels, height, width), labels (rows,)."""
    columns = []
    for names in (("image", "img"), ("label", "fine_label")):
        if not (found := [each for each in names if each in split.column_names]):
            raise UserError(
                f"{name} has no column {' or '.join(names)} but {', '.join(split.column_names)}:"
                " the hub's copy has changed; use data on disk (fffexp.data.IDX)"
            )
        columns.append(split[found[0]])
    inputs = pixels(np.stack([np.asarray(image) for image in columns[0]]))
    inputs = inputs.unsqueeze(1) if inputs.ndim == 3 else inputs.movedim(-1, 1).contiguous()
    return inputs, torch.from_numpy(np.asarray(columns[1], np.int64))


def download(path: str) -> Path:
    """The file hf://datasets/OWNER/NAME/FILE of the hub, downloaded or from its cache."""
    parts = path.removeprefix(HUB_FILES).split("/", 2)
    refuse((len(parts) < 3 or not all(parts), f"{path}: give hf://datasets/OWNER/NAME/FILE"))
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except Exception as error:  # each library below has its own for a hub that is out of reach
        problem = f"{path} cannot be fetched from the Hugging Face hub ({type(error).__name__})"
        raise UserError(f"{problem}: check its name and the network connection, or use a file on disk") from error

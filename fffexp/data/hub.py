"""Image data sets from the Hugging Face hub; they need a network once, then they are in its cache."""

import logging
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fffexp.data.base import ClassificationData, Kind, Part, Rows, pixels
from fffexp.errors import UserError

Name = Literal["mnist", "fashion_mnist", "usps", "svhn", "cifar10", "cifar100"]


class Repository(NamedTuple):
    """Where a data set lies on the hub and what it holds."""

    path: str
    config: str | None
    in_shape: tuple[int, int, int]
    num_classes: int


REPOSITORIES: dict[Name, Repository] = {
    "mnist": Repository("ylecun/mnist", None, (1, 28, 28), 10),
    "fashion_mnist": Repository("zalando-datasets/fashion_mnist", None, (1, 28, 28), 10),
    "usps": Repository("flwrlabs/usps", None, (1, 16, 16), 10),
    "svhn": Repository("ufldl-stanford/svhn", "cropped_digits", (3, 32, 32), 10),
    "cifar10": Repository("uoft-cs/cifar10", None, (3, 32, 32), 10),
    "cifar100": Repository("uoft-cs/cifar100", None, (3, 32, 32), 100),
}


class Hub(ClassificationData):
    """One of the data sets of the FFF paper, through Hugging Face `datasets`.

    Args:
        name: Which one.

    Raises:
        UserError: `datasets` is not installed, or the hub cannot be reached.
    """

    def __init__(self, name: Name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if name not in REPOSITORIES:
            raise UserError(f"the hub data set {name!r} is unknown: give one of {', '.join(REPOSITORIES)}")
        self.name = name
        self._repository = REPOSITORIES[name]
        self.in_shape = self._repository.in_shape
        self.num_classes = self._repository.num_classes

    def source(self, part: Part, kind: Kind) -> str:
        """The repository on the hub."""
        return f"{self._repository.path} ({part} {kind})"

    def load(self, part: Part) -> Rows:
        """Inputs (rows, channels, height, width) in [0, 1] and labels (rows,)."""
        return to_rows(fetch(self._repository.path, self._repository.config, part), self._repository.path)


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
    images = np.stack([np.asarray(image) for image in split[_column(split, ("image", "img"), name)]])
    labels = np.asarray(split[_column(split, ("label", "fine_label"), name)], np.int64)
    inputs = pixels(images)
    inputs = inputs.unsqueeze(1) if inputs.ndim == 3 else inputs.movedim(-1, 1).contiguous()
    return inputs, torch.from_numpy(labels)


def _column(split: Any, names: tuple[str, ...], source: str) -> str:
    for name in names:
        if name in split.column_names:
            return name
    raise UserError(
        f"{source} has no column {' or '.join(names)} but {', '.join(split.column_names)}:"
        " the hub's copy has changed; use data on disk (fffexp.data.IDX)"
    )

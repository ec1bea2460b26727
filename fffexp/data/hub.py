"""Hugging Face data sets: from the hub, which needs a network once and then has a cache, or saved on disk."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from typing_extensions import override

from fffexp.data.base import Kind, Part, Rows
from fffexp.data.columns import Frame, Inputs, TargetKind, Targets, input_names
from fffexp.data.images import channels_first, prepare
from fffexp.data.table import TableData, to_frame
from fffexp.errors import UserError, refuse

HUB_FILES = "hf://datasets/"  # how the path of a file there begins
# the data sets of the FFF paper: where each lies on the hub, its config there, the shape of an image, and the number of
# classes, which are known without a network
REPOSITORIES: dict[str, tuple[str, str | None, tuple[int, int, int], int]] = {
    "mnist": ("ylecun/mnist", None, (1, 28, 28), 10),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", None, (1, 28, 28), 10),
    "usps": ("flwrlabs/usps", None, (1, 16, 16), 10),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", (3, 32, 32), 10),
    "cifar10": ("uoft-cs/cifar10", None, (3, 32, 32), 10),
    "cifar100": ("uoft-cs/cifar100", None, (3, 32, 32), 100),
}
IMAGES, LABELS = ("image", "img"), ("label", "fine_label")  # usual names of columns


class Hub(TableData):
    """A data set of Hugging Face `datasets`: images or columns of a table, and what to predict.

    One of the FFF paper by its short name, any other by its path on the hub, or a folder that `save_to_disk` wrote.

    Args:
        name: mnist, fashion_mnist, usps, svhn, cifar10, cifar100; OWNER/NAME on the hub; or a folder.
        config: Which of its configurations, if it has several.
        inputs: A column of images, or columns of numbers and texts, see Table. Left out: the column image or img, or,
            without one, all columns but the target.
        target: Column to predict; several for regression. Left out: label or fine_label.
        kind: Whether the targets are classes or quantities; left out, texts and whole numbers are classes.
        train_split: What it calls the part to train and validate on.
        test_split: What it calls the test; null holds out a fifth of `train_split`, as for data without parts.
        size: Height and width to which images are brought; left out, they must have one size.
        mode: RGB or L to which images are brought; left out, they must have one.
        kwargs: See InMemoryData.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        inputs: list[str] | None = None,
        target: str | list[str] | None = None,
        kind: TargetKind | None = None,
        train_split: str = "train",
        test_split: str | None = "test",
        size: tuple[int, int] | None = None,
        mode: Literal["RGB", "L"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.name = self.path = name
        self.config, self.size, self.mode = config, size, mode
        self.splits: dict[Part, str | None] = {"train": train_split, "test": test_split}
        self.image: str | None = None
        if name in REPOSITORIES:
            given = config or inputs or target or kind or size or mode
            refuse((given, f"{name} is known whole: leave out all but its name, or give {REPOSITORIES[name][0]}"))
            self.path, self.config, self.in_shape, self.num_classes = REPOSITORIES[name]
            return
        if (Path(name) / "state.json").is_file():  # saved without parts
            self.splits["test"] = None
        train = self._fetch("train")
        assert train is not None
        images, frame = _image_columns(train), self._frame(train)
        names = (
            [target] if isinstance(target, str) else target or [each for each in LABELS if each in frame.columns][:1]
        )
        self.image = next((each for each in inputs or (*IMAGES, *images) if each in images), None)
        if self.image is None:
            self.inputs = Inputs(frame, input_names(frame, names, inputs))
            self.in_shape = (self.inputs.width,)
        else:
            several = f"{name}: {', '.join(inputs or ())}: images are one column: give it alone"
            refuse((len(inputs or ()) > 1, several), (not names, f"{name}: name what to predict by --data.target"))
            self.in_shape = tuple(self._images(train.select(range(1)))[0].shape)
        classes = train.features.get(names[0])
        self.set_targets(Targets(frame, names, kind, getattr(classes, "names", None)))

    @override
    def source(self, part: Part, kind: Kind) -> str:
        return f"{self.path} ({part} {kind})"

    @override
    def load(self, part: Part) -> Rows | None:
        if (split := self._fetch(part)) is None:
            return None
        if self.path != self.name:  # one that is known whole
            self.image, label = (_usual(split, names, self.path) for names in (IMAGES, LABELS))
            return self._images(split), torch.from_numpy(np.asarray(split[label], np.int64))
        frame = self._frame(split)
        return self._images(split) if self.inputs is None else self.inputs.of(frame), self.targets.of(frame)

    def _fetch(self, part: Part) -> Any:
        name = self.splits[part]
        return None if name is None else fetch(self.path, self.config, name)

    def _frame(self, split: Any) -> Frame:
        # all columns but images, with the names of classes
        table = split.remove_columns(_image_columns(split)).with_format("arrow")[:]
        for place, name in enumerate(table.column_names):
            if classes := getattr(split.features[name], "names", None):
                texts = [
                    classes[label] if label is not None and label >= 0 else "" for label in table[name].to_pylist()
                ]
                table = table.set_column(place, name, pa.array(texts, pa.string()))
        return to_frame(self.path, table, lambda row: f"row {row + 1}")

    def _images(self, split: Any) -> Tensor:
        found: list[Any] = []
        try:
            for row, each in enumerate(split.select_columns([self.image])):
                there = f"{self.path}, row {row + 1}"
                refuse((each[self.image] is None, f"{there}: column {self.image!r} has no image: remove the row"))
                found.append(prepare(each[self.image], self.size, self.mode, there))
                shapes = f"{found[-1].shape}, and that of row 1 {found[0].shape}"
                fix = "give --data.size '[HEIGHT, WIDTH]' and --data.mode RGB or L"
                refuse((found[-1].shape != found[0].shape, f"{there}: the image has the shape {shapes}: {fix}"))
        except UserError:
            raise
        except Exception as error:  # each format has its own
            there = f"{self.path}, row {len(found) + 1}"
            raise UserError(f"{there} cannot be read as an image ({type(error).__name__}): remove the row") from error
        return channels_first(np.stack(found))


def fetch(path: str, config: str | None, split: str) -> Any:
    """One split as a `datasets.Dataset`, from disk, downloaded or from the cache."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path} needs the package datasets: pip install 'fffexp[hub]'") from error
    for package in ("datasets", "huggingface_hub"):
        logging.getLogger(package).setLevel(logging.ERROR)  # each retry is reported otherwise
    saved = Path(path).is_dir()
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config, split=split)
    except Exception as error:  # each library below has its own for a hub that is out of reach
        place, problem = "disk" if saved else "the Hugging Face hub", f"{type(error).__name__}"
        raise UserError(
            f"{path} cannot be fetched from {place} ({problem}): check its name and split and the network connection,"
            " or use data on disk (a folder that save_to_disk wrote)"
        ) from error
    if not saved:
        return loaded
    if isinstance(loaded, datasets.Dataset):
        return loaded
    there = f"it has {', '.join(loaded)}"
    fix = "give --data.train_split or --data.test_split (null: a fifth of the training part)"
    refuse((split not in loaded, f"{path} has no split {split!r}, {there}: {fix}"))
    return loaded[split]


def _image_columns(split: Any) -> list[str]:
    return [name for name, feature in split.features.items() if type(feature).__name__ == "Image"]


def _usual(split: Any, names: Sequence[str], path: str) -> str:
    found = next((name for name in names if name in split.column_names), None)
    if found is None:
        raise UserError(
            f"{path} has no column {' or '.join(names)} but {', '.join(split.column_names)}:"
            " the hub's copy has changed; use data on disk (fffexp.data.IDX)"
        )
    return found


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

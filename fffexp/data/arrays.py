"""Arrays of NumPy's from .npy and .npz files."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fffexp.data.base import InMemoryData, Kind, Part, Rows, name_classes, pixels
from fffexp.data.columns import TargetKind
from fffexp.errors import UserError, refuse

Array = np.ndarray[Any, Any]


class Arrays(InMemoryData):
    """Inputs (rows, ...) and targets (rows,) or (rows, outputs) from .npy files, or by their keys from an .npz.

    Bytes of inputs are brought to [0, 1]; images are (rows, channels, height, width). Whole numbers and texts are
    classes, named as they stand; other numbers are to regress on.

    Args:
        inputs: Path of a .npy file, or the key with `path`.
        targets: Likewise.
        test_inputs: Likewise; without it a fifth of the rows is the test.
        test_targets: Likewise.
        path: An .npz file with all of these.
        kind: Whether the targets are classes or quantities; left out, texts and whole numbers are classes.
        kwargs: see InMemoryData.
    """

    def __init__(
        self,
        inputs: str = "inputs",
        targets: str = "targets",
        test_inputs: str | None = None,
        test_targets: str | None = None,
        path: str | None = None,
        kind: TargetKind | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        alone = (test_inputs is None) != (test_targets is None)
        refuse((alone, "test_inputs and test_targets belong together: give both or neither"))
        self.path = path
        self.names: dict[tuple[Part, Kind], str | None] = {
            ("train", "images"): inputs,
            ("train", "labels"): targets,
            ("test", "images"): test_inputs,
            ("test", "labels"): test_targets,
        }
        self._arrays = {key: self._read(name) for key, name in self.names.items() if name is not None}
        images, labels = self._arrays["train", "images"], self._arrays["train", "labels"]
        for part in ("train", "test"):
            array, name = self._arrays.get((part, "images"), images), self.source(part, "images")
            refuse(
                (array.dtype.kind in "US", f"{name} holds texts: give numbers, or a table (--data Table)"),
                (array.ndim < 2, f"{name} has the shape {array.shape}: give rows of at least one number, (rows, ...)"),
            )
        whole = labels.dtype.kind in "iubUS"
        self.in_shape = images.shape[1:]
        shape = f"{self.source('train', 'labels')} has the shape {labels.shape}"
        regression = kind == "regression" or (kind is None and not (whole and labels.ndim == 1))
        if regression:
            texts = labels.dtype.kind in "US"
            refuse(
                (texts, f"{self.source('train', 'labels')} holds texts: give --data.kind classification"),
                (labels.ndim not in (1, 2), f"{shape}, not (rows,) or (rows, outputs): give one row of numbers each"),
            )
            self.num_outputs = labels.shape[1] if labels.ndim == 2 else 1
        else:
            refuse((labels.ndim != 1, f"{shape}, not (rows,): give one class a row, or --data.kind regression"))
            name, row = self.source("train", "labels"), next(iter(np.flatnonzero(labels != labels)), None)  # a NaN's
            refuse((row is not None, f"{name} has a NaN in row {row}: fix or remove that row"))
            self.class_names, _ = name_classes(labels)
            self.num_classes = len(self.class_names)
            many = f"{self.source('train', 'labels')} has {self.num_classes} different values in {len(labels)} rows"
            fix = "give --data.kind regression if they are quantities, or other targets"
            refuse((self.num_classes > 0.5 * len(labels) > 0, f"{many}, too many for classes: {fix}"))

    @override
    def source(self, part: Part, kind: Kind) -> str:
        name = self.names[part, kind] or self.names["train", kind]
        return str(name) if self.path is None else f"{self.path} ({name})"

    @override
    def load(self, part: Part) -> Rows | None:
        if (part, "images") not in self._arrays:
            return None
        images, labels = self._arrays[part, "images"], self._arrays[part, "labels"]
        name = self.source(part, "labels")
        if hasattr(self, "num_outputs"):
            refuse((labels.dtype.kind in "US", f"{name} holds texts, not numbers to regress on: give others"))
            numbers = labels.astype(np.float64)
            return _inputs(images), torch.from_numpy(numbers[:, None] if numbers.ndim == 1 else numbers)
        refuse((labels.ndim != 1, f"{name} has the shape {labels.shape}, not (rows,): give one class a row"))
        found, places = name_classes(labels)
        unknown = next((each for each in found if each not in self.class_names), None)
        refuse((unknown is not None, f"{name} has the class {unknown!r}, which the training data do not have"))
        order = np.array([self.class_names.index(each) for each in found], dtype=np.int64)
        return _inputs(images), torch.from_numpy(order[places])

    def _read(self, name: str) -> Array:
        path = Path(name if self.path is None else self.path)
        there = f"{path} ({name})" if self.path else str(path)
        try:
            loaded = np.load(path, mmap_mode="r")
            if self.path is None:
                refuse((not isinstance(loaded, np.ndarray), f"{path} is an .npz: give it by --data.path, and its keys"))
                array = loaded
            else:
                refuse((isinstance(loaded, np.ndarray), f"{path} is a .npy: give it by --data.inputs or the like"))
                keys = ", ".join(loaded.files)
                refuse((name not in loaded.files, f"{path} has no array {name!r}: give one of {keys}"))
                array = loaded[name]
        except UserError:
            raise
        except OSError as error:
            problem = error.strerror or "it is no .npy or .npz file"
            raise UserError(f"{there} cannot be read ({problem}): give the path of a .npy or .npz file") from error
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            pickled = "pickle" in str(error) or "objects" in str(error).lower()
            problem = "holds objects, or is no .npy file" if pickled else "is damaged"
            raise UserError(f"{there} {problem}: write it again with numpy.save or numpy.savez") from error
        refuse(
            (array.dtype.kind not in "iubfUS", f"{there} holds {array.dtype}, neither numbers nor texts: convert it"),
            (not array.size, f"{there} is empty: use a data set with rows in it"),
        )
        return array


def _inputs(array: Array) -> Tensor:
    # what float32 would round is rounded after it was standardised
    wide = array.dtype.itemsize > 2 and array.dtype != np.float32
    return torch.from_numpy(array.astype(np.float64)) if wide else pixels(array)

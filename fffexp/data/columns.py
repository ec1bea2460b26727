"""From the columns of a table to tensors; what cannot be used is refused by file, row and column."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fffexp.data.base import Rows, name_classes
from fffexp.errors import UserError, refuse

TargetKind = Literal["classification", "regression"]
NUMBER, INTEGER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$", r"^[-+]?\d+$"
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Frame:
    """A table as it was read.

    Args:
        name: of the file, for messages.
        columns: by name, all of one length.
        place: what a message calls a row: "line 17".
    """

    name: str
    columns: Mapping[str, pa.ChunkedArray]
    place: Callable[[int], str]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def refuse_rows(self, wrong: pa.ChunkedArray, column: str, problem: Callable[[Any], str]) -> None:
        """Refuse the first row that is wrong; the problem is said of its value."""
        if (row := pc.index(wrong, True).as_py()) >= 0:
            value = self.columns[column][row].as_py()
            raise UserError(f"{self.name}, {self.place(row)}: column {column!r} {problem(value)}")


class Schema:
    """Which columns of a table are inputs and which targets, and what they hold; learned from a first table.

    An input column holds numbers, or texts: these become a column for each different text, 1 where it stands, else 0.

    Args:
        frame: the table that has the training part, whole.
        targets: names of the columns to predict.
        inputs: names of the columns to predict from; None takes all others.
        exclude: names of columns that are left out.
        categorical: names of input columns whose numbers are names.
        kind: of the targets. None: texts and whole numbers are classes, other numbers are to regress on.

    Attributes:
        in_shape: (columns of the inputs,).
        class_names: names of the classes, as they stand in the table; empty for regression.
        num_texts: columns of the inputs, the last ones, that stand for texts.

    Raises:
        UserError: the table does not hold what is asked for, or something that cannot be used.
    """

    def __init__(
        self,
        frame: Frame,
        targets: Sequence[str],
        inputs: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        categorical: Sequence[str] = (),
        kind: TargetKind | None = None,
    ) -> None:
        given = {"target": targets, "inputs": inputs or (), "exclude": exclude, "categorical": categorical}
        for option, names in given.items():
            unknown = next((name for name in names if name not in frame.columns), None)
            there = f"it has {', '.join(frame.columns)}"
            refuse((unknown is not None, f"{frame.name} has no column {unknown!r} (--data.{option}): {there}"))
        twice = next((name for name in targets if name in (*exclude, *(inputs or ()))), None)
        names = [each for each in inputs or frame.columns if each not in (*targets, *exclude)]
        stray = next((name for name in categorical if name not in names), None)
        refuse(
            (not targets, "no target is given: name the column to predict by --data.target"),
            (not len(frame), f"{frame.name} has no rows: give a file with some"),
            (twice is not None, f"column {twice!r} is a target and cannot be an input or excluded: give it once"),
            (stray is not None, f"column {stray!r} is categorical, but no input: leave it out of --data.categorical"),
            (not names, f"{frame.name} has no column to predict from: exclude fewer, or give other inputs"),
        )
        unnamed = "has a column without a name: name it, or leave it out by --data.exclude '[\"\"]'"
        refuse(("" in names, f"{frame.name} {unnamed}"))
        self.targets = list(targets)
        self.kind = kind or _guess(frame, targets)
        regression = self.kind == "regression"
        several = f"{', '.join(targets)}: only one column can hold classes"
        refuse((not regression and len(targets) > 1, f"{several}: give one target, or --data.kind regression"))
        texts = [name for name in names if name in categorical or not _is_numeric(frame, name)]
        self.numbers = [name for name in names if name not in texts]
        self.texts = {name: name_classes(_texts(frame, name))[0] for name in texts}
        self.num_texts = sum(map(len, self.texts.values()))
        self.in_shape = (len(self.numbers) + self.num_texts,)
        self.class_names = [] if regression else name_classes(_texts(frame, targets[0]))[0]
        if not regression:
            count, fix = len(self.class_names), "--data.kind regression if it is a quantity, or another target"
            one = f"{frame.name}: column {targets[0]!r} holds {self.class_names[0]!r} in every row"
            many = f"{frame.name}: column {targets[0]!r} has {count} different values in {len(frame)} rows"
            refuse(
                (count == 1, f"{one}, so that there is nothing to learn: give another target"),
                (count > 0.5 * len(frame), f"{many}, too many for classes: give {fix}"),
            )

    def rows(self, frame: Frame) -> Rows:
        """Inputs float64 (rows, *in_shape) and targets of a table: int64 (rows,) or float64 (rows, targets)."""
        inputs = self.inputs(frame)
        self._check_columns(frame, self.targets)
        if self.kind == "regression":
            return inputs, torch.from_numpy(np.stack([_numbers(frame, name) for name in self.targets], 1))
        (target,) = self.targets
        return inputs, torch.from_numpy(_places(frame, target, _texts(frame, target), self.class_names, "class"))

    def inputs(self, frame: Frame) -> Tensor:
        """Inputs alone, of a table that need not have the targets."""
        self._check_columns(frame, [*self.numbers, *self.texts])
        numbers = [torch.from_numpy(_numbers(frame, name))[:, None] for name in self.numbers]
        for name, known in self.texts.items():
            places = torch.from_numpy(_places(frame, name, _texts(frame, name), known, "text"))
            numbers.append(torch.nn.functional.one_hot(places, len(known)).double())
        return torch.cat(numbers, 1)

    def _check_columns(self, frame: Frame, names: Sequence[str]) -> None:
        missing = next((name for name in names if name not in frame.columns), None)
        has = f"it has {', '.join(frame.columns)}"
        refuse(
            (missing is not None, f"{frame.name} has no column {missing!r}, which the training data have: {has}"),
            (not len(frame), f"{frame.name} has no rows: give a file with some"),
        )


# a single text or gap among numbers is a fault of theirs, which is refused later
def _guess(frame: Frame, targets: Sequence[str]) -> TargetKind:
    column = frame.columns[targets[0]]
    if _is_text(column):
        fractions = pc.any(pc.and_(_matches(column, NUMBER), pc.invert(_matches(column, INTEGER)))).as_py()
        quantities = fractions and pc.mean(_matches(column, NUMBER)).as_py() >= 0.5
    else:
        quantities = not _is_named(column.type)
    return "regression" if quantities or len(targets) > 1 else "classification"


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _is_named(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _matches(column: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    return pc.match_substring_regex(column, pattern)


# whether a column of inputs holds numbers; one that holds both numbers and texts is refused
def _is_numeric(frame: Frame, name: str) -> bool:
    column = frame.columns[name]
    if not _is_text(column):
        return True
    _check_present(frame, name)
    numbers = _matches(column, NUMBER)
    share = pc.mean(numbers).as_py()
    if 0 < share < 1:
        kind, fix = ("numbers", "fix it") if share >= 0.5 else ("texts", "fix it")
        wrong = pc.invert(numbers) if share >= 0.5 else numbers
        fix = f"{fix}, or take all as names by --data.categorical '[{name}]', or --data.exclude '[{name}]'"
        frame.refuse_rows(wrong, name, lambda value: f"holds {value!r}, and {kind} elsewhere: {fix}")
    return bool(share)


def _check_present(frame: Frame, name: str) -> None:
    column = frame.columns[name]
    missing = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
    empty = pc.equal(column, "") if _is_text(column) else missing
    fix = "fill it in, remove the row, or leave the column out"
    frame.refuse_rows(pc.fill_null(pc.or_(missing, empty), True), name, lambda value: f"has no value: {fix}")


def _numbers(frame: Frame, name: str) -> Values:
    column = frame.columns[name]
    _check_present(frame, name)
    if _is_text(column):
        wrong = pc.invert(_matches(column, NUMBER))
        frame.refuse_rows(wrong, name, lambda value: f"holds {value!r} where a number is due: fix it")
    kind = column.type
    if not (_is_text(column) or _is_named(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        held = f"{frame.name}: column {name!r} holds {kind}, neither numbers nor texts"
        raise UserError(f"{held}: convert it, or --data.exclude '[{name}]'")
    numbers = pc.cast(column.cast(pa.int8()) if pa.types.is_boolean(kind) else column, pa.float64(), safe=False)
    large = pc.greater(pc.abs(numbers), float(torch.finfo(torch.float32).max))
    frame.refuse_rows(large, name, lambda value: f"holds {value!r}, which is too large: fix or remove the row")
    return numbers.to_numpy()


def _texts(frame: Frame, name: str) -> Values:
    column = frame.columns[name]
    _check_present(frame, name)
    if pa.types.is_floating(column.type) and pc.all(pc.equal(pc.floor(column), column)).as_py():
        column = pc.cast(column, pa.int64())  # 1 rather than 1.0
    return np.asarray(pc.cast(column, pa.string()).to_pylist(), dtype=str)


def _places(frame: Frame, name: str, values: Values, known: Sequence[str], what: str) -> Values:
    places = {value: place for place, value in enumerate(known)}
    found = np.asarray([places.get(value, -1) for value in values.tolist()], dtype=np.int64)
    fix = f"a {what} that the training data do not have: fix or remove the row"
    frame.refuse_rows(pa.chunked_array([found < 0]), name, lambda value: f"holds {value!r}, {fix}")
    return found

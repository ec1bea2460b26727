"""From the columns of a table to tensors; what cannot be used is refused by file, row and column."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fffexp.data.base import name_classes
from fffexp.errors import UserError, refuse

TargetKind = Literal["classification", "regression"]
NUMBER, INTEGER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$", r"^[-+]?\d+$"
MAX_TEXTS, FEW_TEXTS = 1000, 20  # different texts of a column of inputs; few may be different in each row
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


class Targets:
    """The columns of a table to predict, learned from a table that has the training part.

    Args:
        frame: that table.
        names: of the columns.
        kind: classes, or quantities to regress on. None: texts and whole numbers are classes, other numbers quantities.
        class_names: names of all classes in their order; None takes those that the table has.

    Attributes:
        class_names: as they stand in the table; empty for regression.

    Raises:
        UserError: the columns cannot be used so.
    """

    def __init__(
        self,
        frame: Frame,
        names: Sequence[str],
        kind: TargetKind | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.names, self.kind = list(names), kind or ("classification" if class_names else _guess(frame, names))
        self.class_names: list[str] = []
        if self.kind == "regression":
            return
        several = f"{', '.join(names)}: only one column can hold classes"
        refuse((len(names) > 1, f"{several}: give one target, or --data.kind regression"))
        self.class_names = list(class_names or name_classes(_texts(frame, names[0]))[0])
        count, column = len(self.class_names), f"{frame.name}: column {names[0]!r}"
        one = f"{column} holds {self.class_names[0]!r} in every row, so that there is nothing to learn"
        many = f"{column} has {count} different values in {len(frame)} rows, too many for classes"
        refuse(
            (count == 1, f"{one}: give another target"),
            (count > 0.5 * len(frame), f"{many}: give --data.kind regression for a quantity, or another target"),
        )

    def of(self, frame: Frame) -> Tensor:
        """Targets of a table: int64 (rows,), or float64 (rows, targets)."""
        _check_columns(frame, self.names)
        if self.kind == "regression":
            return torch.from_numpy(np.stack([_numbers(frame, name) for name in self.names], 1))
        (name,) = self.names
        return torch.from_numpy(_places(frame, name, self.class_names, "class"))


class Inputs:
    """The columns of a table to predict from, learned from a table that has the training part.

    Args:
        frame: that table.
        names: of the columns.
        categorical: names of those whose numbers are names.

    Attributes:
        width: columns of the tensor: one for each column of numbers, then one for each different text of the others.
        num_texts: how many of these, the last ones, stand for texts.

    Raises:
        UserError: a column cannot be used.
    """

    def __init__(self, frame: Frame, names: Sequence[str], categorical: Sequence[str] = ()) -> None:
        texts = [name for name in names if name in categorical or not _is_numeric(frame, name)]
        self.numbers = [name for name in names if name not in texts]
        self.texts = {name: name_classes(_texts(frame, name))[0] for name in texts}
        for name, found in self.texts.items():
            many = f"{frame.name}: column {name!r} has {len(found)} different texts in {len(frame)} rows"
            leave = f"leave it out by --data.exclude '[{name}]'"
            # each becomes a column: those of names and numbers of rows would fill the memory, and tell nothing
            limit = min(MAX_TEXTS, max(FEW_TEXTS, len(frame) // 2))
            refuse((len(found) > limit, f"{many}, too many for a column each: {leave}"))
        self.num_texts = sum(map(len, self.texts.values()))
        self.width = len(self.numbers) + self.num_texts

    def of(self, frame: Frame) -> Tensor:
        """Inputs of a table, float64 (rows, width)."""
        _check_columns(frame, [*self.numbers, *self.texts])
        columns = [torch.tensor(_numbers(frame, name))[:, None] for name in self.numbers]
        for name, known in self.texts.items():
            places = torch.from_numpy(_places(frame, name, known, "text"))
            columns.append(one_hot(places, len(known)).double())
        return torch.cat(columns, 1)


def input_names(
    frame: Frame,
    targets: Sequence[str],
    inputs: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    categorical: Sequence[str] = (),
) -> list[str]:
    """The columns to predict from: the given ones, or all that are neither targets nor excluded; else a UserError."""
    given = {"target": targets, "inputs": inputs or (), "exclude": exclude, "categorical": categorical}
    for option, names in given.items():
        unknown = next((name for name in names if name not in frame.columns), None)
        there = f"it has {', '.join(frame.columns)}"
        refuse((unknown is not None, f"{frame.name} has no column {unknown!r} (--data.{option}): {there}"))
    twice = next((name for name in targets if name in (*exclude, *(inputs or ()))), None)
    names = [each for each in inputs or frame.columns if each not in (*targets, *exclude)]
    stray = next((name for name in categorical if name not in names), None)
    unnamed = f"{frame.name} has a column without a name: name it, or leave it out by --data.exclude '[\"\"]'"
    refuse(
        (not targets, "no target is given: name the column to predict by --data.target"),
        (not len(frame), f"{frame.name} has no rows: give a file with some"),
        (twice is not None, f"column {twice!r} is a target and cannot be an input or excluded: give it once"),
        (stray is not None, f"column {stray!r} is categorical, but no input: leave it out of --data.categorical"),
        (not names, f"{frame.name} has no column to predict from: exclude fewer, or give other inputs"),
        ("" in names, unnamed),
    )
    return names


def _check_columns(frame: Frame, names: Sequence[str]) -> None:
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


# where in what is known each value stands
def _places(frame: Frame, name: str, known: Sequence[str], what: str) -> Values:
    places = {value: place for place, value in enumerate(known)}
    found = np.asarray([places.get(value, -1) for value in _texts(frame, name).tolist()], dtype=np.int64)
    fix = f"a {what} that the training data do not have: fix or remove the row"
    frame.refuse_rows(pa.chunked_array([found < 0]), name, lambda value: f"holds {value!r}, {fix}")
    return found

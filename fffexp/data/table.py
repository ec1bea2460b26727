"""Tables: CSV, Parquet, or a table of scikit-learn's."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv
from pyarrow import parquet
from torch import Tensor
from typing_extensions import override

from fffexp.data.base import Batches, InMemoryData, Kind, Part, Rows
from fffexp.data.columns import Frame, Inputs, TargetKind, Targets, input_names
from fffexp.errors import UserError, refuse

EMBEDDED = "sklearn:"  # how the path of a table inside scikit-learn begins
SETS = ("breast_cancer", "diabetes", "iris", "linnerud", "wine")


class TableData(InMemoryData):
    """What data with named columns have in common, wherever they come from.

    A subclass sets `inputs`, if they are columns, and `targets`, by `set_targets`, where it is constructed.
    """

    inputs: Inputs | None = None
    targets: Targets

    def set_targets(self, targets: Targets) -> None:
        """Take what is known of the targets."""
        self.targets, self.target_names = targets, targets.names
        if targets.kind == "regression":
            self.num_outputs = len(targets.names)
        else:
            self.class_names, self.num_classes = targets.class_names, len(targets.class_names)

    @override
    def statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().statistics(inputs)
        if self.inputs is not None:
            numbers = self.inputs.width - self.inputs.num_texts  # what stands for a text stays 0 or 1
            mean[:, numbers:], std[:, numbers:] = 0, 1
        return mean, std


class Table(TableData):
    """A CSV or Parquet file with a column to predict, or several to regress on.

    A file ending in .parquet is Parquet; sklearn:NAME is a table inside scikit-learn (breast_cancer, diabetes, iris,
    linnerud, wine; BSD licence); all else is CSV in UTF-8, gzipped or not, whose first line names the columns. A
    column of inputs holds numbers, or texts: these become a column for each different text in the file, 1 where it
    stands and 0 elsewhere.

    Args:
        path: The file to train and validate on; and to test on, a fifth of it, without a `test_path`.
        target: Column to predict; several for regression.
        exclude: Columns that are left out.
        categorical: Columns of inputs whose numbers are names.
        kind: Whether the targets are classes or quantities; left out, texts and whole numbers are classes.
        test_path: A file of the same columns that is the test.
        predict_path: A file to predict for, which need not have the targets; the test part without it.
        delimiter: What separates the fields of a CSV.
        normalize: See InMemoryData; columns that stand for texts are not changed.
        kwargs: See InMemoryData.
    """

    inputs: Inputs

    def __init__(
        self,
        path: str,
        target: str | list[str],
        exclude: list[str] | None = None,
        categorical: list[str] | None = None,
        kind: TargetKind | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        delimiter: str = ",",
        normalize: Literal["unit", "standard"] = "standard",
        **kwargs: Any,
    ) -> None:
        super().__init__(normalize=normalize, **kwargs)
        refuse((len(delimiter) != 1, f"delimiter is {delimiter!r}: give one character"))
        self.path, self.test_path, self.predict_path, self.delimiter = path, test_path, predict_path, delimiter
        targets = [target] if isinstance(target, str) else target
        self._frame = read(path, delimiter)
        names = input_names(self._frame, targets, None, exclude or (), categorical or ())
        self.set_targets(Targets(self._frame, targets, kind))
        self.inputs = Inputs(self._frame, names, categorical or ())
        self.in_shape = (self.inputs.width,)

    @override
    def source(self, part: Part, kind: Kind) -> str:
        return (part == "test" and self.test_path) or self.path

    @override
    def load(self, part: Part) -> Rows | None:
        if part == "test" and self.test_path is None:
            return None
        frame = read(self.test_path, self.delimiter) if part == "test" and self.test_path else self._frame
        return self.inputs.of(frame), self.targets.of(frame)

    @override
    def predict_dataloader(self) -> Batches:
        if self.predict_path is None:
            return super().predict_dataloader()
        return self._batches([self.normalized(self.inputs.of(read(self.predict_path, self.delimiter)))])


def read(path: str, delimiter: str = ",") -> Frame:
    """A table by its path, see Table; a UserError names the file and line of what cannot be read."""
    if path.startswith(EMBEDDED):
        return _embedded(path)
    try:
        content = Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or "its gzip stream is damaged"
        raise UserError(f"{path} cannot be read ({problem}): give the path of a CSV or Parquet file") from error
    refuse((not content, f"{path} is empty: give a CSV or Parquet file"))
    is_parquet = content[:4] == b"PAR1" or path.endswith(".parquet")
    return _parquet(path, content) if is_parquet else _csv(path, content, delimiter)


def to_frame(name: str, table: pa.Table, place: Callable[[int], str]) -> Frame:
    """Columns of simple types: texts without spaces around them, no dictionaries, missing texts empty."""
    columns = {}
    for title, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
        columns[title] = column
    return Frame(name, columns, place)


def _embedded(path: str) -> Frame:
    name = path.removeprefix(EMBEDDED)
    refuse((name not in SETS, f"{path}: scikit-learn has no such table: give one of {', '.join(SETS)}"))
    from sklearn import datasets

    table = getattr(datasets, f"load_{name}")(as_frame=True).frame
    return to_frame(path, pa.Table.from_pandas(table, preserve_index=False), lambda row: f"row {row + 1}")


def _parquet(path: str, content: bytes) -> Frame:
    try:
        table = parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged, or no Parquet file ({problem}): write it again") from error
    _check_names(path, table.column_names)
    return to_frame(path, table, lambda row: f"row {row + 1}")


def _csv(path: str, content: bytes, delimiter: str) -> Frame:
    parse = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    _, header = next(_records(path, content, delimiter))
    _check_names(path, [name.strip() for name in header])
    # all as texts: what is guessed from the first rows alone fails later, and labels stay as they stand
    convert = arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
    checked = b'"' in content  # an open quote would swallow the lines after it
    for _ in _records(path, content, delimiter) if checked else ():
        pass
    try:
        whole = arrow_csv.ReadOptions(block_size=min(len(content) + 1, 2**30))  # rows may not be longer
        table = arrow_csv.read_csv(pa.BufferReader(content + b"\n"), whole, parse, convert)  # a header may be all
    except pa.ArrowException as error:
        for _ in _records(path, content, delimiter):
            pass
        problem = " ".join(str(error).split())[:100]
        raise UserError(f"{path} cannot be read ({problem}): write it as CSV in UTF-8") from error

    def place(row: int) -> str:
        records = _records(path, content, delimiter)
        return f"line {next(line for number, (line, _) in enumerate(records) if number == row + 1)}"

    return to_frame(path, table.rename_columns([name.strip() for name in header]), place)


# the first line of each record, as an editor counts, and its fields; what is wrong is refused by its line
def _records(path: str, content: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x}"
        raise UserError(f"{path}, line {line}: {byte} is not UTF-8: save the file in UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line, width = 1, None
    try:
        for record in reader:
            if record:  # else an empty line
                width = width or len(record)
                many = f"{len(record)} fields, but the first line has {width}"
                fix = f"fix the line, or give --data.delimiter if {delimiter!r} does not separate the fields"
                refuse((len(record) != width, f"{path}, line {line} has {many}: {fix}"))
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}: fix the quotes of what begins there") from error
    refuse((width is None, f"{path} is empty: give a CSV or Parquet file"))


def _check_names(path: str, names: Sequence[str]) -> None:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    refuse((twice is not None, f"{path} has two columns {twice!r}: rename one"))

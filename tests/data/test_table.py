import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from fffexp.data import Table
from fffexp.errors import UserError

ROWS = 100
COLOURS = ["blue", "green", "red"]
HEADER = "age,colour,income,label"


def lines(rows: int = ROWS, seed: int = 0) -> list[str]:
    """Rows of a CSV; the label depends on the income, of which line 2 has the least."""
    random = np.random.default_rng(seed)
    return [
        f"{random.integers(20, 70)},{random.choice(COLOURS)},{1000.5 + row},{'yes' if row % 3 else 'no'}"
        for row in range(rows)
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "f.csv", lines())


def write(path: Path, rows: list[str], header: str = HEADER, end: str = "\n") -> Path:
    path.write_bytes(end.join([header, *rows, ""]).encode())
    return path


def table(path: Path | str, target: str | list[str] = "label", **options: Any) -> Table:
    data = Table(str(path), target, **options)
    data.setup()
    return data


def error(path: Path | str, target: str | list[str] = "label", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        table(path, target, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def whole(data: Table) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of all parts, ordered by the income, which is different in each row."""
    x, y = (torch.cat(each) for each in zip(data.train_data, data.val_data, data.test_data, strict=True))
    order = x[:, 1].argsort()
    return x[order], y[order]


def test_a_classification(file: Path) -> None:
    data = Table(str(file), "label")
    # age, income, and a column for each colour
    assert (data.in_shape, data.num_classes, data.class_names) == ((5,), 2, ["no", "yes"])
    assert not hasattr(data, "num_outputs")
    data.setup()
    assert [len(y) for _, y in (data.train_data, data.val_data, data.test_data)] == [72, 8, 20]
    inputs, labels = whole(data)
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == [int(row % 3 > 0) for row in range(ROWS)]
    colours = [line.split(",")[1] for line in lines()]
    assert inputs[:, 2:].tolist() == [
        [float(colour == each) for each in ("blue", "green", "red")] for colour in colours
    ]
    assert data.decode(labels[:3]) == {"label": ["no", "yes", "yes"]}


def test_statistics_are_of_the_training_part(file: Path) -> None:
    data, plain = table(file), table(file, normalize="unit")
    raw, _ = whole(plain)
    assert raw[:, 1].tolist() == [1000.5 + row for row in range(ROWS)]
    train = plain.train_data[0].double()
    expected = (train[:, :2] - train[:, :2].mean(0)) / train[:, :2].std(0, correction=0)
    torch.testing.assert_close(data.train_data[0][:, :2].double(), expected, atol=1e-5, rtol=0)
    shifted = (plain.test_data[0].double()[:, :2] - train[:, :2].mean(0)) / train[:, :2].std(0, correction=0)
    torch.testing.assert_close(data.test_data[0][:, :2].double(), shifted, atol=1e-5, rtol=0)


def test_a_regression(file: Path) -> None:
    data = Table(str(file), "income", exclude=["label"])
    assert (data.in_shape, data.num_outputs) == ((4,), 1)
    assert not hasattr(data, "num_classes")
    data.setup()
    assert data.train_data[1].mean().abs() < 1e-5
    (decoded,) = [data.decode(y)["income"] for _, y in (data.test_data,)]
    assert all(abs(value - round(value - 0.5) - 0.5) < 1e-3 for value in decoded)
    assert sorted(decoded) == pytest.approx(decoded)  # in the order of the file
    raw = table(file, "income", normalize_targets=False)
    assert raw.test_data[1].flatten().tolist() == pytest.approx(decoded, abs=1e-3)


def test_several_targets(file: Path) -> None:
    data = table(file, ["income", "age"])
    assert (data.num_outputs, data.target_names) == (2, ["income", "age"])
    decoded = data.decode(data.test_data[1])
    assert [*decoded] == ["income", "age"]
    ages = {1000.5 + row: int(line.split(",")[0]) for row, line in enumerate(lines())}
    assert [round(age) for age in decoded["age"]] == [ages[round(income * 2) / 2] for income in decoded["income"]]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "2", "10"], "classification"),
        (["a", "b", "c"], "classification"),
        (["1.0", "2", "3"], "regression"),
        (["1e3", "2", "3"], "regression"),
    ],
)
def test_what_the_kind_is_when_it_is_left_out(tmp_path: Path, values: list[str], kind: str) -> None:
    path = write(tmp_path / "f.csv", [f"{row},{values[row % 3]}" for row in range(60)], "x,y")
    data = table(path, "y")
    assert hasattr(data, "num_classes") == (kind == "classification")
    assert kind == "regression" or data.class_names == values  # in the order of numbers
    other: Any = {"classification": "regression", "regression": "classification"}[kind]
    if values[0] != "a":
        assert hasattr(table(path, "y", kind=other), "num_classes") == (other == "classification")


def test_large_numbers_keep_their_digits(tmp_path: Path) -> None:
    # seconds since 1970: float32 has steps of 128 there
    path = write(tmp_path / "f.csv", [f"{1_700_000_000 + row},{row % 2}" for row in range(100)], "time,y")
    inputs, _ = table(path, "y").train_data
    assert len(set(inputs.flatten().tolist())) == 72


def test_constant_columns_become_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [f"0.1,{row},{row % 2},same" for row in range(100)], "c,x,y,t")
    data = table(path, "y")
    inputs = data.train_data[0]
    assert inputs[:, 0].abs().max() < 1e-6
    assert (inputs[:, 2] == 1).all()
    assert inputs.isfinite().all()


def test_numbers_that_are_names(file: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [f"{row % 3 + 1},{row},{row % 2}" for row in range(60)], "zip,x,y")
    assert table(path, "y").in_shape == (2,)
    data = table(path, "y", categorical=["zip"])
    assert data.in_shape == (4,)
    assert data.train_data[0][:, 1:].sum(1).tolist() == [1.0] * len(data.train_data[0])


def test_a_file_of_its_own_for_the_test(file: Path, tmp_path: Path) -> None:
    # columns in another order
    rows = [",".join(reversed(line.split(","))) for line in lines(30, seed=1)]
    other = write(tmp_path / "test.csv", rows, "label,income,colour,age")
    data = table(file, test_path=str(other))
    assert [len(y) for _, y in (data.train_data, data.val_data, data.test_data)] == [90, 10, 30]
    assert data.test_data[1].tolist() == [int(row % 3 > 0) for row in range(30)]
    assert data.test_data[0][:, 1].tolist() == sorted(data.test_data[0][:, 1].tolist())


def test_a_file_to_predict_for_needs_no_target(file: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "new.csv", [",".join(line.split(",")[:3]) for line in lines(30)], "age,colour,income")
    data = table(file, predict_path=str(other))
    (inputs,) = data.predict_dataloader()
    assert torch.equal(inputs, whole(data)[0][:30])
    (default,) = table(file).predict_dataloader()
    assert torch.equal(default, data.test_data[0])


def test_packed_with_a_mark_and_other_ends_of_lines(file: Path, tmp_path: Path) -> None:
    expected = whole(table(file))
    (tmp_path / "g.csv").write_bytes(gzip.compress(b"\xef\xbb\xbf" + file.read_bytes()))
    spaced = write(tmp_path / "s.csv", [line.replace(",", " , ") for line in lines()], HEADER.replace(",", ", "))
    ends = write(tmp_path / "e.csv", lines(), end="\r\n")
    quoted = write(tmp_path / "q.csv", [",".join(f'"{each}"' for each in line.split(",")) for line in lines()])
    semicolons = write(tmp_path / "d.csv", [line.replace(",", ";") for line in lines()], HEADER.replace(",", ";"))
    for path in (tmp_path / "g.csv", spaced, ends, quoted):
        assert all(map(torch.equal, whole(table(path)), expected))
    assert all(map(torch.equal, whole(table(semicolons, delimiter=";")), expected))


def to_parquet(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def test_parquet(file: Path, tmp_path: Path) -> None:
    fields = [line.split(",") for line in lines()]
    path = to_parquet(
        tmp_path / "f.parquet",
        age=pa.array([int(row[0]) for row in fields], pa.int16()),
        colour=pa.array([row[1] for row in fields]).dictionary_encode(),
        income=[float(row[2]) for row in fields],
        label=[row[3] for row in fields],
    )
    assert all(map(torch.equal, whole(table(path)), whole(table(file))))
    flags = to_parquet(tmp_path / "g.parquet", x=list(range(50)), flag=[row % 2 == 0 for row in range(50)])
    assert table(flags, "flag").class_names == ["false", "true"]
    floats = to_parquet(tmp_path / "h.parquet", x=list(range(50)), y=[float(row % 3) for row in range(50)])
    assert table(floats, "y").num_outputs == 1
    assert table(floats, "y", kind="classification").class_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "target", "in_shape", "sizes"),
    [("breast_cancer", "target", (30,), {"num_classes": 2}), ("diabetes", "target", (10,), {"num_outputs": 1})],
)
def test_tables_of_scikit_learn(name: str, target: str, in_shape: tuple[int], sizes: dict[str, int]) -> None:
    data = table(f"sklearn:{name}", target)
    assert data.in_shape == in_shape
    assert {size: getattr(data, size, None) for size in sizes} == sizes


def edited(tmp_path: Path, line: int, text: str | bytes, suffix: str = "csv") -> Path:
    """The file with another text in this line, as an editor counts."""
    rows: list[str | bytes] = [HEADER, *lines()]
    rows[line - 1] = text
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else row.encode() for row in rows) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (17, "30,red,5", "line 17 has 3 fields, but the first line has 4"),
        (17, "30,red,5,yes,", "line 17 has 5 fields"),
        (17, "30", "line 17 has 1 fields"),
        (17, "old,red,5,yes", "line 17: column 'age' holds 'old', and numbers elsewhere"),
        (17, "nan,red,5,yes", "line 17: column 'age' holds 'nan'"),
        (17, "inf,red,5,yes", "line 17: column 'age' holds 'inf'"),
        (17, "1e39,red,5,yes", "line 17: column 'age' holds '1e39', which is too large"),
        (17, "1e400,red,5,yes", "line 17: column 'age' holds '1e400', which is too large"),
        (17, "3 0,red,5,yes", "line 17: column 'age' holds '3 0'"),
        (17, "0x1F,red,5,yes", "line 17: column 'age' holds '0x1F'"),
        (17, "30,7,5,yes", "line 17: column 'colour' holds '7', and texts elsewhere"),
        (17, ",red,5,yes", "line 17: column 'age' has no value"),
        (17, "30,,5,yes", "line 17: column 'colour' has no value"),
        (17, "30,red,5,", "line 17: column 'label' has no value"),
        (17, '30,"red,5,yes', "line 17: unexpected end of data"),
        (17, '30,"red"x,5,yes', "line 17: "),
        (17, b"30,r\xe9d,5,yes", "line 17: byte 0xe9 is not UTF-8"),
        (17, '30,"a\nb",5,yes\nold,red,5,yes', "line 19: column 'age' holds 'old'"),
        (17, "\n\nold,red,5,yes", "line 19: column 'age' holds 'old'"),
        (1, "age,colour,age,label", "has two columns 'age'"),
        (1, "age,colour,income", "line 2 has 4 fields, but the first line has 3"),
        (1, "age,colour,income,Label", "has no column 'label' (--data.target): it has age, colour, income, Label"),
        (1, ",colour,income,label", "has a column without a name"),
    ],
)
def test_a_bad_line(tmp_path: Path, line: int, text: str | bytes, message: str) -> None:
    path = edited(tmp_path, line, text)
    reported = error(path)
    assert reported.startswith(str(path))
    assert message in reported


def test_a_bad_line_of_the_test(file: Path, tmp_path: Path) -> None:
    for text, message in (
        ("old,red,5,yes", "line 9: column 'age' holds 'old' where a number is due"),
        ("30,pink,5,yes", "line 9: column 'colour' holds 'pink', a text that the training data do not have"),
        ("30,red,5,maybe", "line 9: column 'label' holds 'maybe', a class that the training data do not have"),
    ):
        path = edited(tmp_path, 9, text)
        assert f"{path}, {message}" in error(file, test_path=str(path))
    path = write(tmp_path / "t.csv", [line.split(",")[0] for line in lines()], "age")
    assert f"{path} has no column 'income', which the training data have" in error(file, test_path=str(path))
    path = write(tmp_path / "t.csv", [",".join(line.split(",")[:3]) for line in lines()], "age,colour,income")
    assert f"{path} has no column 'label'" in error(file, test_path=str(path))
    assert f"{path} has no rows" in error(file, test_path=str(write(path, [])))


def test_bad_targets_of_regression(tmp_path: Path) -> None:
    path = edited(tmp_path, 17, "30,red,high,yes")
    assert f"{path}, line 17: column 'income' holds 'high' where a number is due" in error(path, "income")
    assert "line 2: column 'label' holds 'no' where a number is due" in error(
        path, "label", kind="regression", exclude=["income"]
    )
    path = edited(tmp_path, 17, "30,red,,yes")
    assert f"{path}, line 17: column 'income' has no value" in error(path, "income")


def test_bad_files(tmp_path: Path) -> None:
    assert "absent.csv cannot be read (No such file" in error(tmp_path / "absent.csv")
    assert "cannot be read (Is a directory)" in error(tmp_path)
    path = tmp_path / "f.csv"
    for content, message in (
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (HEADER.encode(), "has no rows"),
        (HEADER.encode() + b"\n", "has no rows"),
        (("\ufeff" + HEADER + "\n1,red,2,no\n").encode("utf-16-le"), "line 1: byte 0xff is not UTF-8"),
        (gzip.compress(b"x" * 1000)[:-9], "its gzip stream is damaged"),
        (b"PAR1" + b"\x00" * 100, "is damaged, or no Parquet file"),
        (b"<html>\n<a,b>\n", "line 2 has 2 fields"),
    ):
        path.write_bytes(content)
        assert message in error(path)
    (tmp_path / "f.parquet").write_bytes(b"age,label\n1,2\n")
    assert "f.parquet is damaged, or no Parquet file" in error(tmp_path / "f.parquet")


def test_bad_parquet(tmp_path: Path) -> None:
    good: dict[str, Any] = {"x": [float(row) for row in range(50)], "y": [row % 2 for row in range(50)]}
    path = tmp_path / "f.parquet"
    for value, message in ((None, "has no value"), (float("nan"), "has no value"), (float("inf"), "is too large")):
        bad = {**good, "x": [value if row == 7 else x for row, x in enumerate(good["x"])]}
        assert f"{path}, row 8: column 'x' " in error(to_parquet(path, **bad), "y")
        assert message in error(path, "y")
    to_parquet(path, **good, when=pa.array([0] * 50, pa.timestamp("ms")))
    assert "column 'when' holds timestamp[ms], neither numbers nor texts" in error(path, "y")
    assert table(path, "y", exclude=["when"]).in_shape == (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "none"}, "has no column 'none' (--data.target)"),
        ({"target": []}, "no target is given"),
        ({"exclude": ["none"]}, "has no column 'none' (--data.exclude)"),
        ({"categorical": ["none"]}, "has no column 'none' (--data.categorical)"),
        ({"categorical": ["label"]}, "column 'label' is categorical, but no input"),
        ({"exclude": ["label"]}, "column 'label' is a target and cannot be an input or excluded"),
        ({"exclude": ["age", "colour", "income"]}, "has no column to predict from"),
        ({"target": ["label", "age"], "kind": "classification"}, "only one column can hold classes"),
        ({"target": "income", "kind": "classification"}, "has 100 different values in 100 rows"),
        ({"delimiter": ";;"}, "give one character"),
        ({"delimiter": ";"}, "has no column 'label' (--data.target): it has age,colour,income,label"),
    ],
)
def test_bad_arguments(file: Path, options: dict[str, Any], message: str) -> None:
    assert message in error(file, **options)


def test_whole_numbers_that_are_no_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [f"{row},{row * row}" for row in range(60)], "x,y")
    assert "column 'y' has 60 different values in 60 rows" in error(path, "y")
    assert "--data.kind regression" in error(path, "y")


def test_one_class_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [f"{row},a" for row in range(60)], "x,y")
    assert "column 'y' holds 'a' in every row" in error(path, "y")


def test_too_few_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", lines(8))
    assert "split into 6 for training, 0 for validation and 2 for the test" in error(path)


def test_no_such_table_of_scikit_learn() -> None:
    assert "sklearn:none: scikit-learn has no such table: give one of breast_cancer" in error("sklearn:none")


def test_a_different_text_in_each_row(tmp_path: Path) -> None:
    named = [f"person {row},{row % 7}.5,{row % 2}" for row in range(60)]
    said = error(write(tmp_path / "f.csv", named, "name,size,label"))
    assert said.endswith(
        "f.csv: column 'name' has 60 different texts in 60 rows, too many for a column each: "
        "leave it out by --data.exclude '[name]'"
    )
    assert table(tmp_path / "f.csv", exclude=["name"]).in_shape == (1,)
    assert table(write(tmp_path / "few.csv", named[:15], "name,size,label")).in_shape == (16,)

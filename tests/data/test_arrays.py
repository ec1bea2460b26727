import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fffexp.data import Arrays
from fffexp.errors import UserError

ROWS = 60
Array = np.ndarray[Any, Any]


def arrays(**change: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    made: dict[str, Any] = {
        "inputs": random.integers(0, 256, (ROWS, 2, 3, 4)).astype(np.uint8),
        "targets": np.arange(ROWS) % 3 + 1,
        "test_inputs": random.integers(0, 256, (20, 2, 3, 4)).astype(np.uint8),
        "test_targets": np.arange(20) % 3 + 1,
    }
    return {name: array for name, array in (made | change).items() if array is not None}


def save(folder: Path, **change: Any) -> dict[str, Any]:
    """Each as a .npy file; returns their paths."""
    made = arrays(**change)
    for name, array in made.items():
        np.save(folder / f"{name}.npy", array)
    return {name: str(folder / f"{name}.npy") for name in made}


def error(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Arrays(**options).setup()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_and_keys_give_the_same(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", **arrays())
    np.savez_compressed(tmp_path / "packed.npz", **arrays())
    keys = {name: name for name in arrays()}
    every = [Arrays(**options) for options in (
        save(tmp_path),
        {"path": str(tmp_path / "plain.npz"), **keys},
        {"path": str(tmp_path / "packed.npz"), **keys},
    )]  # fmt: skip
    for data in every:
        assert (data.in_shape, data.num_classes, data.class_names) == ((2, 3, 4), 3, ["1", "2", "3"])
        assert not hasattr(data, "num_outputs")
        data.setup()
        assert [len(y) for _, y in (data.train_data, data.val_data, data.test_data)] == [54, 6, 20]
        torch.testing.assert_close(data.test_data[0], torch.from_numpy(arrays()["test_inputs"]).float() / 255)
        assert data.test_data[1].tolist() == [row % 3 for row in range(20)]
        assert data.decode(data.test_data[1][:2]) == {"class": ["1", "2"]}
    assert torch.equal(every[0].train_data[0], every[2].train_data[0])


def test_without_a_test_a_fifth_is_held_out(tmp_path: Path) -> None:
    data = Arrays(**save(tmp_path, test_inputs=None, test_targets=None))
    data.setup()
    assert [len(y) for _, y in (data.train_data, data.val_data, data.test_data)] == [44, 4, 12]


def test_labels_are_texts_in_a_test_with_fewer_classes(tmp_path: Path) -> None:
    targets = np.array(["b", "a", "c"] * 20)
    data = Arrays(**save(tmp_path, targets=targets, test_targets=np.array(["c", "b"] * 10)))
    data.setup()
    assert data.class_names == ["a", "b", "c"]
    assert data.test_data[1].tolist() == [2, 1] * 10


@pytest.mark.parametrize("outputs", [None, 1, 2])
def test_a_regression(tmp_path: Path, outputs: int | None) -> None:
    targets = np.random.default_rng(0).normal(7, 3, (ROWS, outputs) if outputs else ROWS)
    data = Arrays(**save(tmp_path, targets=targets, test_targets=targets[:20]))
    assert data.num_outputs == (outputs or 1)
    assert not hasattr(data, "num_classes")
    data.setup()
    assert data.train_data[1].mean(0).abs().max() < 1e-5
    columns = np.array([*data.decode(data.test_data[1]).values()]).T
    np.testing.assert_allclose(columns, targets[:20].reshape(20, -1), atol=1e-5)


def test_whole_numbers_as_quantities(tmp_path: Path) -> None:
    paths = save(tmp_path, targets=np.arange(ROWS), test_targets=np.arange(20))
    assert Arrays(**paths, kind="regression").num_outputs == 1
    assert "targets.npy has 60 different values in 60 rows, too many for classes: give --data.kind regression" in error(
        **paths
    )


def test_a_class_is_not_nan(tmp_path: Path) -> None:
    targets = spoiled(np.arange(ROWS) % 3, np.nan)
    assert "targets.npy has a NaN in row 7" in error(**save(tmp_path, targets=targets), kind="classification")


def test_large_numbers_keep_their_digits(tmp_path: Path) -> None:
    times = 1_700_000_000.0 + np.arange(ROWS)[:, None]
    data = Arrays(**save(tmp_path, inputs=times, test_inputs=times[:20]), normalize="standard")
    data.setup()
    assert len(set(data.train_data[0].flatten().tolist())) == 54


def spoiled(array: Array, value: float) -> Array:
    array = array.astype(np.float64)
    array[7] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": spoiled(arrays()["inputs"], np.nan)}, "inputs.npy has a NaN or inf in row 7"),
        ({"test_inputs": spoiled(arrays()["test_inputs"], 1e39)}, "test_inputs.npy has a NaN or inf in row 7"),
        ({"targets": spoiled(np.arange(ROWS), np.inf), "test_targets": np.zeros(20)}, "targets.npy has a NaN or inf"),
        ({"targets": np.arange(59) % 3 + 1}, "inputs.npy has 60 rows, but"),
        ({"test_inputs": np.zeros((20, 2, 3))}, "test_inputs.npy has rows of shape (2, 3), not (2, 3, 4)"),
        ({"test_targets": np.full(20, 9)}, "test_targets.npy has the class '9', which the training data do not have"),
        ({"targets": np.ones(ROWS, int), "test_targets": np.ones(20, int)}, "there is nothing to learn"),
        ({"inputs": np.zeros(ROWS)}, "inputs.npy has the shape (60,)"),
        ({"inputs": np.array([["a"]] * ROWS)}, "inputs.npy holds texts"),
        ({"inputs": np.zeros((ROWS, 2), complex)}, "inputs.npy holds complex128, neither numbers nor texts"),
        ({"inputs": np.zeros((0, 2))}, "inputs.npy is empty"),
        ({"targets": np.zeros((ROWS, 2, 2))}, "targets.npy has the shape (60, 2, 2)"),
        ({"targets": np.zeros(ROWS), "test_targets": np.zeros((20, 2))}, "test_targets.npy has targets of shape (2,)"),
    ],
)
def test_bad_arrays(tmp_path: Path, change: dict[str, Array], message: str) -> None:
    reported = error(**save(tmp_path, **change))
    assert message in reported
    assert str(tmp_path) in reported


def test_bad_kinds(tmp_path: Path) -> None:
    texts = save(tmp_path, targets=np.array(["b", "a", "c"] * 20))
    assert "targets.npy holds texts: give --data.kind classification" in error(**texts, kind="regression")
    wide = save(tmp_path, targets=np.zeros((ROWS, 2)))
    assert "targets.npy has the shape (60, 2), not (rows,)" in error(**wide, kind="classification")


def test_bad_files(tmp_path: Path) -> None:
    paths = save(tmp_path)
    file = tmp_path / "inputs.npy"
    whole = file.read_bytes()
    packed = io.BytesIO()
    np.savez(packed, **arrays())
    objects = io.BytesIO()
    np.save(objects, np.array([None], dtype=object))
    for content, message in (
        (b"", "inputs.npy"),
        (b"a,b\n1,2\n", "holds objects, or is no .npy file"),
        (objects.getvalue(), "holds objects"),
        (whole[:-9], "is damaged"),
        (whole[:20], "is damaged"),
        (packed.getvalue(), "is an .npz: give it by --data.path"),
    ):
        file.write_bytes(content)
        reported = error(**paths)
        assert message in reported
        assert "inputs.npy" in reported
    assert "absent.npy cannot be read (No such file" in error(**{**paths, "inputs": str(tmp_path / "absent.npy")})
    (tmp_path / "a.npz").write_bytes(packed.getvalue())
    assert "a.npz has no array 'x': give one of inputs, targets" in error(inputs="x", path=str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(packed.getvalue()[:-200])
    assert "a.npz (inputs) is damaged" in error(path=str(tmp_path / "a.npz"))
    assert "targets.npy is a .npy: give it by --data.inputs" in error(path=paths["targets"])
    assert "belong together" in error(inputs=paths["inputs"], targets=paths["targets"], test_inputs="x")

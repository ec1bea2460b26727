"""What `fffexp predict` gives: a table of predictions, or the text with which a language model goes on."""

import csv
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from fffexp.data.base import plain_columns
from fffexp.errors import UserError, refuse
from fffexp.files import replace
from fffexp.training.task import Task


def write_table(data: Any, outputs: Tensor, path: str | None) -> None:
    """Write (samples, ...) outputs as the columns that the data make of them: a CSV file, or lines on stdout."""
    columns = data.decode(outputs) if hasattr(data, "decode") else plain_columns(outputs)
    text = io.StringIO()
    header = [columns.keys()] if path is not None else []
    csv.writer(text, lineterminator="\n").writerows([*header, *zip(*columns.values(), strict=True)])
    if path is None:
        print(text.getvalue(), end="")
        return
    try:
        replace(Path(path), text.getvalue().encode())
    except OSError as error:
        raise UserError(f"out: {path}: {error.strerror}") from error


def continuation(task: Task, data: Any, prompt: str, new_tokens: int, temperature: float) -> str:
    """A prompt and what the task's network generates after it; a UserError if it is no language model."""
    network: Any = task.network
    able = hasattr(network, "generate") and hasattr(data, "encode")
    refuse(
        (not able, f"prompt: {type(network).__name__} on {type(data).__name__} generates no text: leave it out"),
        (not prompt, "prompt is empty: give at least one character"),
        (new_tokens < 1, f"new_tokens is {new_tokens}: give at least 1"),
        (not 0 <= temperature < float("inf"), f"temperature is {temperature}: give 0 (the likeliest token) or more"),
    )
    tokens = data.encode(prompt)
    return str(data.decode([*tokens, *network.generate(tokens, new_tokens, temperature)]))

"""The table of docs/architectures.md, where it needs no timm; test_timm.py makes it anew."""

import pytest
from adapt.architectures import PAGE, architectures, row, table

NAMES = "TransformerEncoder", "a subclass of Sequential, 2 f(x) of each part", "bert", "gpt2", "convnext", "mixtral"


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_table(name: str) -> None:
    found = next(each for each in architectures() if each[1] == name)
    *_, line = table([row(*found)]).splitlines()
    assert line in PAGE.read_text().splitlines()

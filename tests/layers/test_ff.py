import pytest
import torch
from cases import IN, OUT, inputs
from tolerances import assert_close
from torch import nn

from fffexp.layers import FF


def test_is_the_two_layer_network_by_its_formula() -> None:
    ff = FF(IN, OUT, width=7, activation=nn.Tanh).double()
    w1, b1, w2, b2 = ff.parameters()
    x = inputs(5, dtype=torch.float64)
    expected = torch.tanh(x @ w1.T + b1) @ w2.T + b2
    for training in (True, False):
        assert_close(ff.train(training)(x), expected)


def test_routes_every_row_to_its_only_block() -> None:
    assert torch.equal(FF(IN, OUT, width=7).route(inputs(2, 3)), torch.zeros(6, 1, dtype=torch.long))


def test_too_wide_names_the_memory_and_what_to_lower() -> None:
    with pytest.raises(ValueError, match=r"weights would take [\d,.]+ GiB .*: lower width"):
        FF(IN, OUT, width=10**15)

"""Networks with any layer in them."""

from functools import partial
from typing import Any

import pytest
import torch

from fffexp.layers import FF, FFF
from fffexp.models import MLP, ViT
from fffexp.training.classification import ClassificationTask

IMAGE = (1, 8, 12)
TREE = partial(FFF, depth=2, leaf_width=3)


def test_a_vit_of_attention_alone_and_with_layers() -> None:
    x = torch.randn(5, *IMAGE)
    nets: list[Any] = [ViT(layer, IMAGE, 3, features=16, heads=2) for layer in (None, TREE)]
    bare, full = nets
    assert bare(x).shape == full(x).shape == (5, 3)
    mine = sum(p.numel() for p in full.blocks[0].layer.parameters()) + 2 * 16  # and its norm
    count = {net: sum(p.numel() for p in net.parameters()) for net in (bare, full)}
    assert count[full] == count[bare] + 4 * mine
    # 6 patches of 16 pixels and a class token; 16 features
    attention = 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16
    assert count[bare] == (16 * 16 + 16) + 16 + 7 * 16 + 4 * attention + 2 * 16 + (16 * 3 + 3)


def test_the_last_block_computes_the_class_token_alone() -> None:
    torch.manual_seed(0)
    model = ViT(partial(FF, width=8), IMAGE, 3, features=16, heads=2).eval()
    rows = []
    for block in model.blocks:
        block.layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    x = torch.randn(5, *IMAGE)
    logits = model(x)
    assert rows == [7, 7, 7, 1]
    tokens = torch.cat([model.class_token.expand(5, -1, -1), model.patches(x).flatten(2).transpose(1, 2)], 1)
    everything = model.blocks(tokens + model.positions)
    assert torch.allclose(logits, model.classifier(model.norm(everything[:, 0])), atol=1e-6)


def test_every_patch_and_its_place_count() -> None:
    torch.manual_seed(0)
    model = ViT(partial(FF, width=8), IMAGE, 3, features=16, heads=2).eval()
    x = torch.randn(1, *IMAGE)
    moved = x.roll(4, dims=3)
    assert not torch.allclose(model(x), model(moved), atol=1e-5)
    for row in (0, 4):
        for column in (0, 4, 8):
            changed = x.clone()
            changed[..., row, column] += 1
            assert not torch.allclose(model(x), model(changed), atol=1e-6)


def test_a_depth_for_each_block() -> None:
    model = ViT(TREE, IMAGE, 3, features=16, heads=2, depths=(3, 2, 1, 0))
    assert [block.layer.depth for block in model.blocks] == [3, 2, 1, 0]
    assert [block.layer.leaf_width for block in model.blocks] == [3] * 4


def test_a_task_trains_a_network_without_layers() -> None:
    task = ClassificationTask(None, IMAGE, 3, network=partial(ViT, features=16, heads=2))
    loss, predicted, _ = task.loss((torch.randn(4, *IMAGE), torch.arange(4) % 3))
    loss.backward()
    assert predicted.shape == (4,)
    assert task.layers == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViT(TREE, (64,), 3), r"a sample has shape \(64,\)"),
        (lambda: ViT(TREE, (1, 8, 10), 3), "patch_size is 4, which does not divide images of 8 x 10"),
        (lambda: ViT(TREE, IMAGE, 3, features=15), "heads is 4, which does not divide the 15 features"),
        (lambda: ViT(TREE, IMAGE, 3, depths=[3, 2]), "there are 2 depths for 4 layers"),
        (lambda: ViT(None, IMAGE, 3, depths=[1]), "there are 1 depths for 0 layers"),
        (lambda: ViT(partial(FF, width=3), IMAGE, 3, depths=[1] * 4), "a layer that takes none"),
        (lambda: ViT(TREE, IMAGE, 3, num_blocks=0), "num_blocks is 0"),
        (lambda: MLP(None, IMAGE, 3), "layer is None"),
    ],
)
def test_mistakes(make: partial[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

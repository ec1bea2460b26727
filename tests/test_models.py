"""Networks with any layer in them."""

from functools import partial

import pytest
import torch

from fffexp.layers import FF, FFF, Forest
from fffexp.models import MLP, ViT
from fffexp.task import ClassificationTask

IMAGE = (1, 8, 12)
TREE = partial(FFF, depth=2, leaf_width=3)


def test_a_vit_of_attention_alone_and_with_layers() -> None:
    x = torch.randn(5, *IMAGE)
    bare, full = (ViT(layer, IMAGE, 3, features=16, heads=2) for layer in (None, TREE))
    assert bare(x).shape == full(x).shape == (5, 3)
    mine = sum(p.numel() for p in full.blocks[0].layer.parameters()) + 2 * 16  # and its norm
    count = {net: sum(p.numel() for p in net.parameters()) for net in (bare, full)}
    assert count[full] == count[bare] + 4 * mine
    # 6 patches of 16 pixels and a class token; 16 features
    attention = 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16
    assert count[bare] == (16 * 16 + 16) + 16 + 7 * 16 + 4 * attention + 2 * 16 + (16 * 3 + 3)


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


@pytest.mark.parametrize("master_width", [0, 5])
def test_a_forest_is_the_sum_of_its_parts(master_width: int) -> None:
    forest = Forest(16, 12, trees=3, depth=2, leaf_width=4, master_width=master_width)
    parts = [*forest.trees, *([forest.master] if forest.master else [])]
    assert len(parts) == 3 + bool(master_width)
    x = torch.randn(2, 5, 16)
    for mode in (True, False):
        forest.train(mode)
        assert torch.allclose(forest(x), sum(part(x) for part in parts), atol=1e-6)
        for part in parts:
            part.routing = None


def test_a_task_trains_the_parts_of_a_forest() -> None:
    torch.manual_seed(0)
    forest = partial(Forest, trees=2, depth=2, leaf_width=4, master_width=3)
    network = partial(ViT, features=16, heads=2, num_blocks=1, input_dropout=0.0)
    task = ClassificationTask(forest, IMAGE, 3, network=network, coefficients={"importance": 0.1})
    task.on_fit_start()
    assert [layer.inference_size for layer in task.layers.values()] == [2 + 4, 2 + 4, 3]
    batch = torch.randn(4, *IMAGE), torch.arange(4) % 3
    task.coefficients = {"importance": 0.0}
    plain, _ = task.loss(*batch)
    task.on_after_backward()
    task.coefficients = {"importance": 1.0}
    loss, _ = task.loss(*batch)
    importance = sum(layer.regularizers["importance"](layer.routing) for layer in list(task.layers.values())[:2])
    assert float(loss - plain) == pytest.approx(float(importance), rel=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())


def test_a_task_trains_a_network_without_layers() -> None:
    task = ClassificationTask(None, IMAGE, 3, network=partial(ViT, features=16, heads=2))
    task.on_fit_start()
    loss, logits = task.loss(torch.randn(4, *IMAGE), torch.arange(4) % 3)
    loss.backward()
    assert logits.shape == (4, 3)
    assert task.layers == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViT(TREE, (64,), 3), r"a sample has shape \(64,\)"),
        (lambda: ViT(TREE, (1, 8, 10), 3), "patch_size is 4, which does not divide images of 8 x 10"),
        (lambda: ViT(TREE, IMAGE, 3, features=15), "heads is 4, which does not divide the 15 features"),
        (lambda: ViT(TREE, IMAGE, 3, depths=[3, 2]), "there are 2 depths for 4 blocks"),
        (lambda: MLP(None, IMAGE, 3), "layer is None"),
        (lambda: Forest(4, 4, trees=0, depth=1, leaf_width=1), "trees is 0"),
        (lambda: Forest(4, 4, trees=1, depth=1, leaf_width=1, master_width=-1), "master_width is -1"),
    ],
)
def test_mistakes(make: partial[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

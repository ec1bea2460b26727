"""Layers in models of timm, in a process of their own; prints what test_timm.py reads."""

import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(sys.prefix) / "timm"))
if torch.version.cuda is None:
    # torchvision from pip is built for CUDA: beside a CPU torch its operators do not load, and are asked for
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from fffexp import FF, FFF, auxiliary_loss, replace_feedforward

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
MODELS = {
    "vit": partial(timm.create_model, "vit_tiny_patch16_224", **SIZES),
    "vit with dropout": partial(timm.create_model, "vit_tiny_patch16_224", **SIZES, proj_drop_rate=0.1),
    "deit": partial(timm.create_model, "deit_tiny_patch16_224", **SIZES),
    "mixer": partial(MlpMixer, img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=5),
}


def main() -> None:
    """Replace, train a step, infer; and once with dense layers of the same weights."""
    found = {}
    images = torch.randn(4, 3, 32, 32)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().train()
        replaced = replace_feedforward(model, partial(FFF, depth=2, leaf_width=8))
        (model(images).square().mean() + auxiliary_loss(model)).backward()
        trained = all(
            p.grad is not None and p.grad.isfinite().all() for each in replaced for p in each.new.parameters()
        )
        shape = list(model.eval()(images).shape)

        dense = make().eval()
        before = dense(images)
        for each in replace_feedforward(dense, lambda i, o: FF(i, o, 4 * i, activation=nn.GELU), _square):
            linears = [m for m in each.old.modules() if isinstance(m, nn.Linear)]
            for old, new in zip(linears, (each.new.network[0], each.new.network[3]), strict=True):
                new.load_state_dict(old.state_dict())
        difference = (dense(images) - before).abs().max().item()
        names = [each.name for each in replaced]
        found[name] = {"names": names, "trained": trained, "shape": shape, "difference": difference}
    print(json.dumps(found))


def _square(name: str, module: nn.Module) -> bool:
    return module.fc1.out_features == 4 * module.fc1.in_features


if __name__ == "__main__":
    main()

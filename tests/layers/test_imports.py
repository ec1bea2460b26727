"""The layers alone need torch and the standard library, on every system."""

import subprocess
import sys

# what the rest of the package needs, and modules that Windows has not
OTHERS = (
    *("lightning", "torchmetrics", "jsonargparse", "optuna", "mlflow", "psutil", "filelock", "sqlalchemy", "sklearn"),
    *("scipy", "matplotlib", "yaml", "rich", "pandas", "fcntl", "resource"),
)
CODE = f"""
import sys
import torch
sys.modules.update(dict.fromkeys({set(OTHERS)} - sys.modules.keys()))  # importing them fails
import fffexp.layers
layer = fffexp.layers.FFF(4, 4, 2, 2)
layer.backend = "eager"
for training in (True, False):
    assert layer.train(training)(torch.ones(3, 4)).shape == (3, 4)
"""


def test_layers_import_torch_alone() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)

"""Being here, this file puts the folder on sys.path, where tests/tolerances.py is found."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test comes first

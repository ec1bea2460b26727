"""`fffexp reproduce table2`: FF, MoE and FFF at equal training width (arXiv 2308.14711, section 4.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fffexp.paper import runs, stability
from fffexp.paper.cells import CONFIGS, DATA, Cell, Layer
from fffexp.paper.paper import printed2

LEAF_WIDTH = 32
# Of an expert; two of a noisy top-k gate's, or one of a Switch gate's, are as wide as a leaf.
EXPERT_WIDTHS = {"NoisyTopKMoE": 16, "SwitchMoE": 32}
HARDENING = 3.0
# The paper ends a training after 350 epochs without a better validation accuracy, halves the learning rate after 250
# without a better training accuracy (configs/recipe/paper_table2.yaml), and trains 7000 epochs at most. Here it is a
# seventh of each, so that the table can be had on two cores.
EPOCHS, PATIENCE = 1000, 50


def cells(training_widths: Sequence[int], layers: Sequence[Layer]) -> list[Cell]:
    """All cells, the widest first.

    Raises:
        UserError: a width that is not a power of 2 of leaves.
    """
    found = []
    for width in sorted(training_widths, reverse=True):
        for layer in layers:
            if layer == "FF":
                found.append(Cell("FF", width))
            elif layer == "FFF":
                found += [Cell("FFF", width, LEAF_WIDTH, "sum"), Cell("FFF", width, LEAF_WIDTH, "mean")]
            else:
                found.append(Cell(layer, width, EXPERT_WIDTHS[layer]))
    return found


def training(cell: Cell, data: str) -> runs.Training:
    """Of a cell."""
    args = [*DATA[data], f"--config={CONFIGS}/recipe/paper_table2.yaml", f"--trainer.max_epochs={EPOCHS}"]
    args += cell.layer_arguments()
    if cell.layer == "NoisyTopKMoE":
        args += [f"--model.aux_weights.{name}=0.1" for name in ("importance", "load")]
    if cell.layer == "SwitchMoE":
        args.append("--model.aux_weights.load_balance=0.3")  # as in configs/recipe/switch.yaml
    if cell.reduction:
        args.append(f"--model.aux_weights.hardening_{cell.reduction}={HARDENING}")
    return runs.Training(args, PATIENCE, fit_matters=False)


def measure(data: str, wanted: Sequence[Cell], seeds: Sequence[int], jobs: int, path: Path | None) -> dict[str, Any]:
    """The table; what the file has is not trained again, and each seed is written when it is done.

    Raises:
        UserError: the file is of another measurement.
    """
    setting = {"table": "table2", "data": data, "protocol": "paper", "epochs": EPOCHS, "patience": PATIENCE}
    found = runs.begin(path, setting, lambda cell: training(cell, data))
    how = {cell: training(cell, data) for cell in wanted}
    # a plateau, and so the learning rate, differs from seed to seed
    runs.complete(found, how, seeds, jobs, path, lambda cell: in_paper(cell, data), together=False)
    return found


def in_paper(cell: Cell, data: str) -> dict[str, float]:
    """What is printed of a cell, by metric; the table is of CIFAR10 alone."""
    return printed2(cell.layer, cell.training_width) if data == "cifar10" else {}


def report(found: dict[str, Any]) -> str:
    """All four metrics, and the stability."""
    length = (
        f"The printed protocol but for its length: at most {found['epochs']} epochs (the paper: 7000), no more than\n"
        f"{found['patience']} without a better validation accuracy (350). What takes longer is not reached."
    )
    table = "\n".join([runs.HEADER, *map(runs.line, found["cells"]), runs.LEGEND, length])
    parts = [table, stability.report(found)]
    return "\n\n".join(part for part in parts if part)
